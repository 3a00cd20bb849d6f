"""How kernels reach the mathematics: a record of functions, and the constant tables they read.

`reference` gives the plain implementation of each. The shell builds the record for a device; tests pass the reference
or a stub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import attrs
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.config import sections
from nmoe.pure.core.tree import record
from nmoe.pure.model import experts, loss, norm, route
from nmoe.pure.model.attention import KINDS, Kind, Kinds, attention_of
from nmoe.pure.model.route import Routed


@record
class Ops:
    """One function a field; each has the signature of its reference and leaves its arguments alone."""

    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, ...]]
    swiglu: Callable[[Tensor], Tensor]
    attention: Any  # the record of ops of the kind of attention
    route: Callable[..., Routed]
    report: Callable[..., tuple[Tensor, Tensor, Tensor]]
    experts: Callable[..., tuple[Tensor, Tensor]]
    shared: Callable[..., Tensor]  # `mlp` of the shared experts
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]


def reference(kind: Kind) -> Ops:
    """Every op in plain torch."""
    return Ops(
        norm.rms_norm,
        norm.add_rms_norm,
        experts.swiglu,
        kind.reference,
        route.route_tokens,
        route.report,
        experts.moe_experts,
        experts.mlp,
        loss.linear_cross_entropy,
    )


def labelled(ops: Any) -> Any:
    """A record of ops, each inside a profiler range that has the name of its field; records in it likewise."""

    def label(name: str, op: Any) -> Any:
        if isinstance(op, tuple):
            return tuple(label(name, part) for part in cast("tuple[Any, ...]", op))
        if not callable(op):
            return labelled(op) if attrs.has(type(op)) else op

        def run(*arguments: Any, **keywords: Any) -> Any:
            with record_function(name):
                return op(*arguments, **keywords)

        return run

    fields = attrs.fields(type(ops))
    return attrs.evolve(ops, **{field.name: label(field.name, getattr(ops, field.name)) for field in fields})


@record
class Env:
    """What the model needs besides parameters and tokens."""

    ops: Ops
    tables: Any  # constant tensors of the attention
    kind: Kind


def environment(c: sections.Model, num_positions: int, ops: Ops | None = None, *, kinds: Kinds = KINDS) -> Env:
    """The environment of a model for sequences up to `num_positions`.

    ops  of a device; None: the reference
    """
    kind = attention_of(c, kinds)
    return Env(reference(kind) if ops is None else ops, kind.tables(c.attention, num_positions), kind)
