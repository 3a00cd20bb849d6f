"""`nmoe bench checkpoint`: what a save and a load of a state cost, beside a plain write and read of as much."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nmoe.config import Config
from nmoe.effects import resume, runtime
from nmoe.effects.bench import random_batch
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import FILE
from nmoe.effects.checkpoint.writer import Writer, open_writer
from nmoe.effects.log import say
from nmoe.effects.plan import quantity
from nmoe.effects.run import arena_layouts, fresh
from nmoe.effects.step import State, make_step
from nmoe.errors import InputError
from nmoe.pure import model
from nmoe.pure.digest import digest
from nmoe.pure.pieces import Piece
from nmoe.pure.retention import Keep

__all__ = ["main"]

BLOCK_BYTES = 1 << 24
"""What the plain write and read hand over at once; `dd bs=16M` does the same."""

FOLDER = "nmoe-bench-checkpoint"


def main(config: Config, to: Path, steps: int, rounds: int) -> int:
    """Save and load the state of `config` under `to`, and take steps with and without a save beside them.

    steps    timed without a save, and after each save: enough to cover the time it takes
    returns  exit code 0
    Raises:  InputError when the device is not there, or `to` is not writable or too small.
    """
    if steps < 2 or rounds < 1:
        raise InputError(f"--steps and --rounds: at least 2 and 1, got {steps} and {rounds}; 10 and 3 are a good start")
    device = runtime.device(config.run.device)
    rt = runtime.Runtime(device=device, rank=0, world=1, peak_flops=1.0)
    layouts, dims = arena_layouts(config), model.dims(config.model)
    state, env = fresh(config, layouts, rt)
    folder = to / FOLDER
    size = sum(piece.tensor.nbytes for piece in resume.pieces(state, layouts, dims))
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < 2.2 * size:
            raise InputError(
                f"--to: room for two copies of {quantity(size, 'B')}, got {quantity(free, 'B')}; free some"
            )
        say(f"{'state':<14} {quantity(size, 'B')} on {device}  disk {folder}")
        with open_writer(Disk(), folder / "run", keep=Keep(last=1)) as writer:
            _disk(config, folder, writer, state, layouts, dims, size, rounds)
            _stalls(config, writer, state, env, layouts, dims, rt, size, steps, rounds)
    except OSError as error:
        raise InputError(f"--to: a writable folder, got {error.strerror} at {error.filename}; name another") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _disk(
    config: Config, folder: Path, writer: Writer, state: State, layouts: Any, dims: Any, size: int, rounds: int
) -> None:
    """Write and read rates, plain and ours by turns: a disk that is slower for a while is so for both."""
    device = runtime.device(config.run.device)
    pieces = resume.pieces(state, layouts, dims)
    data = memoryview(torch.randint(256, (min(size, 1 << 30),), dtype=torch.uint8).numpy().data)
    plain, ours, sums, loads, reads = ([] for _ in range(5))  # seconds
    for index in range(rounds):
        plain.append(_timed(_write, folder / "plain", data, size))
        reads.append(_timed(_read, folder / "plain"))
        os.remove(folder / "plain")
        writer.save(pieces, step=index, meta={})
        saved = writer.wait()
        if saved is None:
            raise RuntimeError("a save that is waited for is told")
        ours.append(saved.seconds)
        sums.append(_timed(_digest, pieces))
        checkpoint = folder / "run" / saved.name
        _forget(checkpoint)
        manifest = manifests.read(Disk(), checkpoint)
        loads.append(_timed(reader.load_, Disk(), checkpoint, manifest, pieces))
        runtime.synchronize(device)
    _rate("plain write", size, plain, None)
    _rate("save", size, ours, plain)
    say(f"{'digest':<14} {100 * statistics.median(sums) / statistics.median(ours):.2f} % of a save")
    _rate("plain read", size, reads, None)
    _rate("load", size, loads, reads)


def _stalls(
    config: Config,
    writer: Writer,
    state: State,
    env: Any,
    layouts: Any,
    dims: Any,
    rt: runtime.Runtime,
    size: int,
    steps: int,
    rounds: int,
) -> None:
    """How much longer steps take when a save goes on beside them, and when each save is waited for."""
    batch = random_batch(config, rt.device)
    take = make_step(config, layouts, env, rt, mark=lambda name: None, before_update=writer.staged)
    held = state
    seconds: dict[str, list[float]] = {"alone": [], "overlapped": [], "staging": []}

    def walk() -> None:
        nonlocal held
        for _ in range(steps):
            held, _ = take(held, batch)
        runtime.synchronize(rt.device)

    walk()
    for index in range(rounds):
        writer.wait()
        seconds["alone"].append(_timed(walk))
        writer.wait()
        pieces = resume.pieces(held, layouts, dims)
        seconds["staging"].append(_timed(writer.save, pieces, step=rounds + index, meta={}))
        seconds["overlapped"].append(seconds["staging"][-1] + _timed(walk))
    writer.wait()
    alone = statistics.median(seconds["alone"])
    stall = statistics.median(seconds["overlapped"]) - alone
    call = statistics.median(seconds["staging"])
    for name, value in (("stall", stall), ("of it the call", call)):
        say(f"{name:<14} {1000 * value:.1f} ms, {1e12 * value / size:.2f} ms a GB of state")
    say(f"{'':<14} {steps} steps take {1000 * alone:.1f} ms without a save; writing goes on beside the next ones")


def _timed(call: Callable[..., Any], *arguments: Any, **named: Any) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call(*arguments, **named)
    return time.perf_counter() - began


def _rate(name: str, size: int, seconds: list[float], plain: list[float] | None) -> None:
    """Print one rate, the median of the rounds; beside the plain one, if there is one."""
    middle = statistics.median(seconds)
    share = "" if plain is None else f"  {100 * statistics.median(plain) / middle:.0f} % of the plain rate"
    say(
        f"{name:<14} {quantity(size / middle, 'B/s')} ({quantity(size / max(seconds), 'B/s')} to "
        f"{quantity(size / min(seconds), 'B/s')}){share}"
    )


def _write(path: Path, data: memoryview, size: int) -> None:
    """A new file of `size` bytes, written from front to back and synced."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        left = size
        while left:
            offset = (size - left) % len(data)
            left -= os.write(handle, data[offset : min(offset + BLOCK_BYTES, offset + left, len(data))])
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> None:
    """A file from front to back, from the disk."""
    buffer = bytearray(BLOCK_BYTES)
    _uncache(path)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            continue


def _digest(pieces: Sequence[Piece]) -> None:
    """The digests of a whole state."""
    for piece in pieces:
        digest(piece.tensor.detach(), piece.begin).item()


def _forget(folder: Path) -> None:
    """Let the next reader of a checkpoint find none of it in memory."""
    for path in folder.iterdir():
        if path.name != FILE:
            _uncache(path)


def _uncache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
