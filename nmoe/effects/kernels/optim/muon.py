"""`pure.optim.muon` on a whole parameter in its arena: one pass before the Newton-Schulz iterations and one after.

The pass before reads gradient and momentum, and writes the momentum, what is orthogonalised in the format of the
products, and its norm; the pass after writes the value. Matrices are not divided by their norms: the first iteration
multiplies by one over them. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.optim.master import load_master, store_master_
from nmoe.effects.kernels.optim.newton_schulz import PRODUCTS, Products, orthogonalize, padded
from nmoe.pure.optim.muon import RMS, SMALLEST_NORM, Matrices, Turn


@attrs.frozen(kw_only=True)
class MatrixTile:
    """Block size and launch options of a pass over matrices."""

    block_m: int  # rows
    block_n: int  # columns
    num_warps: int
    num_stages: int


TILE = MatrixTile(block_m=16, block_n=128, num_warps=4, num_stages=1)

PARTIALS = 1024
"""Sums of squares that a step of `scale_kernel` adds up."""


@triton.jit
def _place(first, inner, outer_step, inner_step, rows, columns, M: tl.constexpr, N: tl.constexpr):
    """Of this program: its matrix, that one's place, and rows and columns of its tile."""
    across = tl.cdiv(columns, N)
    tiles = tl.cdiv(rows, M) * across
    own = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    number = (first + own).to(tl.int64)
    start = number // inner * outer_step + number % inner * inner_step
    return own, start, tile // across * M + tl.arange(0, M), tile % across * N + tl.arange(0, N)


