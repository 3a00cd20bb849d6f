"""The process: what the environment says, the device, the clock, the signals that end a run."""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import attrs
import torch

from nmoe.effects.parallel.launch import Launch, launch
from nmoe.effects.parallel.ranks import ALONE, Ranks
from nmoe.errors import InputError
from nmoe.pure.cost.plan import PEAK_FLOPS

__all__ = [
    "EXIT_PREEMPTED",
    "SUPPORTED_GPUS",
    "Clock",
    "Launch",
    "Runtime",
    "Stop",
    "device",
    "exit_on_signals",
    "launch",
    "memory_bytes",
    "peak_flops",
    "stop_on_signals",
    "synchronize",
]

SUPPORTED_GPUS = ((9, 0), (10, 0))
"""Compute capabilities the kernels are written for: H100 and H200, B200."""


EXIT_PREEMPTED = 75
"""Exit code of a run that was told to end and can go on: EX_TEMPFAIL, which schedulers may be told to requeue."""


@attrs.frozen(kw_only=True)
class Runtime:
    """Where this process computes. A function that takes one has effects there."""

    device: torch.device
    rank: int
    world: int
    peak_flops: float  # of this rank
    ranks: Ranks = ALONE


def device(name: str, index: int = 0, count: int = 1) -> torch.device:
    """The device a config asks for.

    index  of the rank among those of this host, which are `count`: its GPU

    Raises:  InputError when it is not there or not supported; nothing else is tried.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            'run.device: "cuda" needs a GPU that torch can use, got none; write device = "cpu" or mend the driver'
        )
    if 1 < count and torch.cuda.device_count() < count:
        raise InputError(
            f"parallel.ranks: a GPU for each of the {count} ranks of this host, got {torch.cuda.device_count()}; start "
            "fewer, or look at CUDA_VISIBLE_DEVICES"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability not in SUPPORTED_GPUS:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_GPUS)
        raise InputError(
            f"run.device: the GPU has a supported compute capability ({known}), got {capability[0]}.{capability[1]} "
            f'({torch.cuda.get_device_name(index)}); use one of those or device = "cpu"'
        )
    return torch.device("cuda", index)


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


def synchronize(where: torch.device) -> None:
    """Wait for everything the device was given to do."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


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
    """Whether somebody asked the run to end, how, and when."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = math.inf  # monotonic seconds

    def hear(self, number: int) -> None:
        """Take the signal that the ranks agree on. Writes: which, and when if it is the first here."""
        if self.signal is None:
            self.since = time.monotonic()
        self.signal = signal.Signals(number)

    def exit_code(self) -> int:
        """0 when nobody asked; 130 for an interrupt, as a shell reports it; 75 for who wants the run to go on later."""
        if self.signal is None:
            return 0
        return 128 + self.signal if self.signal == signal.SIGINT else EXIT_PREEMPTED

    def left_s(self, grace_s: float) -> float:
        """Seconds until the grace time is over; no end without a signal that has one."""
        return self.since + grace_s - time.monotonic() if self.preempted() else math.inf

    def preempted(self) -> bool:
        """Whether it was a signal with a grace time."""
        return self.signal is not None and self.signal != signal.SIGINT


@contextmanager
def stop_on_signals(grace_s: float, overdue: Callable[[], None]) -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGUSR1 are noted, so that the step in progress ends and the state is saved.

    A second SIGINT interrupts at once. Other signals after the first change nothing. When the grace time after the
    first SIGTERM or SIGUSR1 is over, the process ends with exit code 75 whatever it is doing: what was committed stays.

    grace_s  seconds from the signal to the end of the process at the latest
    overdue  called just before that

    Writes:  the process's handlers, put back at the end.
    """
    stop = Stop()
    timers: list[threading.Timer] = []

    def end_now() -> None:
        try:
            overdue()
        finally:
            os._exit(EXIT_PREEMPTED)

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is None:
            stop.signal, stop.since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGINT and not timers:
            # a thread, because the main one may be deep inside a product of matrices
            timers.append(threading.Timer(grace_s, end_now))
            timers[0].daemon = True
            timers[0].start()

    with _handlers(note, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        try:
            yield stop
        finally:
            for timer in timers:
                timer.cancel()
                timer.join()


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the process at once with exit code 75: for the time when there is nothing to save yet.

    Writes:  the process's handlers, put back at the end.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_PREEMPTED)

    with _handlers(leave, signal.SIGTERM, signal.SIGUSR1):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """One handler for these signals, and what was there before put back at the end."""
    before: dict[signal.Signals, Callable[..., object] | int | None] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
