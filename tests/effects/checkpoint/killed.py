"""A writer that is killed, again and again: run as a process of its own, which forks the writers.

Imports are made once and each writer is a fork, so that a death costs milliseconds. A writer tells in shared memory
when a save begins and when its commit was told. Prints one line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import TEMPORARY, open_writer
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.saves import manifest_in, number_in, pieces, values


def write_until_killed(root: Path, shared: mmap.mmap, start: int) -> None:
    """Save number after number; `shared` holds whether a save is under way and the last number told."""
    with open_writer(Disk(), root, keep=Keep(last=2), parent=manifest_in(Disk(), root), chunk_bytes=4096) as writer:
        for number in range(start, start + 10_000):
            mine = pieces(values(number))
            shared[0] = 1
            writer.save(mine, step=number, meta={"number": number})
            writer.wait()
            shared[8:16] = number.to_bytes(8, "little")
            shared[0] = 0


def main(root: Path, kills: int, seed: int) -> None:
    """Fork a writer, kill it, look at what it left; `kills` times."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    inside = left = lost = wrong = told = 0
    for _ in range(kills):
        shared = mmap.mmap(-1, 16)
        shared[8:16] = told.to_bytes(8, "little")
        child = os.fork()
        if child == 0:
            try:
                # Torch makes a forked process's pool anew at the first call, which two threads must not make at once.
                torch.set_num_threads(1)
                write_until_killed(root, shared, told + 1)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        while not shared[0] and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"the writer ended by itself: {status}")
        inside += shared[0]
        left += any(name.startswith(TEMPORARY) for name in os.listdir(root)) if root.exists() else 0
        told = int.from_bytes(shared[8:16], "little")
        try:
            found = number_in(Disk(), root) or 0
        except Exception as error:
            wrong += 1
            print(repr(error), file=sys.stderr)
            continue
        lost += found < told
        told = max(told, found)
    print(json.dumps({"kills": kills, "inside": inside, "left": left, "lost": lost, "wrong": wrong, "last": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
