"""Signals that end a run: what they ask for, and the exit code."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from nmoe.effects.parallel.launch import STOPPING, handling

EXIT_PREEMPTED = 75
"""Exit code of a preempted run, which can be resumed: EX_TEMPFAIL, on which schedulers can requeue it."""


class Stop:
    """The signal that asks the run to end, and when it came."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = math.inf  # monotonic seconds

    def hear(self, number: int) -> None:
        """Take the signal that the ranks agree on. Writes: which, and when if it is the first here."""
        if self.signal is None:
            self.since = time.monotonic()
        self.signal = signal.Signals(number)

    def exit_code(self) -> int:
        """Exit code: 0 without a signal; 130 for an interrupt, as a shell reports it; 75 for a preemption."""
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
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP are noted, so that the step in progress ends and the state is saved.

    A second SIGINT interrupts at once. Other signals after the first change nothing. When the grace time after the
    first of the others is over, the process ends with exit code 75 whatever it is doing: what was committed stays.

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
            # a thread, because the main one may be deep inside a GEMM
            timers.append(threading.Timer(grace_s, end_now))
            timers[0].daemon = True
            timers[0].start()

    with handling(note, signal.SIGINT, *STOPPING):
        try:
            yield stop
        finally:
            for timer in timers:
                timer.cancel()
                timer.join()


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP end the process with exit code 75: for the time when there is nothing to save yet.

    Writes:  the process's handlers, put back at the end.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_PREEMPTED)

    with handling(leave, *STOPPING):
        yield


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """The same without a clean-up: for the time of the imports, in which an exception may be swallowed."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(EXIT_PREEMPTED)

    with handling(leave, *STOPPING):
        yield
