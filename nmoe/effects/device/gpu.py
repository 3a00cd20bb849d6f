"""The GPU, or the CPU in its place: which are supported, their peak, memory and clock."""

from __future__ import annotations

import itertools
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nmoe.config.sections import Memory
from nmoe.effects import files
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.cost.machines import PEAK_FLOPS

PLAIN_CAPABILITY = (8, 0)
"""Oldest compute capability of plain torch: that of `torch.nn.functional.grouped_mm`, which takes bf16 alone there."""


NO_GPU = 'run.device: expected a GPU that torch can use for "cuda", got none; write device = "cpu" or fix the driver'

REPLAY = "replay"
"""Name of the part that is a whole step in a CUDA graph."""

APART = "validation"
"""Name of the part that belongs to no step; so does what is within it."""

_PAUSE = ""
"""Name of the mark at which a part within another one begins."""


def check_count(count: int) -> None:
    """Raises: InputError for fewer GPUs than ranks of this host. They are counted by the driver, and none is opened."""
    found = torch.cuda.device_count()
    if not found:
        raise InputError(NO_GPU)
    if found < count:
        raise InputError(
            f"parallel.ranks: expected a GPU for each of the {count} ranks of this host, got {found}; start fewer, or "
            "look at CUDA_VISIBLE_DEVICES"
        )


def device(name: str, index: int = 0, count: int = 1, *, kernels: str = "triton") -> torch.device:
    """The device a config asks for.

    index    of the rank among those of this host, which are `count`: its GPU
    kernels  `run.kernels`: "torch" runs from `PLAIN_CAPABILITY` on

    Raises:  InputError when it is not there or not supported; nothing else is tried.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(NO_GPU)
    if count > 1:
        check_count(count)
    capability = torch.cuda.get_device_capability(index)
    if capability not in PEAK_FLOPS and not (kernels == "torch" and capability >= PLAIN_CAPABILITY):
        raise InputError(
            f"run.device: expected a GPU of a supported compute capability ({_known()}), got "
            f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name(index)}); use one of those, write "
            'run.kernels = "torch" from 8.0 on, which is slower, or run.device = "cpu"'
        )
    return torch.device("cuda", index)


def to_measure(verb: str, advice: str = "run it on a machine that has one") -> torch.device:
    """The GPU that a verb measures kernels on.

    verb    as it is written, such as "bench moe"
    advice  where there is none

    Raises:  InputError when there is none, or the kernels are not for it: such a verb has no device to choose.
    """
    if not torch.cuda.is_available():
        raise InputError(f"{verb}: expected a GPU that torch can use, got none; {advice}")
    if (capability := torch.cuda.get_device_capability()) not in PEAK_FLOPS:
        raise InputError(
            f"{verb}: expected a GPU of a supported compute capability ({_known()}), got "
            f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name()}); run it on one of those"
        )
    return torch.device("cuda", 0)


def _known() -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in PEAK_FLOPS)


def set_allocator(where: torch.device, memory: Memory, environ: Mapping[str, str]) -> None:
    """Set torch's allocator of the GPU as the config says; nothing on a CPU.

    environ  the variables through which torch would take settings that no config shows

    Writes:  the allocator's settings, which are the process's.
    Raises:  InputError where the environment sets them too.
    """
    if where.type == "cpu":
        return
    if environ:
        raise InputError(
            *(
                f"{name}: expected to be unset, because [memory] of the config sets the allocator, got {value!r}; "
                "unset it, and write memory.expandable_segments = true if it asks for that"
                for name, value in environ.items()
            )
        )
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{memory.expandable_segments}")  # pyright: ignore
    torch.cuda.set_per_process_memory_fraction(memory.fraction, where)


def peak_flops(where: torch.device, home: Path) -> float:
    """FLOP/s that count as 100 % MFU: the data sheet's for a GPU the kernels are for, a measured GEMM for all else.

    A CPU has no honest data sheet. Its GEMM is measured at each start, and the fastest that a machine, number of
    threads and version of torch have shown is kept: beside other work the same GEMM took twice as long, and MFU was
    twice too high.

    home    folder of what nmoe keeps
    Writes:  `home`/peak-flops.json, when this machine is new or has become faster.
    Raises:  InputError when that file holds something else.
    """
    if where.type == "cuda" and (capability := torch.cuda.get_device_capability(where)) in PEAK_FLOPS:
        return PEAK_FLOPS[capability]
    path, name = home / "peak-flops.json", f"{_hardware(where)}, torch {torch.__version__}"
    known, measured = _known_peaks(path), _measured_flops(where)
    if measured > known.get(name, 0):
        known = {**known, name: measured}
        try:
            home.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(known, indent=2) + "\n")
        except OSError as error:
            say(f"peak FLOP/s    measured for this start alone: {path} cannot be written, {error.strerror or error}")
    return known[name]


def _known_peaks(path: Path) -> dict[str, float]:
    """FLOP/s by machine, as they were measured before; none where nothing was."""
    if not files.is_file(path):
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(flops) for name, flops in known.items() if 0 < float(flops) < float("inf")}
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected FLOP/s by machine, got {type(error).__name__}: {error}; delete the file, it is measured "
            "again"
        ) from error


def _hardware(where: torch.device) -> str:
    """What a measurement is of: the GPU, or this host's CPU and the threads that torch uses."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{platform.node()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _measured_flops(where: torch.device) -> float:
    """FLOP/s of a GEMM in fp32 on a CPU, in bf16 on a GPU: the best of eight, about a fifth of a second."""
    on_gpu = where.type == "cuda"
    size = 8192 if on_gpu else 1024
    a = torch.ones(size, size, device=where, dtype=torch.bfloat16 if on_gpu else torch.float32)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        synchronize(where)
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
    `split`, so that marking never waits for the device. Marks inside a CUDA graph become a part of it: every replay
    records them anew, so that they tell of the last one.
    """

    def __init__(self, where: torch.device) -> None:
        self._cuda = where.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._in_graph: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, name: str) -> None:
        """End the part `name`. Writes: the list of marks."""
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        captured = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=captured)
        event.record()
        (self._in_graph if captured else self._marks).append((name, event))

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """What the block takes is the part `name`, and none of the part around it. Writes: the list of marks."""
        self.mark(_PAUSE)
        yield
        self.mark(name)

    def split(self) -> dict[str, float]:
        """Seconds of each part since the first mark, summed by name; starts anew at the last mark.

        Waits for the device. The part `REPLAY` is shared out as the marks in the graph divided its last replay.
        """
        if self._cuda:
            torch.cuda.synchronize()
        seconds, replay = _between(self._marks), _between(self._in_graph)
        if REPLAY in seconds and replay:
            share = seconds.pop(REPLAY) / sum(replay.values())
            seconds |= {name: seconds.get(name, 0.0) + share * passed for name, passed in replay.items()}
        del self._marks[:-1]
        return seconds


def _between(marks: Sequence[tuple[str, float | torch.cuda.Event]]) -> dict[str, float]:
    """Seconds from each mark to the next, summed by the name of the latter; a pause ends what the part around it has
    had by then."""
    seconds: dict[str, float] = {}
    around = _PAUSE
    for (before, begin), (name, end) in reversed(list(itertools.pairwise(marks))):
        if before != _PAUSE and name != _PAUSE:
            around = name
        if name == _PAUSE or around == APART:
            name = around
        if isinstance(begin, float) and isinstance(end, float):
            passed = end - begin
        else:
            passed = begin.elapsed_time(end) / 1000  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        seconds[name] = seconds.get(name, 0.0) + passed
    return seconds
