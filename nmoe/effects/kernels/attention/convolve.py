"""The short convolutions of Kimi delta attention: `pure.model.attention.kda.convolve_heads`, bitwise repeatable.

Letters: b sequence, h one of the 3·H heads of queries, keys and values, C channels of a head, W taps.

Bound by memory: a block of tokens of one head is read once and its neighbours from the cache. Backward in two passes,
gradients of the sums before SiLU and of the taps, then of the input, as a token is reached by sums of later blocks.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order


@attrs.frozen(kw_only=True)
class ConvolveTile:
    """Block size and launch options."""

    tokens: int
    num_warps: int
    num_stages: int


TILE = ConvolveTile(tokens=64, num_warps=8, num_stages=1)


@triton.jit
def reaches(start, b, t, back, positions, documents: tl.constexpr):
    """Whether the sum of each token has a token `back` before it."""
    inside = (t >= back) & (t < positions)
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + t, mask=t < positions, other=0)
        inside = inside & (t - back >= first)
    return inside


@triton.jit
def summed(
    x, taps, start, b, t, row, channel, positions, width, count: tl.constexpr, channels: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Weighted sums [M C], x and taps those of a block."""
    total = row[:, None] * 0.0 + channel[None, :] * 0.0
    for back in tl.static_range(count):
        inside = reaches(start, b, t, back, positions, documents)
        value = tl.load(x + (row - back)[:, None] * width + channel[None, :], mask=inside[:, None], other=0.0)
        total += value.to(tl.float32) * tl.load(taps + (count - 1 - back) * width + channel).to(tl.float32)[None, :]
    return total


@triton.jit
def forward_kernel(
    x, taps, start, y, positions, width, count: tl.constexpr, tokens: tl.constexpr, channels: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """SiLU of a block's sums."""
    begin, b, h = tl.program_id(0) * tokens, tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, tokens)
    channel = tl.arange(0, channels)
    own = (b.to(tl.int64) * positions + begin) * width + h * channels
    x, y, taps = x + own, y + own, taps + h * channels
    total = summed(x, taps, start, b, begin + row, row, channel, positions, width, count, channels, documents)
    total = total / (1.0 + tl.exp(-total))
    at = row[:, None] * width + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(begin + row < positions)[:, None])


@triton.jit
def backward_kernel(
    x, taps, start, dq, dk, dv, dtotal, dtaps, positions, width, heads, count: tl.constexpr, tokens: tl.constexpr,
    channels: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradient of a block's sums, and its part [W C] of that of the taps."""
    begin, b, h = tl.program_id(0) * tokens, tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, tokens)
    channel = tl.arange(0, channels)
    t = begin + row
    first = b.to(tl.int64) * positions + begin
    own = first * width + h * channels
    x, dtotal, taps = x + own, dtotal + own, taps + h * channels
    dy_at = dq
    if h >= 2 * heads:
        dy_at = dv
    elif h >= heads:
        dy_at = dk
    dy_at += (first * heads + h % heads) * channels
    at = (row * heads * channels)[:, None] + channel[None, :]
    dy = tl.load(dy_at + at, mask=(t < positions)[:, None], other=0.0).to(tl.float32)
    total = summed(x, taps, start, b, t, row, channel, positions, width, count, channels, documents)
    share = 1.0 / (1.0 + tl.exp(-total))
    gradient = dy * share * (1.0 + total * (1.0 - share))
    at = row[:, None] * width + channel[None, :]
    tl.store(dtotal + at, gradient.to(dtotal.dtype.element_ty), mask=(t < positions)[:, None])
    dtaps += (tl.program_id(0) * tl.num_programs(1) + b).to(tl.int64) * count * width + h * channels
    for back in tl.static_range(count):
        inside = reaches(start, b, t, back, positions, documents)
        value = tl.load(x + (row - back)[:, None] * width + channel[None, :], mask=inside[:, None], other=0.0)
        tl.store(dtaps + (count - 1 - back) * width + channel, tl.sum(gradient * value.to(tl.float32), 0))


