"""The world as a training meets it on a bad day: each fault of a plan strikes once, from inside the trained process.

Whoever starts the trainings keeps the journal, a file with a line for each fault that has struck, so that the next
attempt meets only what is left, and what is done to the files between two attempts can be done there.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch

from nmoe.effects.checkpoint.fs import Buffer, Disk
from nmoe.effects.train.world import World
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env
from nmoe.soak.plan import Fault

BETWEEN = ("flipped bit", "lost file", "cut file", "torn log", "changed ranks")
"""Kinds that kill the process here; the rest is done to its files while none runs."""

STOPS = ("pause", "second trainer")
"""Kinds that stop the process until somebody lets it continue."""

SIGNALS = MappingProxyType(
    {
        "kill": (signal.SIGKILL,),
        "terminate": (signal.SIGTERM,),
        "terminate twice": (signal.SIGTERM, signal.SIGTERM),
        "user signal": (signal.SIGUSR1,),
        "interrupt": (signal.SIGINT,),
        **{kind: (signal.SIGKILL,) for kind in BETWEEN},
        **{kind: (signal.SIGSTOP,) for kind in STOPS},
    }
)

DELAY_S = 0.08
"""Longest time from the head of a step to a signal: about two steps and a save of the training that `soak` runs."""

SLOW_S = 0.2
"""Time a slow disk takes for one write."""

OPERATIONS = 12
"""File operations of a save up to and a little after its commit: at one of them the process is killed."""


@attrs.frozen(kw_only=True)
class Journal:
    """Which faults have struck."""

    path: Path

    def struck(self) -> tuple[int, ...]:
        """Their indices, in the order they struck."""
        return tuple(int(line) for line in self.path.read_text().split()) if self.path.exists() else ()

    def add(self, fault: Fault) -> None:
        """Note a fault that strikes now. Writes: one line, in one call, so that a kill cannot tear it."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{fault.index}\n".encode())
        finally:
            os.close(handle)


class Striker:
    """Decides, at the head of each step and at each file operation, what strikes."""

    def __init__(self, faults: Sequence[Fault], journal: Journal, batch_size: int) -> None:
        struck = set(journal.struck())
        self.journal, self.batch_size = journal, batch_size
        self.poisoned = {fault.step for fault in faults if fault.kind == "NaN batch"}
        self.left = [fault for fault in faults if fault.index not in struck]
        self.armed: Fault | None = None  # waits for a file operation
        self.operations = 0  # since it was armed
        self.factor = 1.0  # on the loss of this step

    def take(self) -> Fault | None:
        """The armed fault, which strikes now. Writes: the journal."""
        fault, self.armed = self.armed, None
        if fault is not None:
            self.journal.add(fault)
        return fault

    def head(self, cursor: int) -> None:
        """The head of a step. Writes: the journal, and whatever the fault does."""
        step = cursor // self.batch_size
        self.factor = float("nan") if step in self.poisoned else 1.0
        while self.left and self.left[0].step <= step:
            fault = self.left[0]
            if fault.kind in SIGNALS:
                self.left.pop(0)
                self.journal.add(fault)
                threading.Thread(target=_send, args=(SIGNALS[fault.kind], fault.draw * DELAY_S), daemon=True).start()
            elif fault.kind in ("NaN batch", "loader error"):
                self.left.pop(0)
                self.journal.add(fault)
                if fault.kind == "loader error":
                    raise OSError(errno.EIO, "the loader cannot read a shard")
            elif self.armed is None:
                self.left.pop(0)
                self.armed, self.operations = fault, 0
            else:
                return  # one at a time at the disk


@attrs.frozen(kw_only=True)
class WorseDisk(Disk):
    """A disk on which the armed fault strikes."""

    striker: Striker

    def _operation(self) -> None:
        armed = self.striker.armed
        self.striker.operations += 1
        if armed is not None and armed.kind == "kill in a save":
            if self.striker.operations > armed.draw * OPERATIONS:
                self.striker.take()
                os.kill(os.getpid(), signal.SIGKILL)

    def _strikes(self, kind: str) -> bool:
        self._operation()
        armed = self.striker.armed
        return armed is not None and armed.kind == kind and self.striker.take() is not None

    def create(self, path: Path, size: int) -> int:
        """As `Disk`, or there is no space."""
        if self._strikes("disk full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().create(path, size)

    def write(self, handle: int, data: Buffer, offset: int) -> int:
        """As `Disk`, or late, or a part and then no more."""
        if self._strikes("slow writer"):
            time.sleep(SLOW_S)
        if self._strikes("short write"):
            super().write(handle, memoryview(data)[: len(data) // 2], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(handle, data, offset)

    def sync(self, handle: int) -> None:
        """As `Disk`, or the content is lost."""
        if self._strikes("failed fsync"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(handle)

    def sync_folder(self, folder: Path) -> None:
        """As `Disk`."""
        self._operation()
        super().sync_folder(folder)

    def rename(self, old: Path, new: Path) -> None:
        """As `Disk`."""
        self._operation()
        super().rename(old, new)


def worse(faults: Sequence[Fault], journal: Journal, batch_size: int) -> World:
    """The world in which these faults strike, those that have not struck yet. A NaN batch strikes in every attempt:
    it belongs to the data.
    """
    striker = Striker(faults, journal, batch_size)

    def read(inner: Callable[[int], Batch]) -> Callable[[int], Batch]:
        def batch(cursor: int) -> Batch:
            striker.head(cursor)
            return inner(cursor)

        return batch

    def env(inner: Env) -> Env:
        def loss(*arguments: Any, **named: Any) -> Any:
            outputs = inner.ops.linear_cross_entropy(*arguments, **named)
            # A validation has its own data.
            return tuple(output * striker.factor for output in outputs) if torch.is_grad_enabled() else outputs

        return attrs.evolve(inner, ops=attrs.evolve(inner.ops, linear_cross_entropy=loss))

    return World(fs=WorseDisk(striker=striker), read=read, env=env)


def _send(signals: Sequence[signal.Signals], delay_s: float) -> None:
    """Send signals to this process after a while, a little apart."""
    for number in signals:
        time.sleep(delay_s)
        os.kill(os.getpid(), number)
        delay_s = DELAY_S / 8
