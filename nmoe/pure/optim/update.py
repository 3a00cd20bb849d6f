"""The table of update rules, and the update of a whole tree of parameters, out of place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Group, Optim
from nmoe.pure.core import tree
from nmoe.pure.core.layout import Slot
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.spec import ELEMENTWISE, Dims, Spec, policy
from nmoe.pure.core.tree import record
from nmoe.pure.optim.adamw import adamw
from nmoe.pure.optim.clip import clip_scale, global_norm
from nmoe.pure.optim.muon import by_matrix, by_parameter, muon


@attrs.frozen
class Rule:
    """One update rule.

    moments   names of the tensors it keeps for each parameter, in the order `update` takes them; a checkpoint stores
              each as `param/<path>/<name>`
    update    (value, gradient, moments, *, updates, lr, decay, **settings) -> (value, moments), in fp32. Of a rule in
              `ELEMENTWISE` every element must depend on its own element of the arguments alone, because ranks update
              parts of a parameter; others get a whole parameter, and the arguments of `matrix_settings`
    settings  fields of the group's section that `update` takes
    """

    moments: tuple[str, ...]
    update: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    settings: tuple[str, ...]


UPDATES: Mapping[str, Rule] = MappingProxyType(
    {
        "adamw": Rule(("first", "second"), adamw, ("beta1", "beta2", "eps")),
        "muon": Rule(("momentum",), muon, ("momentum",)),
    }
)
"""By the name that `Policy.optimizer` has."""


def rule(name: str) -> Rule:
    """The update rule of this name.

    Raises:  ValueError when there is none.
    """
    if name not in UPDATES:
        raise ValueError(f"Policy.optimizer: expected one of {', '.join(UPDATES)}, got {name!r}; add it to UPDATES")
    return UPDATES[name]


def settings(name: str, group: Group) -> dict[str, float]:
    """What an update rule is given of its group's section; the learning rate follows the schedule."""
    return {field: getattr(group, field) for field in rule(name).settings}


def matrix_settings(
    name: str, spec: Spec, shape: tuple[int, ...], dims: Dims, *, bf16: bool, heads_apart: bool = False
) -> dict[str, Any]:
    """What an update rule of whole matrices is given of its parameter; nothing for an elementwise one.

    shape        of the parameter on this rank
    bf16         whether the parameter is stored in bf16; so are then the products that make its update
    heads_apart  whether each head of a projection is a matrix of its own
    """
    if name in ELEMENTWISE:
        return {}
    cut = partial(by_matrix, spec=spec, shape=shape, dims=dims, heads_apart=heads_apart)
    return {"by_matrix": cut, "bf16": bf16}


def joint_settings(
    name: str, slots: Sequence[Slot], dims: Dims, *, bf16: bool, heads_apart: bool = False
) -> dict[str, Any]:
    """`matrix_settings` of parameters that are updated together, where the first of them begins the tensors."""
    how = {"bf16": bf16, "heads_apart": heads_apart}
    each = [matrix_settings(name, slot.spec, slot.shape, dims, **how) for slot in slots]
    if len(slots) == 1:
        return each[0]
    places = [(slot.offset - slots[0].offset, slot.size()) for slot in slots]
    parameters = [(*place, own["by_matrix"]) for place, own in zip(places, each, strict=True)]
    return {"by_matrix": partial(by_parameter, parameters=parameters), "bf16": bf16}


@record
class TreeState:
    """What the update rules keep of a tree of parameters."""

    updates: Tensor  # 0-d i64, updates made
    moments: Any  # the tree of the parameters, a tuple of tensors in the place of each


def tree_state(params: Any, specs: Any, optim: Optim) -> TreeState:
    """The state before the first update: zeros in fp32, or in the format of a parameter that is wider."""

    def zeros(path: str, value: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        upcast = torch.promote_types(value.dtype, torch.float32)
        moments = rule(policy(spec.role, optim.optimizers()).optimizer).moments
        return tuple(torch.zeros_like(value, dtype=upcast) for _ in moments)

    return TreeState(torch.zeros((), dtype=torch.int64), tree.map(zeros, params, specs))


def tree_update(
    params: Any,
    grads: Any,
    state: TreeState,
    specs: Any,
    optim: Optim,
    *,
    share: float = 1.0,
    dims: Dims = MappingProxyType({}),
) -> tuple[Any, TreeState]:
    """One clipped update of every parameter by the rule, group and decay of its role, out of place.

    params   tree of tensors
    grads    the same tree, gradients of one whole batch
    specs    the same tree, of Specs
    optim    learning rate and numbers of each group, decay, clip
    share    of the peak learning rate, from `schedule.factor`
    dims     sizes of the model's axes; Muon has to know them
    returns  new parameters and state, that require no gradients

    Raises:  ValueError when the trees differ, or the shapes of a parameter, its gradient and its moments.
    """
    updates = state.updates + 1
    shrink = clip_scale(global_norm([gradient for _, gradient in tree.leaves(grads)]), optim.clip_norm)

    def updated(path: str, value: Tensor, gradient: Tensor, moments: Any, spec: Spec) -> tuple[Tensor, Any]:
        own = policy(spec.role, optim.optimizers())
        group: Group = getattr(optim, own.group)
        for tensor in (gradient, *moments):
            remedy = "pass those of this parameter"
            expect_shape(f"tree_update: expected gradient and moments of '{path}'", tensor.shape, value.shape, remedy)
        new, moments = rule(own.optimizer).update(
            value.detach(),
            gradient.to(value.dtype) * shrink.to(value.dtype),
            moments,
            updates=updates,
            lr=torch.tensor(share * group.lr, dtype=torch.float64),
            decay=optim.weight_decay if own.decay else 0.0,
            **settings(own.optimizer, group),
            **matrix_settings(
                own.optimizer,
                spec,
                tuple(value.shape),
                dims,
                bf16=value.dtype is torch.bfloat16,
                heads_apart=optim.muon_heads == "apart",
            ),
        )
        return new, moments

    with torch.no_grad():
        both = tree.map(updated, params, grads, state.moments, specs)
    new_params, moments = tree.unzip(params, both)
    return new_params, TreeState(updates, moments)
