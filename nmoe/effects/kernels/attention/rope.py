"""Rotary position embedding where a projection left its channels, without a copy."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order
from nmoe.pure.model.rope import Rope


@attrs.frozen(kw_only=True)
class RopeTile:
    """Block size and launch options."""

    block_m: int  # tokens of one head a program
    num_warps: int
    num_stages: int


TILE = RopeTile(block_m=16, num_warps=4, num_stages=1)
"""Rotation of 8 x 4096 x 16 heads in place: 0.051 ms on an H200, 2.8 TB/s, docs/log.md, 2026-11-24."""


def rotate_mla_(
    q: Tensor, k_rope: Tensor, rope: Rope, positions: Tensor | tuple[()] = (), *, tile: RopeTile = TILE
) -> tuple[Tensor, Tensor]:
    """`rotate_mla` on the memory of `q`; gradients get memory of their own, as a hook may hold those that arrive.

    q          [B T H C]       neighbouring pairs of its last P channels are rotated
    k_rope     [B T P]         all its channels are rotated, into new memory: others keep what lies beside it
    positions  [B T] i32, i64  of each token, within the table; (): 0..T-1
    returns    q [B T H C], the same memory; k_rope [B T P]

    Writes:    q, after which the value it had is gone.
    """
    return RotateMla.apply(q, k_rope, rope.cos, rope.sin, positions, tile)


class RotateMla(torch.autograd.Function):
    """Rotates forward by the angle, backward by its opposite; nothing but the table is kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | tuple[()], tile: RopeTile
    ) -> tuple[Tensor, Tensor]:
        """Rotated q and k_rope."""
        ctx.save_for_backward(cos, sin, *((positions,) if isinstance(positions, Tensor) else ()))
        ctx.tile = tile
        rotated = torch.empty(k_rope.shape, dtype=k_rope.dtype, device=k_rope.device)
        part = q[..., q.shape[-1] - k_rope.shape[-1] :]
        rotate_(part, part, cos, sin, positions, tile, inverse=False)
        rotate_(rotated[:, :, None], k_rope[:, :, None], cos, sin, positions, tile, inverse=False)
        return q, rotated

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q and k_rope."""
        cos, sin, *positions = ctx.saved_tensors
        given = (*positions, ())[0]
        dq, dk = gradients
        nope = dq.shape[-1] - dk.shape[-1]
        turned_q = torch.empty(dq.shape, dtype=dq.dtype, device=dq.device)
        turned_k = torch.empty(dk.shape, dtype=dk.dtype, device=dk.device)
        turned_q[..., :nope] = dq[..., :nope]
        rotate_(turned_q[..., nope:], dq[..., nope:], cos, sin, given, ctx.tile, inverse=True)
        rotate_(turned_k[:, :, None], dk[:, :, None], cos, sin, given, ctx.tile, inverse=True)
        return turned_q, turned_k, None, None, None, None


def rotate_heads_(
    heads: Tensor, rope: Rope, positions: Tensor | tuple[()] = (), *, num_heads: int, tile: RopeTile = TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a fused projection with their position, on its memory; values as they are.

    heads      [B T J C]       `num_heads` heads of queries, then as many of keys as of values
    positions  [B T] i32, i64  of each token, within the table; (): 0..T-1
    returns    q [B T H C], k and v [B T K C], views of `heads`

    Writes:    heads, after which the value it had is gone; its gradient is one tensor, made in one pass.
    """
    return RotateHeads.apply(heads, rope.cos, rope.sin, positions, num_heads, tile)


class RotateHeads(torch.autograd.Function):
    """Rotates queries and keys forward by the angle, backward by its opposite; nothing but the table is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | tuple[()],
        num_heads: int,
        tile: RopeTile,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Views of rotated queries and keys, and of values."""
        ctx.save_for_backward(cos, sin, *((positions,) if isinstance(positions, Tensor) else ()))
        ctx.tile = tile
        groups = (heads.shape[2] - num_heads) // 2
        rotated = heads[:, :, : num_heads + groups]
        rotate_(rotated, rotated, cos, sin, positions, tile, inverse=False)
        return tuple(heads.split((num_heads, groups, groups), dim=2))

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the heads."""
        cos, sin, *positions = ctx.saved_tensors
        given = (*positions, ())[0]
        dq, dk, dv = gradients
        sizes = [tensor.shape[2] for tensor in gradients]
        turned = torch.empty((*dq.shape[:2], sum(sizes), dq.shape[3]), dtype=dq.dtype, device=dq.device)
        to_q, to_k, to_v = turned.split(sizes, dim=2)
        rotate_(to_q, dq, cos, sin, given, ctx.tile, inverse=True)
        rotate_(to_k, dk, cos, sin, given, ctx.tile, inverse=True)
        to_v.copy_(dv)
        return turned, None, None, None, None, None


def rotate_(
    y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | tuple[()], tile: RopeTile, *, inverse: bool
) -> None:
    """Channel pairs of x [B T H P] rotated by the angle of their position, or inverse by it.

    Writes:  y, which may be x.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()  # the gradient of a sum is one number, expanded
    batch, length, heads, channels = x.shape
    rotate_kernel[(triton.cdiv(batch * length, tile.block_m), heads)](
        y,
        x,
        cos,
        sin,
        positions if isinstance(positions, Tensor) else None,
        batch * length,
        length,
        *(step for tensor in (y, x) for step in tensor.stride()[:3]),
        channels,
        block_m=tile.block_m,
        width=triton.next_power_of_2(channels),
        inverse=inverse,
        placed=isinstance(positions, Tensor),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def rotate_kernel(
    y,
    x,
    cos,
    sin,
    positions,
    tokens,
    length,
    y_batch,
    y_position,
    y_head,
    x_batch,
    x_position,
    x_head,
    channels: tl.constexpr,
    block_m: tl.constexpr,
    width: tl.constexpr,
    inverse: tl.constexpr,
    placed: tl.constexpr,
):
    """One head of `block_m` tokens; channels are next to each other, as in the table."""
    token = tl.program_id(0) * block_m + tl.arange(0, block_m)
    head = tl.program_id(1).to(tl.int64)
    inside = token < tokens
    b = (token // length).to(tl.int64)
    t = token % length
    at = t
    if placed:
        at = tl.load(positions + token, mask=inside, other=0)
    pair = tl.arange(0, width // 2)
    entry = at.to(tl.int64)[:, None] * (channels // 2) + pair[None, :]
    within = inside[:, None] & (pair < channels // 2)[None, :]
    c = tl.load(cos + entry, mask=within, other=0.0)
    s = tl.load(sin + entry, mask=within, other=0.0)
    if inverse:
        s = -s
    channel = tl.arange(0, width)
    within = inside[:, None] & (channel < channels)[None, :]
    row = x + b * x_batch + t * x_position.to(tl.int64) + head * x_head
    pairs = tl.load(row[:, None] + channel[None, :], mask=within, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(pairs, (block_m, width // 2, 2)))
    rotated = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (block_m, width))
    row = y + b * y_batch + t * y_position.to(tl.int64) + head * y_head
    tl.store(row[:, None] + channel[None, :], rotated.to(y.dtype.element_ty), mask=within)
