"""The routed experts of one block as one differentiable function: dispatch, grouped GEMMs, combine.

Letters: N tokens, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.moe import combine as sums
from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import experts, persistent
from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.model.route import Routing


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of each grouped GEMM of the experts."""

    up: GemmTile
    down: GemmTile
    activation: GemmTile
    down_gradient: GemmTile
    input: GemmTile
    up_gradient: GemmTile
    gathered: GemmTile | None = None  # of the gradient of `up` that gathers its tokens; None: rows are brought together
    group: int  # row tiles next to each other in the order of work
    programs: int  # multiprocessors of the device

    def rows(self) -> set[int]:
        """How many rows of an expert the tiles of its products have."""
        return {tile.block_m for tile in (self.up, self.down, self.activation, self.input)}


class MoeExperts(torch.autograd.Function):
    """Keeps the input, the pre-activation and indices; the activation is recomputed, no row's output is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        bias: Tensor | tuple[()],
        limit: float | None,
        alpha: float,
        t: Tiles,
        accumulator: Accumulator | None,
        *added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        pairs, form = expert.numel(), experts.Form(bias=bias, limit=limit, alpha=alpha)
        with record_function("dispatch"):
            at = places.dispatch(expert, up.shape[0])
            # of each number of rows once, 3 us a launch
            cuts = {m: places.tiles(at.count, pairs, m) for m in t.rows()}
        with record_function("experts"):
            h, a = experts.gather_gemm_swiglu(x, at.source, up, at.end, cuts[t.up.block_m], t.up, t.group, form)
            cut = cuts[t.down.block_m]
            y = persistent.grouped_gemm(a, down, at.end, cut, t.down, t.group, t.programs, transposed=False)
        with record_function("combine"):
            out = sums.combine(y, at.place, weight, added)
        count = at.count.to(torch.int64)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, h, weight, up, down, at.source, at.slot, at.place, at.count, at.end)
        ctx.t, ctx.accumulator, ctx.form, ctx.cuts, ctx.added = t, accumulator, form, cuts, len(added)
        return out, count

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, h, weight, up, down, source, slot, place, count, end = ctx.saved_tensors
        t: Tiles = ctx.t
        form: experts.Form = ctx.form
        accumulator: Accumulator | None = ctx.accumulator
        with record_function("combine"):
            rows = places.spread(outputs[0].contiguous(), place)
        with record_function("experts"):
            cut = ctx.cuts[t.activation.block_m]
            dh, a, part = experts.swiglu_backward_gemm(
                rows, slot, weight, down, h, end, cut, t.activation, t.group, t.programs, form
            )
            dh = dh.flatten(1)
            d_bias = form.gradient(dh, end, count)
            d_weight = part.sum(-1)[place.to(torch.int64)]
            d_down = experts.weight_gradient(
                a, rows, end, count, t.down_gradient, t.group, parameter=down, accumulator=accumulator
            )
            del a, part, rows
            rows = places.spread(x, place) if t.gathered is None else x
            d_up = experts.weight_gradient(
                *(rows, dh, end, count, t.gathered or t.up_gradient, t.group),
                parameter=up,
                accumulator=accumulator,
                source=None if t.gathered is None else source,
            )
            del rows
            cut = ctx.cuts[t.input.block_m]
            dx = persistent.grouped_gemm(dh, up.flatten(2), end, cut, t.input, t.group, t.programs, transposed=True)
        with record_function("dispatch"):
            d_input = sums.combine(dx, place, None)
        return d_input, None, d_weight, d_up, d_down, d_bias, *[None] * 4, *[outputs[0]] * ctx.added


def moe_experts(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    tiles: Tiles,
    added: tuple[Tensor, ...] = (),
    accumulator: Accumulator | None = None,
    limit: float | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Routed experts, as `pure.model.experts`: the weighted sum of the chosen experts' outputs, and each expert's rows.

    x        [N D]
    up       [E D 2 F]
    down     [E F D]
    bias     [E 2 F] or ()   added before the activation
    added    each [N D]   added to the result before it is rounded
    accumulator  takes the gradients of `up` and `down` that it has buffers for
    limit, alpha  of `pure.model.experts.activation`
    returns  [N D] in the format of `x`, [E] i64
    """
    return MoeExperts.apply(  # pyright: ignore[reportReturnType]
        x, routing.expert, routing.weight, up, down, bias, limit, alpha, tiles, accumulator, *added
    )
