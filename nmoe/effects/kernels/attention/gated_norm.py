"""The head norm under its gate: `pure.model.attention.kda.gated_norm`, one pass forward and one backward.

Letters: N tokens times heads, M of them a block, C channels of a head. Only the inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order


@attrs.frozen(kw_only=True)
class GatedNormTile:
    """Block size and launch options."""

    rows: int
    num_warps: int
    num_stages: int


TILE = GatedNormTile(rows=32, num_warps=4, num_stages=1)


@triton.jit
def loaded(x, gate, gain, at, inside, eps, channels: tl.constexpr):
    """Rows of length root C, what they were multiplied by, gates after their sigmoid, and gains."""
    rows = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(rows * rows, 1) / channels + eps)
    share = 1.0 / (1.0 + tl.exp(-tl.load(gate + at, mask=inside[:, None], other=0.0).to(tl.float32)))
    return rows * factor[:, None], factor, share, tl.load(gain + tl.arange(0, channels)).to(tl.float32)


@triton.jit
def forward_kernel(x, gate, gain, y, number, eps, rows: tl.constexpr, channels: tl.constexpr):
    """Gated rows of a block."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    inside = row < number
    at = row[:, None] * channels + tl.arange(0, channels)[None, :]
    normed, _, share, gains = loaded(x, gate, gain, at, inside, eps, channels)
    tl.store(y + at, (normed * gains[None, :] * share).to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit
def backward_kernel(
    x, gate, gain, dy, dx, dgate, dgain, number, eps, rows: tl.constexpr, channels: tl.constexpr
):  # fmt: skip
    """Gradients of a block's rows and gates, and its part of that of the gains."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    inside = row < number
    channel = tl.arange(0, channels)
    at = row[:, None] * channels + channel[None, :]
    normed, factor, share, gains = loaded(x, gate, gain, at, inside, eps, channels)
    grad = tl.load(dy + at, mask=inside[:, None], other=0.0).to(tl.float32) * share
    tl.store(dgain + tl.program_id(0).to(tl.int64) * channels + channel, tl.sum(grad * normed, 0))
    grad *= gains[None, :]
    tl.store(dgate + at, (grad * normed * (1.0 - share)).to(dgate.dtype.element_ty), mask=inside[:, None])
    off = tl.sum(grad * normed, 1) / channels
    tl.store(dx + at, (factor[:, None] * (grad - normed * off[:, None])).to(dx.dtype.element_ty), mask=inside[:, None])


def gated_norm(
    x: Tensor, gain: Tensor, gate: Tensor, *, norm: Callable[..., Tensor], eps: float, tile: GatedNormTile = TILE
) -> Tensor:
    """RMS norm over the last axis times the sigmoid of a gate, rounded once.

    x        [... C]
    gain     [C]
    gate     [... C]
    norm     of the model; this one has its own
    returns  [... C] in the format of `gate`
    Cost:    moves 6 bytes an element forward and 10 backward in bf16.
    """
    return GatedNorm.apply(x, gain, gate, eps, tile)


class GatedNorm(torch.autograd.Function):
    """Kept are the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, gate: Tensor, eps: float, tile: GatedNormTile) -> Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        y = torch.empty_like(gate)
        launch(forward_kernel, x, tile, eps, gate=gate, gain=gain, y=y)
        ctx.save_for_backward(x, gain, gate)
        ctx.eps, ctx.tile = eps, tile
        return y

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, gain, gate = ctx.saved_tensors
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        blocks = triton.cdiv(x.numel() // x.shape[-1], ctx.tile.rows)
        dgain = torch.empty(blocks, x.shape[-1], dtype=torch.float32, device=x.device)
        own = {"dy": dy.contiguous(), "dx": dx, "dgate": dgate, "dgain": dgain}
        launch(backward_kernel, x, ctx.tile, ctx.eps, gate=gate, gain=gain, **own)
        return dx, dgain.sum(0).to(gain.dtype), dgate, None, None


def launch(kernel: Any, x: Tensor, tile: GatedNormTile, eps: float, **own: Tensor) -> None:
    """One program a block of rows."""
    number, channels = x.numel() // x.shape[-1], x.shape[-1]
    kernel[(triton.cdiv(number, tile.rows),)](
        x=x,
        number=number,
        eps=eps,
        rows=tile.rows,
        channels=channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **own,
    )
