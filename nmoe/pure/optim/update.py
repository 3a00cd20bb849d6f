"""The table of update rules, and the update of a whole tree of parameters, out of place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Group, Optim
from nmoe.pure.core import tree
from nmoe.pure.core.spec import POLICY, Spec
from nmoe.pure.core.tree import record
from nmoe.pure.optim.adamw import adamw
from nmoe.pure.optim.clip import clip_scale, global_norm


@attrs.frozen
class Rule:
    """One update rule.

    moments  names of the tensors it keeps for each parameter, in the order `update` takes them; a checkpoint stores
             each as `param/<path>/<name>`
    update   (value, gradient, moments, *, updates, lr, decay, **settings) -> (value, moments), in fp32. `settings` are
             the fields of the group's section but `lr`. Every element must depend on its own element of the arguments
             alone, because ranks update parts of a parameter.
    """

    moments: tuple[str, ...]
    update: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


UPDATES: Mapping[str, Rule] = MappingProxyType({"adamw": Rule(("first", "second"), adamw)})
"""By the name that `Policy.optimizer` has."""


def rule(name: str) -> Rule:
    """The update rule of this name.

    Raises:  ValueError when there is none.
    """
    if name not in UPDATES:
        raise ValueError(f"Policy.optimizer: expected one of {', '.join(UPDATES)}, got {name!r}; add it to UPDATES")
    return UPDATES[name]


def settings(group: Group) -> dict[str, float]:
    """What an update rule is given of its group's section: all but the learning rate, which follows the schedule."""
    return {name: value for name, value in attrs.asdict(group).items() if name != "lr"}


@record
class TreeState:
    """What the update rules keep of a tree of parameters."""

    updates: Tensor  # 0-d i64, updates made
    moments: Any  # the tree of the parameters, a tuple of tensors in the place of each


def tree_state(params: Any, specs: Any) -> TreeState:
    """The state before the first update: zeros in fp32, or in the format of a parameter that is wider."""

    def zeros(path: str, value: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        wide = torch.promote_types(value.dtype, torch.float32)
        return tuple(torch.zeros_like(value, dtype=wide) for _ in rule(POLICY[spec.role].optimizer).moments)

    return TreeState(torch.zeros((), dtype=torch.int64), tree.map(zeros, params, specs))


def tree_update(
    params: Any, grads: Any, state: TreeState, specs: Any, optim: Optim, *, share: float = 1.0
) -> tuple[Any, TreeState]:
    """One clipped update of every parameter by the rule, group and decay of its role, out of place.

    params   tree of tensors
    grads    the same tree, gradients of one whole batch
    specs    the same tree, of Specs
    optim    learning rate and numbers of each group, decay, clip
    share    of the peak learning rate, from `schedule.factor`
    returns  new parameters and state, that require no gradients

    Raises:  ValueError when the trees differ.
    """
    updates = state.updates + 1
    shrink = clip_scale(global_norm([gradient for _, gradient in tree.leaves(grads)]), optim.clip_norm)

    def updated(path: str, value: Tensor, gradient: Tensor, moments: Any, spec: Spec) -> tuple[Tensor, Any]:
        policy = POLICY[spec.role]
        group: Group = getattr(optim, policy.group)
        new, moments = rule(policy.optimizer).update(
            value.detach(),
            gradient.to(value.dtype) * shrink.to(value.dtype),
            moments,
            updates=updates,
            lr=torch.tensor(share * group.lr, dtype=torch.float64),
            decay=optim.weight_decay if policy.decay else 0.0,
            **settings(group),
        )
        return new, moments

    with torch.no_grad():
        both = tree.map(updated, params, grads, state.moments, specs)
    new_params, moments = tree.unzip(params, both)
    return new_params, TreeState(updates, moments)
