"""Products of one row with a matrix, by programs that ask for all their bytes at once.

D entries of the row · N columns · S parts of a sum

A generated token reads weights and computes next to nothing: a kernel lasts as long as its bytes and its latencies. A
program holds a block of the weight in registers, asked for before the kernel ahead has ended (`early`), and norms the
row anew: that is cheaper than a launch. Rows of a block that are not all there are leave parts of sums, which the next
kernel adds up in one order where it reads them.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.early import launched, release, wait


@attrs.frozen(kw_only=True)
class RowTile:
    """Block of a weight that one program holds in registers."""

    rows: int
    columns: int  # 64 of 16 bits are a line of the cache
    num_warps: int


TILE = RowTile(rows=512, columns=64, num_warps=8)
"""64 KB of a weight in bf16 a program; 2048 x 2112 are 132 programs, one a multiprocessor of an H200."""
NORMED = 128
"""Channels that one program norms, and multiplies with the router."""


@triton.jit
def summed(x, added, at, inside, step, PARTS: tl.constexpr):
    """Entries of a row: of `x`, where there is one, and of all parts that are added; in the order of the parts."""
    value = tl.zeros(at.shape, tl.float32)
    if x is not None:
        value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(added + part * step + at, mask=inside, other=0.0)
    return value


@triton.jit
def product_kernel(
    x, added, gain, weight, total, out, D, N, step, eps,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Part of the product of a row, normed where there is a gain, with some columns; the first program keeps it."""
    release(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < D)[:, None] & (column < N)[None, :]
    block = tl.load(weight + row.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0.0)
    dtype = weight.dtype.element_ty
    if gain is not None:
        factor = tl.load(gain + row, mask=row < D, other=0.0).to(tl.float32)
    wait(EARLY)
    # rounded where the products of several rows round
    value = summed(x, added, row, row < D, step, PARTS).to(dtype).to(tl.float32)
    if gain is not None:
        channel = tl.arange(0, WIDTH)
        whole = summed(x, added, channel, channel < D, step, PARTS).to(dtype)
        if total is not None:
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(total + channel, whole, mask=channel < D)
        square = whole.to(tl.float32)
        value *= tl.rsqrt(tl.sum(square * square, 0) / D + eps) * factor
        value = value.to(dtype).to(tl.float32)
    result = tl.sum(value[:, None] * block.to(tl.float32), 0)
    tl.store(out + tl.program_id(1) * N + column, result, mask=column < N)


@triton.jit
def norm_kernel(
    x, added, gain, router, total, normed, partial, D, E, eps,
    PARTS: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some channels of the row and of the normed row, and their part of the products with the router."""
    release(EARLY)
    row, expert, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EP), tl.arange(0, WIDTH)
    if router is not None:
        inside = (row < D)[:, None] & (expert < E)[None, :]
        block = tl.load(router + row[:, None] * E + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gain + row, mask=row < D, other=0.0).to(tl.float32)
    wait(EARLY)
    dtype = normed.dtype.element_ty
    value = summed(x, added, row, row < D, D, PARTS).to(dtype)
    whole = summed(x, added, channel, channel < D, D, PARTS).to(dtype).to(tl.float32)
    tl.store(total + row, value, mask=row < D)
    scaled = value.to(tl.float32) * tl.rsqrt(tl.sum(whole * whole, 0) / D + eps) * factor
    tl.store(normed + row, scaled.to(dtype), mask=row < D)
    if router is not None:
        logits = tl.sum(scaled.to(dtype).to(tl.float32)[:, None] * block, 0)
        tl.store(partial + tl.program_id(0) * E + expert, logits, mask=expert < E)


@triton.jit
def embed_kernel(token, embed, out, D, scale, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """The scaled embedding of one token; a token below 0, which ends the text, reads that of 0."""
    release(EARLY)
    wait(EARLY)
    channel = tl.arange(0, WIDTH)
    row = tl.maximum(tl.load(token), 0).to(tl.int64)
    value = tl.load(embed + row * D + channel, mask=channel < D, other=0.0).to(tl.float32) * scale
    tl.store(out + channel, value.to(out.dtype.element_ty), mask=channel < D)


def embedding(token: Tensor, embed: Tensor, scale: float) -> Tensor:
    """The first state of the row [D] of a token [1] i64, from `embed` [V D]."""
    out, width = embed.new_empty(embed.shape[1]), embed.shape[1]
    embed_kernel[(1,)](
        token, embed, out, width, scale, triton.next_power_of_2(width), **launched(embed), num_warps=8
    )  # fmt: skip
    return out


def product(
    x: Tensor | None,
    added: Tensor | None,
    weight: Tensor,
    gain: Tensor | None = None,
    eps: float = 0.0,
    *,
    keep: bool = False,
    tile: RowTile = TILE,
) -> tuple[Tensor, Tensor | None]:
    """A row times `weight`, as parts of a sum, and the row as it was summed where it is to be kept.

    x        [D] or None, added [S ...] f32 or None: the row is their sum; of `added` the first D columns
    weight   [D N]
    gain     [D]: the row is normed first
    returns  [S' N] f32, and [D] or None
    """
    width, columns = weight.shape
    splits = triton.cdiv(width, tile.rows)
    out = torch.empty(splits, columns, device=weight.device)
    total = weight.new_empty(width) if keep else None
    product_kernel[(triton.cdiv(columns, tile.columns), splits)](
        x, added, gain, weight, total, out, width, columns, 0 if added is None else added.stride(0), eps,
        0 if added is None else len(added), tile.rows, tile.columns, triton.next_power_of_2(width),
        **launched(weight), num_warps=tile.num_warps,
    )  # fmt: skip
    return out, total


def norm(x: Tensor, added: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The row that `x` [D] and `added` [S D] are together, and the same normed."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _norm(x, added, gain, None, total, normed, None, eps)
    return total, normed


def norm_and_route(
    x: Tensor, added: Tensor | None, gain: Tensor, router: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm`, and parts of the products of the normed row with `router` [D E] f32: [S' E] f32."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    logits = torch.empty(triton.cdiv(len(x), NORMED), router.shape[1], device=x.device)
    _norm(x, added, gain, router, total, normed, logits, eps)
    return total, normed, logits


def _norm(
    x: Tensor,
    added: Tensor | None,
    gain: Tensor,
    router: Tensor | None,
    total: Tensor,
    normed: Tensor,
    logits: Tensor | None,
    eps: float,
) -> None:
    """The launch."""
    width, experts = len(x), 0 if router is None else router.shape[1]
    norm_kernel[(triton.cdiv(width, NORMED),)](
        x, added, gain, router, total, normed, logits, width, experts, eps,
        0 if added is None else len(added), NORMED, triton.next_power_of_2(max(experts, 1)),
        triton.next_power_of_2(width), **launched(x), num_warps=8,
    )  # fmt: skip
