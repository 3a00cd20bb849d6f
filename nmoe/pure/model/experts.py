"""Routed experts: dispatch rows to experts, run the experts, combine their results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.tree import record
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.route import Routing


@record
class Rows:
    """One row a (token, chosen expert) pair, sorted by expert; row `p` reads `x[source[p]]`.

    Rows are described, not copied: an implementation may gather them while it multiplies.
    """

    x: Tensor  # [M D] tokens at hand
    source: Tensor  # [P] i64, row -> token
    expert: Tensor  # [P] i64, row -> expert, ascending
    count: Tensor  # [E] i64, rows of each expert
    slot: Tensor  # [P] i64, row -> its place in the [N K] order of the routing


GATED = "gate and value lie side by side, and `down` takes one of them"


def swiglu(x: Tensor) -> Tensor:
    """Gated activation of two halves.

    x        [... 2 F]   gate, then value
    returns  [... F]     silu(gate) * value
    Source:  Shazeer (arXiv:2002.05202) eq. 5.
    """
    gate, value = x.unbind(-2)
    return F.silu(gate) * value


def clamped_swiglu(x: Tensor, *, limit: float, alpha: float) -> Tensor:
    """Gated activation of two halves that no outlier leaves: of a gate above `limit` it does not depend.

    x        [... 2 F]   gate, then value
    limit    largest gate, and largest value of either sign
    alpha    factor in the sigmoid
    returns  [... F]     (value + 1) * gate * sigmoid(alpha * gate), of both clamped
    Source:  gpt-oss (arXiv:2508.10925), section 2; alpha is in its reference implementation.
    """
    gate, value = x.unbind(-2)
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return (value + 1) * (gate * torch.sigmoid(alpha * gate))


def activation(limit: float | None, alpha: float) -> Callable[[Tensor], Tensor]:
    """The activation of a routed expert: `swiglu`, or with a limit `clamped_swiglu`."""
    return swiglu if limit is None else partial(clamped_swiglu, limit=limit, alpha=alpha)


def mlp(x: Tensor, up: Tensor, down: Tensor, activate: Callable[[Tensor], Tensor] = swiglu) -> Tensor:
    """Gated MLP.

    x         [... D]
    up        [D 2 F]
    down      [F D]
    activate  `swiglu` or a kernel that implements it
    Raises:   ValueError for matrices of other shapes.
    """
    expect_shape("mlp: expected up", up.shape, (x.shape[-1], 2, down.shape[0]), GATED)
    expect_shape("mlp: expected down", down.shape, (up.shape[-1], down.shape[-1]), GATED)
    return activate((x @ up.flatten(1)).unflatten(-1, (2, -1))) @ down


def dispatch(x: Tensor, routing: Routing, *, num_experts: int) -> Rows:
    """Rows for the experts, sorted by expert and, within one, by token.

    x        [N D]
    Raises:  ValueError for the routing of another number of tokens, or weights that are not those of the choices.
    """
    wanted = (x.shape[0], routing.expert.shape[-1])
    expect_shape("dispatch: expected choices", routing.expert.shape, wanted, "pass the routing of these tokens")
    expect_shape("dispatch: expected weights", routing.weight.shape, wanted, "pass the weight of each choice")
    flat = routing.expert.flatten()
    expert, slot = flat.sort(stable=True)
    count = flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))
    return Rows(x, slot // routing.expert.shape[1], expert, count, slot)


def experts(
    rows: Rows,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    activate: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """Every row through its own expert's gated MLP.

    The reference runs every expert on every row and keeps one result: slow, and free of data-dependent shapes.

    up        [E D 2 F]
    down      [E F D]
    bias      [E 2 F] or ()   added before the activation
    activate  `swiglu` or another activation of gate and value
    returns   [P D]
    Raises:   ValueError for matrices of other shapes, or another number of experts than the rows are for.
    """
    count, width = rows.count.shape[0], rows.x.shape[-1]
    expect_shape("experts: expected up", up.shape, (count, width, 2, down.shape[1]), GATED)
    expect_shape("experts: expected down", down.shape, (count, up.shape[-1], down.shape[-1]), GATED)
    x = rows.x.index_select(0, rows.source).expand(up.shape[0], -1, -1)
    h = torch.bmm(x, up.flatten(2)).unflatten(-1, (2, -1))
    if isinstance(bias, Tensor):
        h = h + bias[:, None]
    y = torch.bmm(activate(h), down)
    return y[rows.expert, torch.arange(y.shape[1], device=y.device)]


def combine(y: Tensor, rows: Rows, routing: Routing) -> Tensor:
    """Sum of a token's rows by their weights, in fp32 and in the order of its choices.

    y        [P D]   results of the rows
    returns  [N D]   in the format of `y`
    """
    chosen = torch.empty_like(y).index_copy(0, rows.slot, y).unflatten(0, routing.weight.shape)
    return (upcast(chosen) * routing.weight[..., None]).sum(-2).to(y.dtype)


def add_all(y: Tensor, added: tuple[Tensor, ...]) -> Tensor:
    """`y` and what is added to it, one after the other; all [N D]."""
    return reduce(Tensor.add, added, y)


def moe_experts(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    added: tuple[Tensor, ...] = (),
    limit: float | None = None,
    alpha: float = 1.0,
    experts: Callable[..., Tensor] = experts,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the chosen experts' outputs: dispatch, experts, combine; and what is added to it.

    x             [N D]
    up            [E D 2 F]
    down          [E F D]
    bias          [E 2 F] or ()   added before the activation; `down_biases` are added to the result
    added         each [N D], added to the result; a kernel does it in the pass that combines, with one rounding
    limit, alpha  of `activation`
    experts       `experts` or another implementation of it
    returns       [N D] in the format of `x`, and the rows of each expert [E] i64
    """
    rows = dispatch(x, routing, num_experts=up.shape[0])
    y = combine(experts(rows, up, down, bias, activation(limit, alpha)), rows, routing)
    return add_all(y, added), rows.count


def down_biases(routing: Routing, bias: Tensor) -> Tensor:
    """The biases of the second products in the sum over a token's experts: of each by its weight.

    A product [N E] x [E D] of its own, beside experts that may lie on other ranks.

    bias     [E D]
    returns  [N D] in the format of `bias`
    """
    weight = routing.weight.new_zeros(len(routing.weight), len(bias)).scatter(-1, routing.expert, routing.weight)
    return (weight @ bias.to(weight.dtype)).to(bias.dtype)
