"""A training whose ranks are killed again and again, by what they write: a line of metrics, or a save that begins.

Nothing goes by the clock, so a loaded machine hits as often as a quiet one. A kill counts when it ended every rank, and
ended it where it was meant to.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import attrs

from nmoe.config.sections import Config
from nmoe.effects.checkpoint.manifest import FILE
from nmoe.effects.checkpoint.writer import TEMPORARY
from nmoe.effects.train import run
from nmoe.soak.forked import call_and_exit, tail
from tests.effects.parallel.rank_runs import environment, free_port
from tests.effects.train.trainings import folder

PATIENCE_S = 600.0
"""Most seconds of an attempt: the last one of a long chain on a machine of load 10 takes minutes."""

LATEST = {"inside": 2, "between": 4}
"""Saves, or lines of metrics, after which an attempt is killed at the latest, unless that one is missed."""

LAST_BYTES = 1 << 13
"""Bytes at the end of the metrics that are looked at: more than `LATEST` lines."""

INSIDE = ("folder", "tensors", "manifest")
"""How far a save has come when it is killed."""


@attrs.frozen(kw_only=True)
class Counts:
    """What became of the kills."""

    hit: int  # ended every rank where it was meant to
    late: int  # ended every rank, but the save was over already, or another had begun
    attempts: int  # with the last one, which nobody disturbed


def chain(config: Config, work: Path, where: Literal["inside", "between"], kills: int, seed: int) -> Counts:
    """Train until `kills` kills have hit inside or between saves, then to the end.

    Raises:  RuntimeError when an attempt ends by itself before that, or the last one does not end well.
    """
    chance = random.Random(seed)
    checkpoints, metrics = folder(config) / "checkpoints", folder(config) / "metrics.rank0.jsonl"
    hit = late = attempts = 0
    while hit < kills:
        attempts += 1
        count, moment = chance.randint(1, LATEST[where]), chance.choice(INSIDE)
        if where == "inside":
            reached = _saving(checkpoints, count, moment)
        else:
            reached = _logged(metrics, checkpoints, count)
        codes = _attempt(config, work, reached)
        if any(code != -signal.SIGKILL for code in codes):
            raise RuntimeError(f"attempt {attempts}: expected a training to kill, got {codes}: {_tails(config, work)}")
        if _unfinished(checkpoints) is (where == "inside"):
            hit += 1
        else:
            late += 1
    codes = _attempt(config, work, lambda: False)
    if any(codes):
        raise RuntimeError(f"expected the last attempt to end well, got {codes}: {_tails(config, work)}")
    return Counts(hit=hit, late=late, attempts=attempts + 1)


def _attempt(config: Config, work: Path, reached: Callable[[], bool]) -> list[int]:
    """Start every rank and kill all of them as soon as `reached`; their exit codes."""
    world, port = config.parallel.ranks, free_port()
    pids: list[int] = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ.update(environment(rank, world, port))
            call_and_exit(lambda: run.main(config, {}, ("nmoe", "run"), "x"), work / f"{config.run.name}-{rank}.txt")
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    is_killed = False
    while len(codes) < world:
        if not is_killed and (reached() or time.monotonic() > deadline):
            is_killed = True
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.0002)
    if time.monotonic() > deadline:
        raise RuntimeError(f"expected an attempt to get there in {PATIENCE_S:.0f} s, got none: {_tails(config, work)}")
    return [codes[pid] for pid in pids]


def _saving(checkpoints: Path, count: int, moment: str) -> Callable[[], bool]:
    """Whether the `count`-th save of this attempt, or a later one, is being written and has come this far."""
    dead = {name for name in _names(checkpoints) if name.startswith(TEMPORARY)}

    def reached() -> bool:
        for name in _names(checkpoints):
            if name.startswith(TEMPORARY) and name not in dead and int(name.rpartition("-")[2]) >= count:
                inside = _names(checkpoints / name)
                wanted = {"folder": True, "tensors": len(inside) > 0, "manifest": FILE in inside}
                return wanted[moment]
        return False

    return reached


def _logged(metrics: Path, checkpoints: Path, count: int) -> Callable[[], bool]:
    """Whether this attempt has logged `count` lines, and no save is being written."""
    last = max(_attempts(metrics), default=0)

    def reached() -> bool:
        lines = _attempts(metrics)[-count:]
        return len(lines) == count and lines[0] > last and not _unfinished(checkpoints)

    return reached


def _attempts(metrics: Path) -> list[int]:
    """The attempt of each of the last whole lines: a poll that read a long file whole would take the core of a rank."""
    try:
        with open(metrics, "rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - LAST_BYTES)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line)["attempt"] for line in lines[1 if begin else 0 : -1]]


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _unfinished(checkpoints: Path) -> bool:
    """Whether a save has begun that is not committed."""
    return any(name.startswith(TEMPORARY) for name in _names(checkpoints))


def _tails(config: Config, work: Path) -> str:
    return "\n".join(tail(work / f"{config.run.name}-{rank}.txt") for rank in range(config.parallel.ranks))
