"""One trainer at a time: a lock on the folder, and a number that tells later holders from earlier ones.

The lock ends with the process, however it ends, so a dead trainer never keeps the next one out. The number counts
attempts. It is part of the name of everything an attempt writes, so two attempts never write to the same place.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from nmoe.effects.checkpoint.fs import Fs, read_into, write_all
from nmoe.effects.record.alive import process_runs, process_start
from nmoe.errors import InputError

FILE = "LEASE"

RECORD_BYTES = 512
"""Length of the file; one sector, which a disk writes whole."""


@attrs.frozen(kw_only=True)
class Holder:
    """A process, so described that no later one is taken for it."""

    host: str
    boot: str  # differs after each start of the machine; "" where the system does not tell
    pid: int
    started: str  # clock ticks after boot; "" where the system does not tell


@attrs.frozen(kw_only=True)
class Lease:
    """The right to write to a folder, valid while `check` says so."""

    path: Path
    handle: int
    attempt: int
    holder: Holder


def this_process() -> Holder:
    """The process that asks."""
    pid = os.getpid()
    boot = Path("/proc/sys/kernel/random/boot_id")
    named = boot.read_text().strip() if boot.exists() else ""
    return Holder(host=platform.node(), boot=named, pid=pid, started=process_start(pid))


def is_alive(holder: Holder, me: Holder) -> bool:
    """Whether a process of this host still runs; `me` says which host and which start of it this is."""
    if (holder.host, holder.boot) != (me.host, me.boot):
        return False
    return process_runs(holder.pid, holder.started)


@contextmanager
def hold(fs: Fs, root: Path, taken: Iterable[int]) -> Iterator[Lease]:
    """The lease of a folder, until the block ends.

    taken    numbers of attempts that left something in the folder
    Writes:  `root/LEASE`.
    Raises:  InputError when another process holds it, or one of another host did not give it back.
    """
    path, me = root / FILE, this_process()
    try:
        handle = fs.lock(path)
    except BlockingIOError as error:
        raise InputError(
            f"{root}: expected one trainer at a time to write checkpoints here, got a second while "
            f"{_who(fs, path)} runs; wait for it, or choose another run.name"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: expected a file to lock, got {error.strerror or error}; delete it, or fix its permissions or disk"
        ) from error
    try:
        attempt = _next(fs, handle, path, me, taken)
        lease = Lease(path=path, handle=handle, attempt=attempt, holder=me)
        _write(fs, lease, released=False)
        fs.sync_folder(root)
    except BaseException:
        fs.close(handle)
        raise
    try:
        yield lease
    finally:
        _release(fs, lease)


def check(fs: Fs, lease: Lease) -> None:
    """Nothing when the lease is still ours.

    Raises:  InputError when its file was removed, replaced or written by another.
    """
    if not fs.is_at(lease.handle, lease.path) or _read(fs, lease.handle) != (lease.holder, lease.attempt, False):
        raise InputError(
            f"{lease.path}: expected the lease of this trainer, attempt {lease.attempt}, got a file that another "
            "process removed or wrote; end the other trainer and start this one again"
        )


def _next(fs: Fs, handle: int, path: Path, me: Holder, taken: Iterable[int]) -> int:
    """The number of a new attempt.

    Raises:  InputError when the last holder may still write.
    """
    last, attempt, released = _read(fs, handle)
    if last is not None and last != me and not released:
        if last.host != me.host:
            raise InputError(
                f"{path}: expected the last trainer to have released the folder, got process {last.pid} of "
                f"{last.host}, which did not; when it is dead, delete this file"
            )
        if is_alive(last, me):
            raise InputError(
                f"{path}: expected one trainer at a time to write checkpoints here, got process {last.pid} of this "
                "host, which runs and whose lock was removed; end it first"
            )
    return max([attempt, *taken]) + 1


def _release(fs: Fs, lease: Lease) -> None:
    """Say that the folder is free, unless somebody else already took it.

    Raises:  InputError when that cannot be written.
    """
    try:
        try:
            if fs.is_at(lease.handle, lease.path):
                _write(fs, lease, released=True)
        finally:
            fs.close(lease.handle)
    except OSError as error:
        raise InputError(
            f"{lease.path}: expected to release the folder, got {error.strerror or error}; delete this file before "
            "another host trains here"
        ) from error


def _write(fs: Fs, lease: Lease, *, released: bool) -> None:
    fields = {**attrs.asdict(lease.holder), "attempt": lease.attempt, "released": released}
    write_all(fs, lease.handle, json.dumps(fields).encode().ljust(RECORD_BYTES - 1) + b"\n", 0)
    fs.sync(lease.handle)


def _read(fs: Fs, handle: int) -> tuple[Holder | None, int, bool]:
    """Who held the lease last, in which attempt, and whether it was given back; nobody when power failed meanwhile."""
    buffer = bytearray(RECORD_BYTES)
    size = read_into(fs, handle, buffer, 0)
    try:
        fields = json.loads(buffer[:size])
        attempt, released = fields.pop("attempt"), fields.pop("released")
        return Holder(**fields), int(attempt), bool(released)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None, 0, True


def _who(fs: Fs, path: Path) -> str:
    """The process that has the lock, as it says itself."""
    handle = fs.open(path)
    try:
        holder, _, _ = _read(fs, handle)
    finally:
        fs.close(handle)
    return "another process" if holder is None else f"process {holder.pid} of {holder.host}"
