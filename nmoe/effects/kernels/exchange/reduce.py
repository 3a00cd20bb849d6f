"""Reduce: the sum of what ranks have of one stretch, in fp32, in an order that is a function of their number alone.

W ranks · M elements
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements a program sums."""

WARPS = 8

LEVELS = 4
"""Most levels of ranks: 16 in pairs, as many as a host has GPUs."""


@triton.jit
def term(own, landed, stride, at, inside, rank, other: tl.constexpr):
    """What one rank has, in fp32."""
    if rank == other:
        return tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
    return tl.load(landed + other * stride + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_kernel(
    out,  # [M] f32
    own,  # [M]
    landed,  # [W M], rows `stride` apart; this rank's is not read
    size,
    stride,
    rank: tl.constexpr,
    A: tl.constexpr,  # ranks are summed in levels of A, B, C and D: neighbours first
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    sum_d = tl.zeros((block,), tl.float32)
    for d in tl.static_range(D):
        sum_c = tl.zeros((block,), tl.float32)
        for c in tl.static_range(C):
            sum_b = tl.zeros((block,), tl.float32)
            for b in tl.static_range(B):
                first = ((d * C + c) * B + b) * A
                sum_a = term(own, landed, stride, at, inside, rank, first)
                for a in tl.static_range(1, A):
                    sum_a += term(own, landed, stride, at, inside, rank, first + a)
                sum_b = sum_a if b == 0 else sum_b + sum_a
            sum_c = sum_b if c == 0 else sum_c + sum_b
        sum_d = sum_c if d == 0 else sum_d + sum_c
    tl.store(out + at, sum_d, mask=inside)


def sum_(out: Tensor, own: Tensor, landed: Tensor, rank: int, levels: Sequence[int]) -> None:
    """Sum what ranks have, neighbours first.

    out     [M] f32; may be `own`
    own     [M] f32 or bf16, of this rank
    landed  [W ...] in the format of `own`, of the others; the first M of a row are read
    levels  ranks that are summed at each level; their product is W

    Writes:  out.
    Cost:    moves 4 M + W M itemsize bytes.
    Raises:  ValueError for more than `LEVELS` levels.
    """
    if len(levels) > LEVELS:
        raise ValueError(f'sum_: expected at most {LEVELS} levels, got {len(levels)}; set run.kernels = "torch"')
    size, rest = own.numel(), (1,) * (LEVELS - len(levels))
    sum_kernel[(triton.cdiv(size, BLOCK),)](
        out, own, landed, size, landed.stride(0), rank, *levels, *rest, block=BLOCK, num_warps=WARPS
    )
