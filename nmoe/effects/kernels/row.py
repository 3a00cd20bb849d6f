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
"""Channels that one program adds up, and multiplies with the router."""


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
def inverse_rms(squares, width, eps, PARTS: tl.constexpr):
    """What a row of `width` channels is to be multiplied with, from the parts of its sum of squares."""
    total = 0.0
    for part in tl.static_range(PARTS):
        total += tl.load(squares + part)
    return tl.rsqrt(total / width + eps)


@triton.jit
def product_kernel(
    x, added, before, gain, weight, total, out, squares, D, N, step, width, eps,
    PARTS: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Part of the product of a row, times its gain, with some columns; the first column's programs keep the row.

    A norm's factor is one number, which those who read the product multiply it with: nobody waits for a whole row.
    """
    release(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < D)[:, None] & (column < N)[None, :]
    block = tl.load(weight + row.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0.0)
    dtype = weight.dtype.element_ty
    if gain is not None:
        factor = tl.load(gain + row, mask=row < D, other=0.0).to(tl.float32)
    wait(EARLY)
    value = summed(x, added, row, row < D, step, PARTS)
    if before is not None:
        value *= inverse_rms(before, width, eps, BEFORE)
    # rounded where the products of several rows round
    value = value.to(dtype).to(tl.float32)
    if gain is not None:
        if tl.program_id(0) == 0:
            tl.store(squares + tl.program_id(1), tl.sum(value * value, 0))
            if total is not None:
                tl.store(total + row, value.to(dtype), mask=row < D)
        value *= factor
    result = tl.sum(value[:, None] * block.to(tl.float32), 0)
    tl.store(out + tl.program_id(1) * N + column, result, mask=column < N)


@triton.jit
def route_kernel(
    x, added, gain, router, total, scaled, squares, partial, D, E,
    PARTS: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some channels of the row and of the row times its gain, and their part of the products with the router."""
    release(EARLY)
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EP)
    if router is not None:
        inside = (row < D)[:, None] & (expert < E)[None, :]
        block = tl.load(router + row[:, None] * E + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gain + row, mask=row < D, other=0.0).to(tl.float32)
    wait(EARLY)
    dtype = total.dtype.element_ty
    value = summed(x, added, row, row < D, D, PARTS).to(dtype)
    tl.store(total + row, value, mask=row < D)
    value = value.to(tl.float32)
    tl.store(squares + tl.program_id(0), tl.sum(value * value, 0))
    value *= factor
    tl.store(scaled + row, value, mask=row < D)
    if router is not None:
        logits = tl.sum(value[:, None] * block, 0)
        tl.store(partial + tl.program_id(0) * E + expert, logits, mask=expert < E)


@triton.jit
def norm_kernel(
    x, added, gain, normed, D, eps, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
):
    """Some channels of the normed row."""
    release(EARLY)
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    factor = tl.load(gain + row, mask=row < D, other=0.0).to(tl.float32)
    wait(EARLY)
    dtype = normed.dtype.element_ty
    value = summed(x, added, row, row < D, D, PARTS).to(dtype).to(tl.float32)
    whole = summed(x, added, channel, channel < D, D, PARTS).to(dtype).to(tl.float32)
    value *= tl.rsqrt(tl.sum(whole * whole, 0) / D + eps) * factor
    tl.store(normed + row, value.to(dtype), mask=row < D)


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


@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """A row as a sum of parts, times a factor that follows from parts of a sum of squares where there are any."""

    parts: Tensor  # [S ...] f32
    squares: Tensor | None = None  # [S'] f32
    width: int = 1  # channels whose mean square it is


def product(
    x: Tensor | None,
    added: Parts | None,
    weight: Tensor,
    gain: Tensor | None = None,
    eps: float = 0.0,
    *,
    keep: bool = False,
    tile: RowTile = TILE,
) -> tuple[Parts, Tensor | None]:
    """A row times `weight`, and the row as it was summed where it is to be kept.

    x        [D] or None, added [S ...] or None: the row is their sum; of `added` the first D columns
    weight   [D N]
    gain     [D]: the row is normed first, with `eps`; that of `added` is the same
    returns  [S' N], and [D] or None
    """
    width, columns = weight.shape
    splits = triton.cdiv(width, tile.rows)
    out = torch.empty(splits, columns, device=weight.device)
    total = weight.new_empty(width) if keep else None
    squares = None if gain is None else torch.empty(splits, device=weight.device)
    parts, before = (None, None) if added is None else (added.parts, added.squares)
    product_kernel[(triton.cdiv(columns, tile.columns), splits)](
        x, parts, before, gain, weight, total, out, squares,
        width, columns, 0 if parts is None else parts.stride(0), 1 if added is None else added.width, eps,
        0 if parts is None else len(parts), 0 if before is None else len(before), tile.rows, tile.columns,
        **launched(weight), num_warps=tile.num_warps,
    )  # fmt: skip
    return Parts(parts=out, squares=squares, width=width), total


def scale(x: Tensor, added: Tensor, gain: Tensor) -> tuple[Tensor, Parts]:
    """The row that `x` [D] and `added` [S D] are together, and the same times its gain [1 D].

    The factor of the norm is left to who reads it.
    """
    return _route(x, added, gain, None, None)


def route(x: Tensor, added: Tensor, gain: Tensor, router: Tensor) -> tuple[Tensor, Parts, Tensor]:
    """`scale`, and parts of the products of the row times its gain with `router` [D E] f32: [S' E] f32."""
    logits = torch.empty(triton.cdiv(len(x), NORMED), router.shape[1], device=x.device)
    return (*_route(x, added, gain, router, logits), logits)


def _route(
    x: Tensor, added: Tensor, gain: Tensor, router: Tensor | None, logits: Tensor | None
) -> tuple[Tensor, Parts]:
    """The launch."""
    width, experts, programs = len(x), 0 if router is None else router.shape[1], triton.cdiv(len(x), NORMED)
    total, scaled = torch.empty_like(x), torch.empty(1, width, device=x.device)
    squares = torch.empty(programs, device=x.device)
    route_kernel[(programs,)](
        x, added, gain, router, total, scaled, squares, logits, width, experts,
        len(added), NORMED, triton.next_power_of_2(max(experts, 1)), **launched(x), num_warps=8,
    )  # fmt: skip
    return total, Parts(parts=scaled, squares=squares, width=width)


def norm(x: Tensor, added: Tensor | None, gain: Tensor, eps: float) -> Tensor:
    """The row that `x` [D] and `added` [S D], if there is one, are together, normed [D]."""
    normed = torch.empty_like(x)
    norm_kernel[(triton.cdiv(len(x), NORMED),)](
        x, added, gain, normed, len(x), eps, 0 if added is None else len(added), NORMED, triton.next_power_of_2(len(x)),
        **launched(x), num_warps=8,
    )  # fmt: skip
    return normed
