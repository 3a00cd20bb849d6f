"""`pure.norm.rms_norm` and `pure.norm.add_rms_norm` on a GPU: one pass forward, one pass backward.

Only the reciprocal root mean square of a row is kept for the backward pass, besides what entered. The gradient of the
gain is summed in two stages whose order does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order


@attrs.frozen(kw_only=True)
class NormTile:
    """Block sizes and launch options."""

    block_m: int  # rows of a block
    programs: int  # most programs of the backward pass; each leaves one row of partial sums
    num_warps: int  # up to 2048 columns; wider rows get more
    num_stages: int


TILE = NormTile(block_m=1, programs=1024, num_warps=4, num_stages=1)


@triton.jit
def forward_kernel(
    x,  # [rows width], rows `x_stride` apart
    y,  # [rows width], rows `y_stride` apart; read when `adds`
    gain,  # [width]
    total,  # [rows width] contiguous; written when `adds`
    normed,  # [rows width] contiguous
    rstd,  # [rows] f32
    rows,
    width,
    x_stride,
    y_stride,
    eps,
    adds: tl.constexpr,
    m: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)
    column = tl.arange(0, block)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    here = row[:, None] * width + column[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if adds:
        value += tl.load(y + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    factor = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(normed + here, (value * scale[:, None] * factor[None, :]).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x,  # [rows width], rows `x_stride` apart: what was normed
    gain,  # [width]
    rstd,  # [rows] f32
    grad_output,  # [rows width] contiguous: gradient of the normed
    second,  # the same of a second reader, or None
    third,  # the same of a third reader, or None
    residual,  # [rows width] contiguous: gradient of the sum; read when `adds`
    gradient,  # [rows width] contiguous: of what was normed, the residual's included
    partial,  # [programs width] f32: sums for the gradient of the gain
    rows,
    width,
    x_stride,
    adds: tl.constexpr,
    m: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, block)
    factor = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    summed = tl.zeros((m, block), dtype=tl.float32)
    for start in range(program * m, rows, tl.num_programs(0) * m):
        row = start + tl.arange(0, m).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        here = row[:, None] * width + column[None, :]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        dy = tl.load(grad_output + here, mask=inside, other=0.0).to(tl.float32)
        if second is not None:
            dy += tl.load(second + here, mask=inside, other=0.0).to(tl.float32)
        if third is not None:
            dy += tl.load(third + here, mask=inside, other=0.0).to(tl.float32)
        summed += dy * unit
        dy *= factor
        along = tl.sum(dy * unit, 1)[:, None] / width
        result = (dy - unit * along) * scale
        if adds:
            result += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + here, result.to(gradient.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * width + column, tl.sum(summed, 0), mask=column < width)


def table(x: Tensor) -> Tensor:
    """`x` as rows over its last axis, copied only where its strides leave no other way."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def warps(width: int, tile: NormTile) -> int:
    """Warps of a block, so that a thread has as many columns of a wide row as of a narrow one."""
    return min(16, tile.num_warps * max(1, triton.next_power_of_2(width) // 2048))


def forward(x: Tensor, y: Tensor | None, gain: Tensor, eps: float, tile: NormTile) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, normed and reciprocal root mean square; the sum is `x` itself without `y`. All as tables."""
    rows, width = x.shape
    total = x if y is None else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    normed = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    forward_kernel[(triton.cdiv(rows, tile.block_m),)](
        x,
        x if y is None else y,
        gain,
        total,
        normed,
        rstd,
        rows,
        width,
        x.stride(0),
        x.stride(0) if y is None else y.stride(0),
        eps,
        adds=y is not None,
        m=tile.block_m,
        block=triton.next_power_of_2(width),
        num_warps=warps(width, tile),
        num_stages=tile.num_stages,
    )
    return total, normed, rstd


def backward(
    x: Tensor, gain: Tensor, rstd: Tensor, grad_outputs: Sequence[Tensor], residual: Tensor | None, tile: NormTile
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the gain, from those of up to three readers of the normed. All as tables."""
    grad_output, second, third = *grad_outputs, *[None] * (3 - len(grad_outputs))
    rows, width = x.shape
    gradient = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    programs = min(tile.programs, triton.cdiv(rows, tile.block_m))
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x,
        gain,
        rstd,
        grad_output,
        second,
        third,
        grad_output if residual is None else residual,
        gradient,
        partial,
        rows,
        width,
        x.stride(0),
        adds=residual is not None,
        m=tile.block_m,
        block=triton.next_power_of_2(width),
        num_warps=warps(width, tile),
        num_stages=tile.num_stages,
    )
    return gradient, partial.sum(0).to(gain.dtype)


class RmsNorm(torch.autograd.Function):
    """`rms_norm` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, tile: NormTile) -> Tensor:
        rows = table(x)
        _, normed, rstd = forward(rows, None, gain, eps, tile)
        ctx.save_for_backward(rows, gain, rstd)
        ctx.tile = tile
        return normed.view(x.shape)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, gain, rstd = ctx.saved_tensors
        gradient, gain_gradient = backward(rows, gain, rstd, [table(grad_output.contiguous())], None, ctx.tile)
        return gradient.view(grad_output.shape), gain_gradient, None, None


class AddRmsNorm(torch.autograd.Function):
    """`add_rms_norm` with its gradient; the same one for both summands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | tuple[()], gain: Tensor, eps: float, tile: NormTile, readers: int
    ) -> tuple[Tensor, ...]:
        ctx.adds = isinstance(y, Tensor)
        total, normed, rstd = forward(table(x), table(y) if isinstance(y, Tensor) else None, gain, eps, tile)
        ctx.save_for_backward(total, gain, rstd)
        ctx.tile = tile
        return total.view(x.shape), *(normed.view(x.shape) for _ in range(readers))

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, residual: Tensor, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        total, gain, rstd = ctx.saved_tensors
        flat, *read = (table(each.contiguous()) for each in (residual, *grad_outputs))
        gradient, gain_gradient = backward(total, gain, rstd, read, flat, ctx.tile)
        summand = gradient.view(residual.shape)
        return summand, summand if ctx.adds else None, gain_gradient, None, None, None


def rms_norm(x: Tensor, gain: Tensor, *, eps: float, tile: NormTile = TILE) -> Tensor:
    """`pure.norm.rms_norm`.

    x        [... D]   a slice of wider rows is read where it lies
    gain     [D]
    returns  [... D] contiguous, in the format of `x`; the arithmetic is fp32
    Cost:    moves 4·N·D bytes forward and 6·N·D backward in bf16, N rows.
    """
    return RmsNorm.apply(x, gain, eps, tile)


def add_rms_norm(
    x: Tensor, y: Tensor | tuple[()], gain: Tensor, *, eps: float, readers: int = 1, tile: NormTile = TILE
) -> tuple[Tensor, ...]:
    """`pure.norm.add_rms_norm`: the sum, rounded to the format of `x`, and that sum normed.

    x, y     [... D]; y may be (): the gradient of the stream is added where that of the norm is taken
    gain     [D]
    readers  of the normed, at most three: their gradients are added in fp32
    returns  the sum, and the normed for each reader; all [... D]
    Cost:    moves 8·N·D bytes forward and 8·N·D backward in bf16, N rows; 4·N·D forward where y is (), and 2·N·D more
             backward for each reader after the first.
    """
    return AddRmsNorm.apply(x, y, gain, eps, tile, readers)
