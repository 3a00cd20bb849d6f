"""The process: what the environment says, the device, the clock, the signals that end a run."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import attrs
import torch

from nmoe.effects import files
from nmoe.errors import InputError
from nmoe.pure.plan import PEAK_FLOPS

__all__ = [
    "SUPPORTED_GPUS",
    "Clock",
    "Launch",
    "Runtime",
    "Stop",
    "device",
    "launch",
    "memory_bytes",
    "peak_flops",
    "stop_on_signals",
]

SUPPORTED_GPUS = ((9, 0), (10, 0))
"""Compute capabilities the kernels are written for: H100 and H200, B200."""


@attrs.frozen(kw_only=True)
class Launch:
    """What the environment says of this process; read once."""

    rank: int
    world: int
    home: Path  # caches: prepared corpora and tokenizers


@attrs.frozen(kw_only=True)
class Runtime:
    """Where this process computes. A function that takes one has effects there."""

    device: torch.device
    rank: int
    world: int
    peak_flops: float  # of this rank


def launch(environ: Mapping[str, str]) -> Launch:
    """Read `RANK`, `WORLD_SIZE` and `NMOE_HOME`, the folder of caches."""
    counts: dict[str, int] = {}
    for name, absent in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = environ.get(name, absent)
        if not text.isdecimal():
            raise InputError(f"{name}: a launcher sets it to a number, got {text!r}; unset it or start with a launcher")
        counts[name] = int(text)
    return Launch(rank=counts["RANK"], world=counts["WORLD_SIZE"], home=files.home(environ))


def device(name: str) -> torch.device:
    """The device a config asks for.

    Raises:  InputError when it is not there or not supported; nothing else is tried.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            'run.device: "cuda" needs a GPU that torch can use, got none; write device = "cpu" or mend the driver'
        )
    capability = torch.cuda.get_device_capability(0)
    if capability not in SUPPORTED_GPUS:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_GPUS)
        raise InputError(
            f"run.device: the GPU has a supported compute capability ({known}), got {capability[0]}.{capability[1]} "
            f'({torch.cuda.get_device_name(0)}); use one of those or device = "cpu"'
        )
    return torch.device("cuda", 0)


def peak_flops(where: torch.device) -> float:
    """FLOP/s that count as 100 % MFU: the data sheet's for a GPU, a measured fp32 product for a CPU.

    The CPU has no honest data sheet, so this multiplies two matrices for about a fifth of a second and takes the best.
    """
    if where.type == "cuda":
        return PEAK_FLOPS if torch.cuda.get_device_capability(where) == (9, 0) else 2250e12
    size = 1024
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds spent in each named part of a step.

    `mark(name)` ends the part that began at the previous mark. On a GPU marks are events in the stream, read only by
    `split`, so that marking never waits for the device.
    """

    def __init__(self, where: torch.device) -> None:
        self._cuda = where.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, name: str) -> None:
        """End the part `name`. Writes: the list of marks."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def split(self) -> dict[str, float]:
        """Seconds of each part since the first mark, summed by name; starts anew at the last mark.

        Waits for the device.
        """
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, float) and isinstance(end, float):
                passed = end - begin
            else:
                passed = begin.elapsed_time(end) / 1000  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            seconds[name] = seconds.get(name, 0.0) + passed
        del self._marks[:-1]
        return seconds


class Stop:
    """Whether somebody asked the run to end, and how."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def exit_code(self) -> int:
        """128 + the signal, as a shell reports it."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM are noted, so that the step in progress ends; a second SIGINT interrupts at once.

    Writes:  the process's handlers, put back at the end.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)

    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
