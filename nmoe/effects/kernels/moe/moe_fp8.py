"""The experts of one block in fp8, routed and shared ones each as one differentiable function; the weight gradients
stay in bf16.

Letters: N tokens, D hidden size, E experts, F expert width, S that of the shared ones; D, F, S are multiples of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.moe import combine as sums
from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import fp8
from nmoe.effects.kernels.moe.hopper import fp8_gemm, fp8_ring, fp8_up
from nmoe.effects.kernels.moe.moe import Tiles, down_weight_gradient, up_weight_gradient
from nmoe.pure.model.route import Routing

# The fastest of those measured on an H200 at its power limit (docs/log.md, 2026-11-29). With two accumulators 128 rows
# spill 95 instructions on sm_90.
UP = fp8.Tile(block_m=64, num_warps=8, num_stages=4)
DOWN = fp8.Tile(block_m=64, num_warps=4, num_stages=3)
BACKWARD = fp8.Tile(block_m=128, num_warps=8, num_stages=3)
"""Of both products of the backward pass, whose weights are quantised along what is summed."""


def product(
    t: Tiles, rows: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, count: Tensor, dtype: torch.dtype,
    *, across: bool,
) -> Tensor:  # fmt: skip
    """`fp8.grouped_gemm` by the kernel that is fastest on this GPU: the bits are the same."""
    pairs = rows.shape[0]
    if t.hopper:
        cut = places.tiles(count, pairs, fp8_ring.ROWS)
        return fp8_gemm.grouped_gemm(rows, scale, w, w_scale, end, cut, t.group, t.programs, dtype, across=across)
    tile = DOWN if across else BACKWARD
    cut = places.tiles(count, pairs, tile.block_m)
    return fp8.grouped_gemm(rows, scale, w, w_scale, end, cut, tile, t.group, dtype, across=across)


def activation(
    t: Tiles, x: Tensor, scale: Tensor, source: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, count: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fp8.gather_gemm_swiglu` by the kernel that is fastest on this GPU: the bits are the same."""
    pairs = source.shape[0]
    if t.hopper:
        cut = places.tiles(count, pairs, fp8_ring.ROWS)
        return fp8_up.gather_gemm_swiglu(x, scale, source, w, w_scale, end, cut, t.group, t.programs)
    cut = places.tiles(count, pairs, UP.block_m)
    return fp8.gather_gemm_swiglu(x, scale, source, w, w_scale, end, cut, UP, t.group, dtype)


