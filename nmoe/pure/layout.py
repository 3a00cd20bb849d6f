"""Where every parameter lies in memory: integers only.

All parameters of one policy lie in one flat arena, in the order of the tree, so that an optimizer step is one pass an
arena. Gradients, moments and remainders have the same offsets.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
import torch

from nmoe.pure import tree
from nmoe.pure.spec import POLICY, Dims, Policy, Spec

__all__ = ["ALIGNMENT", "ArenaLayout", "Slot", "layout"]

ALIGNMENT = 128
"""Elements; each parameter starts at a multiple, so that rows start on a memory transaction in every format."""


@attrs.frozen(kw_only=True)
class Slot:
    """One parameter's place in its arena, in elements."""

    path: str
    spec: Spec
    shape: tuple[int, ...]  # this rank's part
    offset: int

    def size(self) -> int:
        """Number of elements on this rank."""
        return math.prod(self.shape)


@attrs.frozen(kw_only=True)
class ArenaLayout:
    """One arena: what lies in it, in which formats."""

    name: str
    policy: Policy
    slots: tuple[Slot, ...]
    size: int  # elements, padding included
    storage: torch.dtype
    gradient: torch.dtype
    moments: torch.dtype

    def has_remainder(self) -> bool:
        """Whether 16 more bits an element restore the fp32 value."""
        return self.storage is torch.bfloat16


def dtype(name: Literal["fp32", "bf16"]) -> torch.dtype:
    """The tensor format a config names."""
    return torch.float32 if name == "fp32" else torch.bfloat16


def layout(
    specs: Any,
    dims: Dims,
    *,
    compute: Literal["fp32", "bf16"],
    moments: Literal["fp32", "bf16"],
    accumulate: bool,
    world: int = 1,
) -> tuple[ArenaLayout, ...]:
    """The arenas of one rank, in order of first appearance in the tree.

    compute     format of parameters whose policy stores them in "compute"
    moments     format of the moments of what is stored in bf16; others have fp32 ones
    accumulate  whether a step has more than one microbatch: gradients are then kept in fp32
    world       ranks the experts are shared out to
    """
    members: dict[tuple[str, bool, str, torch.dtype], list[tuple[str, Spec]]] = {}
    for path, spec in tree.leaves(specs):
        policy = POLICY[spec.role]
        storage = dtype(compute) if policy.storage == "compute" else torch.float32
        members.setdefault((policy.group, policy.decay, policy.shard, storage), []).append((path, spec))

    arenas: list[ArenaLayout] = []
    for (group, decay, shard, storage), parameters in members.items():
        slots: list[Slot] = []
        offset = 0
        for path, spec in parameters:
            shape = spec.shape(dims)
            if shard:
                shape = (shape[0] // world, *shape[1:])
            slots.append(Slot(path=path, spec=spec, shape=shape, offset=offset))
            offset += math.ceil(math.prod(shape) / ALIGNMENT) * ALIGNMENT
        arenas.append(
            ArenaLayout(
                name=".".join((group, *(["decay"] if decay else []), "fp32" if storage is torch.float32 else "bf16")),
                policy=POLICY[parameters[0][1].role],
                slots=tuple(slots),
                size=offset,
                storage=storage,
                gradient=torch.float32 if accumulate else storage,
                moments=dtype(moments) if storage is torch.bfloat16 else torch.float32,
            )
        )
    return tuple(arenas)
