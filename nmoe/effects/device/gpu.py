"""The GPU, or the CPU in its place: which are supported, their peak, memory and clock."""

from __future__ import annotations

import resource
import sys
import time

import torch

from nmoe.errors import InputError
from nmoe.pure.cost.machines import PEAK_FLOPS


def device(name: str, index: int = 0, count: int = 1) -> torch.device:
    """The device a config asks for.

    index  of the rank among those of this host, which are `count`: its GPU

    Raises:  InputError when it is not there or not supported; nothing else is tried.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            'run.device: expected a GPU that torch can use for "cuda", got none; write device = "cpu" or fix the driver'
        )
    if 1 < count and torch.cuda.device_count() < count:
        raise InputError(
            f"parallel.ranks: expected a GPU for each of the {count} ranks of this host, got "
            f"{torch.cuda.device_count()}; start fewer, or look at CUDA_VISIBLE_DEVICES"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability not in PEAK_FLOPS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PEAK_FLOPS)
        raise InputError(
            f"run.device: expected a GPU of a supported compute capability ({known}), got "
            f'{capability[0]}.{capability[1]} ({torch.cuda.get_device_name(index)}); use one of those or device = "cpu"'
        )
    return torch.device("cuda", index)


def peak_flops(where: torch.device) -> float:
    """FLOP/s that count as 100 % MFU: the data sheet's for a GPU, a measured fp32 GEMM for a CPU.

    The CPU has no honest data sheet, so this multiplies two matrices for about a fifth of a second and takes the best.
    """
    if where.type == "cuda":
        return PEAK_FLOPS[torch.cuda.get_device_capability(where)]
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
    """Wait for everything the device was given."""
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
