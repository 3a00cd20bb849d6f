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

from nmoe.bench.step import random_batch
from nmoe.config import Config
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import FILE, Manifest
from nmoe.effects.checkpoint.writer import Writer, open_writer
from nmoe.effects.device import gpu, process
from nmoe.effects.terminal import say
from nmoe.effects.train import resume
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import State, make_step
from nmoe.errors import InputError
from nmoe.pure.checkpoint.digest import digests
from nmoe.pure.checkpoint.pieces import Piece
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.units import quantity

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
        raise InputError(
            f"--steps and --rounds: expected at least 2 and 1, got {steps} and {rounds}; 10 and 3 are a good start"
        )
    device = gpu.device(config.run.device, kernels=config.run.kernels)
    rt = process.Runtime(device=device, rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(config)
    state, env = fresh(config, blueprint, rt)
    folder = to / FOLDER
    pieces = resume.pieces(state, blueprint)
    size = sum(piece.tensor.nbytes for piece in pieces)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"--to: expected a writable folder without a {FOLDER} in it, got {error.strerror} at "
            f"{error.filename}; delete it or "
            "name another"
        ) from error
    try:
        free = shutil.disk_usage(folder).free
        if free < 1.05 * size:
            raise InputError(
                f"--to: expected room for {quantity(1.05 * size, 'B')}, got {quantity(free, 'B')}; free some"
            )
        say(f"{'state':<14} {quantity(size, 'B')} on {device}  disk {folder}")
        with open_writer(Disk(), folder / "run", keep=Keep(last=1)) as writer:
            writer.reserve(pieces)
            _disk(folder, writer, pieces, device, size, rounds)
            _stalls(config, folder / "run", writer, state, env, blueprint, rt, size, steps, rounds)
    except OSError as error:
        raise InputError(
            f"--to: expected a disk that can be written, got {error.strerror}; name another folder"
        ) from error
    finally:
        shutil.rmtree(folder)
    return 0


def _disk(folder: Path, writer: Writer, pieces: Sequence[Piece], device: torch.device, size: int, rounds: int) -> None:
    """Write and read rates, plain and ours by turns: a disk that is slower for a while is so for both."""
    data = memoryview(torch.randint(256, (min(size, 1 << 30),), dtype=torch.uint8).numpy().data)
    seconds: dict[str, list[float]] = {name: [] for name in ("write", "read", "copy", "save", "digest", "load")}
    for index in range(rounds):
        seconds["write"].append(_on_disk(_write, folder / "plain", data, size))
        seconds["read"].append(_on_disk(_read, folder / "plain"))
        os.remove(folder / "plain")
        os.sync()
        seconds["copy"].append(_timed(_save_copied, writer, pieces, index, device))
        saved = writer.wait()
        if saved is None:
            raise RuntimeError("a save that is waited for reports its end")
        seconds["save"].append(saved.seconds)
        seconds["digest"].append(_timed(_digest, pieces))
        checkpoint = folder / "run" / saved.name
        _forget(checkpoint)
        manifest = manifests.read(Disk(), checkpoint)
        seconds["load"].append(_on_disk(_load, checkpoint, manifest, pieces, device))
        shutil.rmtree(checkpoint)
        last = "  ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        say(f"{f'round {index + 1} of {rounds}':<14} {last}")
    _rate("plain write", size, seconds["write"], None)
    _rate("save", size, seconds["save"], seconds["write"])
    share = statistics.median(seconds["digest"]) / statistics.median(seconds["save"])
    say(f"{'digest':<14} {100 * share:.2f} % of the time of a save, alone; it continues beside the writing")
    _rate("plain read", size, seconds["read"], None)
    _rate("load", size, seconds["load"], seconds["read"])
    _stall("copy waited for", size, statistics.median(seconds["copy"]))


def _stalls(
    config: Config,
    folder: Path,
    writer: Writer,
    state: State,
    env: Any,
    blueprint: Blueprint,
    rt: process.Runtime,
    size: int,
    steps: int,
    rounds: int,
) -> None:
    """How much longer steps take when a save is made before the first of them and continues beside them."""
    batch = random_batch(config, rt.device)
    take = make_step(config, blueprint, env, rt, mark=lambda name: None, before_update=writer.staged)
    held = state
    alone, beside, calls = ([] for _ in range(3))  # seconds

    def walk() -> None:
        nonlocal held
        for _ in range(steps):
            held, _ = take(held, batch)
        gpu.synchronize(rt.device)

    for _ in range(2):  # the first one builds kernels and may record a graph
        walk()
    for index in range(rounds):
        alone.append(_timed(walk))
        pieces = resume.pieces(held, blueprint)
        calls.append(_timed(writer.save, pieces, step=rounds + index, meta={}))
        beside.append(calls[-1] + _timed(walk))
        saved = writer.wait()
        if saved is not None:
            shutil.rmtree(folder / saved.name)
    plain = statistics.median(alone)
    _stall("overlapped", size, statistics.median(beside) - plain)
    _stall("of it the call", size, statistics.median(calls))
    say(f"{'':<14} {steps} steps take {1000 * plain:.1f} ms without a save")


def _save_copied(writer: Writer, pieces: Sequence[Piece], step: int, device: torch.device) -> None:
    """Begin a save and wait until everything is copied."""
    writer.save(pieces, step=step, meta={})
    writer.staged()
    gpu.synchronize(device)


def _load(folder: Path, manifest: Manifest, pieces: Sequence[Piece], device: torch.device) -> None:
    """Load a checkpoint."""
    reader.load_(Disk(), folder, manifest, pieces)
    gpu.synchronize(device)


def _on_disk(call: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call, begun when the disk has nothing else to write."""
    os.sync()
    return _timed(call, *arguments)


def _stall(name: str, size: int, seconds: float) -> None:
    """Print how long the steps had to wait."""
    say(f"{f'stall, {name}':<22} {1000 * seconds:.1f} ms, {1e12 * seconds / size:.2f} ms a GB of state")


def _timed(call: Callable[..., Any], *arguments: Any, **named: Any) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call(*arguments, **named)
    return time.perf_counter() - began


def _rate(name: str, size: int, seconds: list[float], plain: list[float] | None) -> None:
    """Print one rate, the median of the rounds; beside the plain one of the same round, if there is one."""
    shares = [] if plain is None else [100 * one / other for one, other in zip(plain, seconds, strict=True)]
    share = f"  {statistics.median(shares):.0f} % of the plain rate" if shares else ""
    say(
        f"{name:<14} {quantity(size / statistics.median(seconds), 'B/s')} ({quantity(size / max(seconds), 'B/s')} to "
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
    digests([(piece.tensor.detach(), piece.begin) for piece in pieces]).tolist()


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
