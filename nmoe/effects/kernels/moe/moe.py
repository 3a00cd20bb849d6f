"""The routed experts of one block as one differentiable function: dispatch, grouped GEMMs, combine.

Letters: N tokens, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper import activation, gradient
from nmoe.effects.kernels.moe.hopper import up as up_projection
from nmoe.effects.kernels.moe.hopper.tiles import ROWS
from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.model.route import Routing

MANY = 1024
"""Rows of an expert, in the mean, from which on a weight gradient that gathers nothing is faster without Hopper's
kernel: 0.63 of the time with 192 rows, 1.03 to 1.29 with 3,072 and more; none between was measured."""

LONG = 2048
"""Hidden size from which on the activation's gradient is faster by Hopper's kernel: 0.92 to 0.96 of the time at 2,048
and 7,168, 1.01 at 768, whose products are shorter than the epilogue beside them; none between was measured."""


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
    hopper: bool = False  # whether there are the kernels of `moe.hopper`: sm_90, and bf16

    def rows(self, form: experts.Form) -> set[int]:
        """How many rows of an expert the tiles of its products have."""
        own = ROWS if self.specialized(form) else self.up.block_m
        return {own, self.down.block_m, self.activation.block_m, self.input.block_m}

    def specialized(self, form: experts.Form) -> bool:
        """Whether the up-projection is that of `moe.hopper`."""
        return self.hopper and form.plain

    def in_turns(self, form: experts.Form, hidden: int) -> bool:
        """Whether the activation's gradient is that of `moe.hopper`."""
        return self.specialized(form) and hidden >= LONG


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
            cuts = {m: places.tiles(at.count, pairs, m) for m in t.rows(form)}
        with record_function("experts"):
            if t.specialized(form):
                cut = cuts[ROWS]
                h, a = up_projection.gather_gemm_swiglu(x, at.source, up, at.end, cut, t.group, t.programs)
            else:
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
            dh, a, part = activation_gradient(
                rows, slot, weight, down, h, end, ctx.cuts.__getitem__, t, form, t.programs
            )
            dh = dh.flatten(1)
            d_bias = form.gradient(dh, end, count)
            d_weight = part.sum(-1)[place.to(torch.int64)]
            rest: dict[str, Any] = {"end": end, "count": count, "t": t, "accumulator": accumulator}
            d_down = down_weight_gradient(a, rows, parameter=down, **rest)
            del a, part, rows
            d_up = up_weight_gradient(x, dh, source, place, parameter=up, **rest)
            cut = ctx.cuts[t.input.block_m]
            dx = persistent.grouped_gemm(dh, up.flatten(2), end, cut, t.input, t.group, t.programs, transposed=True)
        with record_function("dispatch"):
            d_input = sums.combine(dx, place, None)
        return d_input, None, d_weight, d_up, d_down, d_bias, *[None] * 4, *[outputs[0]] * ctx.added


def activation_gradient(
    rows: Tensor, slot: Tensor, weight: Tensor, down: Tensor, h: Tensor, end: Tensor, cut: Callable[[int], RowTiles],
    t: Tiles, form: experts.Form, programs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`experts.swiglu_backward_gemm` by the kernel that is fastest for the hidden size. One rank and many take the same
    one, for the order in which the gate's gradient is summed is the kernel's own.

    cut       rows of a tile -> the tiles
    programs  of `experts.swiglu_backward_gemm`; Hopper's kernel has one a multiprocessor always
    """
    if t.in_turns(form, down.shape[2]):
        own = cut(ROWS)
        return activation.swiglu_backward_gemm(rows, slot, weight, down, h, end, own, t.group, t.programs)
    own = cut(t.activation.block_m)
    return experts.swiglu_backward_gemm(rows, slot, weight, down, h, end, own, t.activation, t.group, programs, form)


def down_weight_gradient(
    a: Tensor, rows: Tensor, *, parameter: Tensor, end: Tensor, count: Tensor, t: Tiles, accumulator: Accumulator | None
) -> Tensor | None:
    """`experts.weight_gradient` of `down`, by the kernel that is fastest for as many rows.

    a     [P F]   activation times its gate
    rows  [P D]   gradient of the output
    """
    few = a.shape[0] < MANY * parameter.shape[0]
    if t.hopper and few:
        write_ = partial(gradient.grouped_weight_gradient_, programs=t.programs)
    else:
        write_ = partial(experts.grouped_weight_gradient_, tile=t.down_gradient)
    write_ = partial(write_, end=end, count=count, group=t.group)
    return experts.weight_gradient(a, rows, write_, parameter=parameter, accumulator=accumulator)


def up_weight_gradient(
    x: Tensor, dh: Tensor, source: Tensor, place: Tensor, *, parameter: Tensor, end: Tensor, count: Tensor, t: Tiles,
    accumulator: Accumulator | None,
) -> Tensor | None:  # fmt: skip
    """`experts.weight_gradient` of `up`; its kernel gathers the tokens where one that does is the fastest.

    x       [N D]
    dh      [P 2F]   gradient of the pre-activation
    source  [P] i32   row -> token
    place   [N K] i32   the other way
    """
    few = dh.shape[0] < MANY * parameter.shape[0]
    rows = x
    if t.hopper and (t.gathered is None or few):
        write_ = partial(gradient.grouped_weight_gradient_, programs=t.programs, source=source)
    elif t.gathered is not None:
        write_ = partial(experts.grouped_weight_gradient_, tile=t.gathered, source=source)
    else:
        rows, write_ = places.spread(x, place), partial(experts.grouped_weight_gradient_, tile=t.up_gradient)
    write_ = partial(write_, end=end, count=count, group=t.group)
    return experts.weight_gradient(rows, dh, write_, parameter=parameter, accumulator=accumulator)


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