class MoeExpertsFp8(torch.autograd.Function):
    """Keeps the input, the pre-activation and indices in bf16; weights are quantised again in the backward pass, where
    the codes of all layers would take a byte a parameter till then."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        t: Tiles,
        accumulator: Accumulator | None,
        *added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        with record_function("dispatch"):
            at = places.dispatch(expert, up.shape[0])
        with record_function("quantise"):
            x_codes, x_scale = fp8.quantise_rows(x)
            up_codes, up_scale = fp8.quantise_weight(up.flatten(2), across=True)
            down_codes, down_scale = fp8.quantise_weight(down, across=True)
        with record_function("experts"):
            h, a, a_scale = activation(t, x_codes, x_scale, at.source, up_codes, up_scale, at.end, at.count, x.dtype)
            y = product(t, a, a_scale, down_codes, down_scale, at.end, at.count, x.dtype, across=True)
        with record_function("combine"):
            out = sums.combine(y, at.place, weight, added)
        count = at.count.to(torch.int64)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, h, weight, up, down, at.source, at.slot, at.place, at.count, at.end)
        ctx.t, ctx.accumulator, ctx.added = t, accumulator, len(added)
        return out, count

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, h, weight, up, down, source, slot, place, count, end = ctx.saved_tensors
        t: Tiles = ctx.t
        accumulator: Accumulator | None = ctx.accumulator
        dy = outputs[0].contiguous()
        with record_function("quantise"):
            dy_codes, dy_scale = fp8.quantise_rows(dy)
            up_codes, up_scale = fp8.quantise_weight(up.flatten(2), across=False)
            down_codes, down_scale = fp8.quantise_weight(down, across=False)
        with record_function("experts"):
            gathered = fp8.gather_rows(dy_codes, dy_scale, source, end)
            a = product(t, *gathered, down_codes, down_scale, end, count, x.dtype, across=False)
            del gathered
            dh, dh_codes, dh_scale, part = fp8.swiglu_backward_(a, h, weight, slot, end)
            d_weight = part.sum(-1)[place.to(torch.int64)]
            rows = places.spread(dy, place)
            rest: dict[str, Any] = {"end": end, "count": count, "t": t, "accumulator": accumulator}
            d_down = down_weight_gradient(a, rows, parameter=down, **rest)
            del a, part, rows
            d_up = up_weight_gradient(x, dh.flatten(1), source, place, parameter=up, **rest)
            del dh
            dx = product(t, dh_codes, dh_scale, up_codes, up_scale, end, count, x.dtype, across=False)
        with record_function("dispatch"):
            d_input = sums.combine(dx, place, None)
        return d_input, None, d_weight, d_up, d_down, None, None, *[dy] * ctx.added


def moe_experts_fp8(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    *,
    tiles: Tiles,
    added: tuple[Tensor, ...] = (),
    accumulator: Accumulator | None = None,
) -> tuple[Tensor, Tensor]:
    """Routed experts with the recipe "fp8" of `pure.model.low_precision`; the rest as `moe.moe_experts`.

    tiles    of the weight gradients, and whether there are the kernels of `moe.hopper`
    """
    return MoeExpertsFp8.apply(  # pyright: ignore[reportReturnType]
        x, routing.expert, routing.weight, up, down, tiles, accumulator, *added
    )


class SharedExpertsFp8(torch.autograd.Function):
    """One expert that sees each token, with the kernels of the routed ones; keeps input and pre-activation in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, t: Tiles) -> Tensor:
        x = x.contiguous()
        every = torch.arange(len(x), dtype=torch.int32, device=x.device)
        end = every.new_full((1,), len(x))  # of the one expert, and how many rows it has
        with record_function("quantise"):
            x_codes, x_scale = fp8.quantise_rows(x)
            up_codes, up_scale = fp8.quantise_weight(up.flatten(1)[None], across=True)
            down_codes, down_scale = fp8.quantise_weight(down[None], across=True)
        h, a, a_scale = activation(t, x_codes, x_scale, every, up_codes, up_scale, end, end, x.dtype)
        y = product(t, a, a_scale, down_codes, down_scale, end, end, x.dtype, across=True)
        ctx.save_for_backward(x, h, up, down, every, end)
        ctx.t = t
        return y

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, h, up, down, every, end = ctx.saved_tensors
        t: Tiles = ctx.t
        dy = outputs[0].contiguous()
        with record_function("quantise"):
            dy_codes, dy_scale = fp8.quantise_rows(dy)
            up_codes, up_scale = fp8.quantise_weight(up.flatten(1)[None], across=False)
            down_codes, down_scale = fp8.quantise_weight(down[None], across=False)
        a = product(t, dy_codes, dy_scale, down_codes, down_scale, end, end, x.dtype, across=False)
        gate = torch.ones(len(x), device=x.device)
        dh, dh_codes, dh_scale, _ = fp8.swiglu_backward_(a, h, gate, every, end)
        d_down, d_up = a.mT @ dy, x.mT @ dh.flatten(1)
        dx = product(t, dh_codes, dh_scale, up_codes, up_scale, end, end, x.dtype, across=False)
        return dx, d_up.view_as(up), d_down, None


def shared_experts_fp8(
    x: Tensor, up: Tensor, down: Tensor, activate: Callable[[Tensor], Tensor], *, tiles: Tiles
) -> Tensor:
    """`pure.model.low_precision.shared_low` with the recipe "fp8", by kernels.

    x        [N D]
    up       [D 2 S]
    down     [S D]
    activate  SwiGLU; not called, the kernels compute it beside their products and keep nothing of it
    tiles    of the routed experts: whether there are the kernels of `moe.hopper`, and how many programs share the work
    returns  [N D] in the format of `x`
    """
    return SharedExpertsFp8.apply(x, up, down, tiles)  # pyright: ignore[reportReturnType]
