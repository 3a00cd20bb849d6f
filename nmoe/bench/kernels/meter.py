"""What a measurement is made of: a clock, a watch on the memory, and what the machine can do at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nmoe.pure.core.key import Key

WARMUP, REPEATS = 3, 15

GEMM = 8192
"""Rows and columns of the product that the ceiling is measured with."""

PASSED = 1 << 30
"""Bytes of the pass, read and written, that memory's ceiling is measured with."""


@attrs.frozen(kw_only=True)
class Variant:
    """An implementation of an operation; all calls do the work anew."""

    name: str
    forward: Callable[[], object] | None  # None: it has no forward pass of its own
    both: Callable[[], object]  # forward and backward
    error: Callable[[], float] | None  # relative error against fp64; None: it returns nothing to compare
    replayed: bool = True  # from a CUDA graph, so that the host's time does not count; False: it waits for the device
    moved_bytes: float | None = None  # None: what the case says


@attrs.frozen(kw_only=True)
class Taken:
    """What one variant took."""

    forward_s: float | None
    both_s: float
    extra_bytes: int  # most memory held beyond what was there before
    error: float | None
    repeats: bool | None  # whether a second call made the same bits; None: not asked of what has no forward pass


@attrs.frozen(kw_only=True)
class Row:
    """One line of a table; one line of the JSONL."""

    what: str  # moe, precision, attention, loss, optimizer
    case: str
    variant: str
    forward_s: float | None
    both_s: float
    flop: float  # forward and backward; 0 where memory is the limit
    moved_bytes: float  # the least that forward and backward can read and write
    share: float  # of the measured ceiling: of products where there are FLOPs, of a copy elsewhere
    extra_bytes: int
    error: float | None
    repeats: bool | None  # whether a second call made the same bits
    ratio: float | None  # how many times as fast as `beside`
    beside: str | None


@attrs.frozen(kw_only=True)
class Meter:
    """How to measure on a device."""

    device: torch.device
    seconds: Callable[[Callable[[], object], bool], float]  # median of a call, replayed or not
    extra_bytes: Callable[[Callable[[], object]], int]
    flops: float  # FLOP/s of a large bf16 product
    bandwidth: float  # bytes/s of a pass that reads and writes as much


def gpu_meter(device: torch.device) -> Meter:
    """The meter of a GPU, with its ceilings measured."""
    a, b = (draw(device, GEMM, GEMM, name=name).detach() for name in "ab")
    flops = 2 * GEMM**3 / seconds(lambda: a @ b, replayed=True)
    source = draw(device, PASSED // 2, name="pass").detach()
    to = torch.empty_like(source)
    # not a copy: the driver's own copies reach two thirds of what a kernel does
    bandwidth = 2 * PASSED / seconds(lambda: torch.neg(source, out=to), replayed=True)
    return Meter(device=device, seconds=seconds, extra_bytes=extra_bytes, flops=flops, bandwidth=bandwidth)


def seconds(call: Callable[[], object], replayed: bool = True) -> float:
    """Median time of a call on the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    if replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    taken: list[float] = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)


def extra_bytes(call: Callable[[], object]) -> int:
    """Most memory of the GPU a call holds beyond what is held already."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - held


def measure(variant: Variant, meter: Meter) -> Taken:
    """Everything of one variant."""
    error = None if variant.error is None else variant.error()
    extra = meter.extra_bytes(variant.both)
    forward = None if variant.forward is None else meter.seconds(variant.forward, variant.replayed)
    both = meter.seconds(variant.both, variant.replayed)
    return Taken(
        forward_s=forward,
        both_s=both,
        extra_bytes=extra,
        error=error,
        repeats=None if forward is None else repeats(variant.both),
    )


def repeats(call: Callable[[], object]) -> bool:
    """Whether two calls return the same bits."""
    first, second = ([x for x in tree_leaves(call()) if isinstance(x, Tensor)] for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draw(device: torch.device, *shape: int, name: str, scale: float = 1.0) -> Tensor:
    """Random bf16 values; zeros would be multiplied faster."""
    generator = torch.Generator(device).manual_seed(Key(0).fold("bench", name).seed() % (1 << 62))
    # Triton's interpreter, where the tests run this, computes in fp32
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return (torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale).requires_grad_()


def relative_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of several results, each as a whole."""
    return max(((a.double() - t).norm() / t.norm()).item() for a, t in zip(results, truth, strict=True))
