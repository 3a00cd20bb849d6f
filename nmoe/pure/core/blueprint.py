"""What the memory of a training is made of: the parameters, their sizes, and where they lie on one rank.

V vocabulary · D width · E experts · F hidden width of an expert (letters of the axes are those of the model's `dims`)
"""

from __future__ import annotations

from typing import Any

import attrs

from nmoe.pure.core import tree
from nmoe.pure.core.layout import ArenaLayout
from nmoe.pure.core.spec import Dims, Role, Spec


@attrs.frozen(kw_only=True)
class Parameters:
    """Number of parameters, over all ranks."""

    total: int
    active: int  # used by one token: top_k of the routed experts
    embedding: int  # of the active ones, rows that are looked up, not multiplied
    routed: int  # of the total, in routed experts


@attrs.frozen(kw_only=True)
class Blueprint:
    """The parameters of a config on `world` ranks, `expert_ranks` of which share one set of experts.

    Made once a training; plan, buffers, optimizer, checkpoint and weights all read this one value, so that none of them
    can disagree with another about a size or a format.
    """

    specs: Any  # the model with a Spec where each parameter is
    dims: Dims
    layouts: tuple[ArenaLayout, ...]  # of one rank; every rank has the same
    parameters: Parameters
    world: int
    expert_ranks: int  # divides `world`


def active(spec: Spec, dims: Dims, top_k: int) -> int:
    """Elements of a parameter that one token uses: of what has a row or more an expert, those of `top_k` experts."""
    size = spec.size(dims)
    return size // dims["E"] * top_k if spec.axes[0] == "E" and len(spec.axes) > 1 else size


def count(specs: Any, dims: Dims, *, top_k: int) -> Parameters:
    """The number of parameters in a tree of Specs.

    top_k  experts a token is routed to
    """
    every: list[Spec] = [spec for _, spec in tree.leaves(specs)]
    return Parameters(
        total=sum(spec.size(dims) for spec in every),
        active=sum(active(spec, dims, top_k) for spec in every),
        embedding=sum(spec.size(dims) for spec in every if spec.role is Role.EMBED),
        routed=sum(spec.size(dims) for spec in every if spec.role is Role.EXPERT),
    )