@triton.jit
def ahead_kernel(
    gradient,  # zero afterwards when `clear`
    momentum,
    out,  # [turn M N], rows `width` apart
    partial,  # [programs] f32: sum of squares of what is orthogonalised
    allowed,  # i8
    shrink,
    first,
    inner,
    outer_step,
    inner_step,
    row_step,
    column_step,
    rows,
    columns,
    width,
    beta: tl.constexpr,
    clear: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    own, start, row, column = _place(first, inner, outer_step, inner_step, rows, columns, M, N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start + row.to(tl.int64)[:, None] * row_step + column.to(tl.int64)[None, :] * column_step
    there = own.to(tl.int64) * rows * width + row[:, None] * width + column[None, :]
    ahead = tl.zeros((M, N), dtype=tl.float32)
    if tl.load(allowed) != 0:
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(shrink).to(tl.float32)
        old = tl.load(momentum + at, mask=inside, other=0.0).to(tl.float32)
        new = old + (1.0 - beta) * (g - old)
        ahead = new - (1.0 - beta) * (new - g)
        tl.store(momentum + at, new.to(momentum.dtype.element_ty), mask=inside)
        # A constant depends on no load: without the barrier one warp clears what another has not read.
        if clear:
            tl.debug_barrier()
    if clear:
        tl.store(gradient + at, tl.zeros((M, N), dtype=gradient.dtype.element_ty), mask=inside)
    tl.store(out + there, ahead.to(out.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(ahead * ahead, 1), 0))


@triton.jit(do_not_specialize=["programs"])
def scale_kernel(
    partial,  # [B programs] f32: sums of squares
    scale,  # [B] f32
    programs,  # of a matrix
    smallest: tl.constexpr,
    N: tl.constexpr,
):
    """One over the norm of a matrix. How torch orders a sum depends on how many there are."""
    own = tl.program_id(0)
    total = tl.zeros((N,), tl.float32)
    for first in range(0, programs, N):
        at = first + tl.arange(0, N)
        total += tl.load(partial + own.to(tl.int64) * programs + at, mask=at < programs, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    tl.store(scale + own, 1.0 / tl.maximum(norm, smallest))


@triton.jit
def value_kernel(
    value,  # f32, or the bits of bf16 when `has_remainder`
    remainder,  # i16; read and written when `has_remainder`
    direction,  # [turn M N], rows `width` apart
    partial,  # [programs] f32: sum of squares of the change
    allowed,  # i8
    lr,  # f64
    first,
    inner,
    outer_step,
    inner_step,
    row_step,
    column_step,
    rows,
    columns,
    width,
    length: tl.constexpr,
    decay: tl.constexpr,
    has_remainder: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    own, start, row, column = _place(first, inner, outer_step, inner_step, rows, columns, M, N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start + row.to(tl.int64)[:, None] * row_step + column.to(tl.int64)[None, :] * column_step
    there = own.to(tl.int64) * rows * width + row[:, None] * width + column[None, :]
    changed = tl.zeros((M, N), dtype=tl.float32)
    if tl.load(allowed) != 0:
        rate = tl.load(lr)
        kept = (1.0 - rate * decay).to(tl.float32)
        step = tl.load(direction + there, mask=inside, other=0.0).to(tl.float32) * length
        old = load_master(value, remainder, at, inside, has_remainder)
        new = old * kept - rate.to(tl.float32) * step
        changed = new - old
        store_master_(value, remainder, at, new, inside, has_remainder)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(changed * changed, 1), 0))


@torch.no_grad()
def muon_(
    value: Tensor,
    remainder: Tensor | None,
    buffer: Tensor,
    gradient: Tensor,
    *,
    allowed: Tensor,
    shrink: Tensor,
    updates: Tensor,
    lr: Tensor,
    momentum: float,
    decay: float,
    turns: Sequence[Turn],
    bf16: bool,
    clear: bool = True,
    tile: MatrixTile = TILE,
    products: Products = PRODUCTS,
) -> Tensor:
    """`pure.optim.muon` on parameters, where `allowed`; the norm of the change.

    What becomes of a matrix does not depend on those that are worked on with it.

    value      f32, or bf16 with its `remainder`; contiguous, as all that follow
    remainder  i16, or None
    buffer     f32 or bf16: the momentum
    gradient   f32 or bf16
    allowed    0-d bool   false: nothing but `gradient` changes, whatever the gradient holds
    shrink     0-d f32    factor on the gradient, from the clip
    updates    not needed
    lr         0-d f64
    turns      where the matrices of the parameters lie, and which of them are orthogonalised at once
    bf16       whether the Newton-Schulz products are in bf16; else in fp32, without tensor cores

    clear      whether `gradient` is to be zero afterwards; false where the next step stores it anew

    Writes:  value, remainder, buffer, gradient.
    Cost:    both passes together move 24 bytes an element for bf16 value and momentum and fp32 gradient, 28 with an
             fp32 momentum; 4 less where nothing is cleared. The products are `newton_schulz.orthogonalize`'s.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    bits = value if remainder is None else value.view(torch.int16)
    permit, changes = allowed.view(torch.int8), []
    for turn in turns:
        size = (turn[0][0].rows, turn[0][0].columns)
        tiles = triton.cdiv(size[0], tile.block_m) * triton.cdiv(size[1], tile.block_n)
        total = sum(count for _, _, count in turn)
        x = padded(total, *size, value, dtype)
        partial, changed = (torch.empty(total, tiles, device=value.device) for _ in range(2))
        scale = torch.empty(total, device=value.device)
        for part, at, count, where in _places(turn, x):
            ahead_kernel[(count * tiles,)](
                gradient[part.offset :], buffer[part.offset :], x[at:], partial[at:], permit, shrink, *where, momentum,
                clear, tile.block_m, tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        scale_kernel[(total,)](partial, scale, tiles, SMALLEST_NORM, PARTIALS)
        x = orthogonalize(x, scale, products)
        for part, at, count, where in _places(turn, x):
            high = bits[part.offset :]
            value_kernel[(count * tiles,)](
                high, high if remainder is None else remainder[part.offset :], x[at:], changed[at:], permit, lr, *where,
                RMS * max(size) ** 0.5, decay, remainder is not None, tile.block_m, tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        changes.append(changed.sum())
    return torch.stack(changes).sum().sqrt()


def _places(turn: Turn, x: Tensor) -> Iterator[tuple[Matrices, int, int, tuple[int, ...]]]:
    """Of each part of a turn: where it begins in `x`, how many matrices it has, and arguments of the passes."""
    at = 0
    for part, first, count in turn:
        steps = (*part.steps, part.row_step, part.column_step, part.rows, part.columns)
        yield part, at, count, (first, part.counts[1], *steps, x.stride(1))
        at += count