@triton.jit
def input_kernel(
    dtotal, taps, start, dx, positions, width, count: tl.constexpr, tokens: tl.constexpr, channels: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Gradient of a block's inputs from those of the sums that have them."""
    begin, b, h = tl.program_id(0) * tokens, tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, tokens)
    channel = tl.arange(0, channels)
    own = (b.to(tl.int64) * positions + begin) * width + h * channels
    dtotal, dx, taps = dtotal + own, dx + own, taps + h * channels
    gradient = row[:, None] * 0.0 + channel[None, :] * 0.0
    for back in tl.static_range(count):
        inside = reaches(start, b, begin + row + back, back, positions, documents)
        value = tl.load(dtotal + (row + back)[:, None] * width + channel[None, :], mask=inside[:, None], other=0.0)
        gradient += value.to(tl.float32) * tl.load(taps + (count - 1 - back) * width + channel).to(tl.float32)[None, :]
    at = row[:, None] * width + channel[None, :]
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=(begin + row < positions)[:, None])


def convolve_heads(
    x: Tensor,
    taps: Tensor,
    start: Tensor | tuple[()] = (),
    before: Tensor | tuple[()] = (),
    *,
    tile: ConvolveTile = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of a causal convolution of each channel of queries, keys and values, rounded once.

    x        [B T J]           J = 3·H·C; C a power of two
    taps     [3 H C W]         the last one weighs the token itself
    start    [B T] i32 or ()   no tap reaches before the first token of the document
    before   [B W-1 J] or ()   inputs before the row; (): zeros
    returns  three of [B T H C] in the format of `x`, views of one tensor
    Cost:    moves 4 bytes an element of x forward and 10 backward in bf16.
    """
    if not isinstance(before, Tensor):
        return Convolve.apply(x, taps, start, tile)
    earlier = before.shape[1]
    if isinstance(start, Tensor):
        start = F.pad(torch.where(start > 0, start + earlier, 0), (earlier, 0))
    q, k, v = Convolve.apply(torch.cat((before.to(x.dtype), x), 1), taps, start, tile)
    return q[:, earlier:], k[:, earlier:], v[:, earlier:]


class Convolve(torch.autograd.Function):
    """Kept are the input and the taps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, start: Tensor | tuple[()], tile: ConvolveTile
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        y = torch.empty_like(x)
        launch(forward_kernel, x, taps, start, tile, x=x, y=y)
        ctx.save_for_backward(x, taps, *((start,) if isinstance(start, Tensor) else ()))
        ctx.tile = tile
        q, k, v = y.unflatten(-1, taps.shape[:3]).unbind(2)
        return q, k, v

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, *starts = ctx.saved_tensors
        tile, start = ctx.tile, (*starts, ())[0]
        dq, dk, dv = (each.contiguous() for each in gradients)
        dtotal, dx = torch.empty_like(x), torch.empty_like(x)
        blocks = triton.cdiv(x.shape[1], tile.tokens) * x.shape[0]
        dtaps = torch.empty(blocks, taps.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
        outputs = {"dq": dq, "dk": dk, "dv": dv, "heads": taps.shape[1]}
        launch(backward_kernel, x, taps, start, tile, x=x, dtotal=dtotal, dtaps=dtaps, **outputs)
        launch(input_kernel, x, taps, start, tile, dtotal=dtotal, dx=dx)
        return dx, dtaps.sum(0).T.reshape(taps.shape).to(taps.dtype), None, None


def launch(kernel: Any, like: Tensor, taps: Tensor, start: Tensor | tuple[()], tile: ConvolveTile, **own: Any) -> None:
    """One program a block of tokens, sequence and head; taps are turned [W J], so that neighbours lie side by side."""
    _, heads, channels, count = taps.shape
    batch, positions, width = like.shape
    kernel[(triton.cdiv(positions, tile.tokens), batch, 3 * heads)](
        taps=taps.flatten(0, 2).T.contiguous(),
        start=start if isinstance(start, Tensor) else None,
        positions=positions,
        width=width,
        count=count,
        tokens=tile.tokens,
        channels=channels,
        documents=isinstance(start, Tensor),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **own,
    )
