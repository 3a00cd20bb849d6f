"""The memory of a run: arenas, the parameters that look into them, and constant tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.init import initial
from nmoe.pure.core.key import Key
from nmoe.pure.core.layout import ArenaLayout, Slot
from nmoe.pure.core.tree import record
from nmoe.pure.formats.master import split
from nmoe.pure.optim.update import rule


@record
class Arena:
    """Flat storage of all parameters of one policy; of what ranks share out, this rank's part."""

    value: Tensor
    gradient: Tensor
    sums: Tensor | tuple[()]  # f32 gradients over all ranks, shared out; () when `gradient` takes them
    moments: tuple[Tensor, ...]  # those of the policy's update rule, in its order; shared out
    remainder: Tensor | tuple[()]  # i16, the low half of the fp32 master; shared out; () when `value` is fp32


def allocate(blueprint: Blueprint, device: torch.device, ranks: Ranks = SINGLE_RANK) -> tuple[Arena, ...]:
    """Zeroed arenas, one a layout. Collective: ranks that copy to each other share the memory of the values."""

    def zeros(size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def values(layout: ArenaLayout) -> Tensor:
        copies = ranks.sharing(layout).copies
        return zeros(layout.size, layout.storage) if copies is None else copies.symmetric(layout.size, layout.storage)

    return tuple(
        Arena(
            values(layout),
            zeros(layout.size, layout.gradient),
            zeros(layout.held(), torch.float32) if layout.has_sums() else (),
            tuple(zeros(layout.held(), layout.moments) for _ in rule(layout.policy.optimizer).moments),
            zeros(layout.held(), torch.int16) if layout.has_remainder() else (),
        )
        for layout in blueprint.layouts
    )


def view(flat: Tensor, slot: Slot) -> Tensor:
    """The part of an arena that one parameter has."""
    return flat[slot.offset : slot.offset + slot.size()].view(slot.shape)


def bind(blueprint: Blueprint, arenas: tuple[Arena, ...]) -> Any:
    """The parameter tree whose leaves are views of the arenas, gradients included.

    Leaves are `nn.Parameter` because the compiler and CUDA graphs take only those to have a fixed address.
    """
    leaves: dict[str, nn.Parameter] = {}
    for described, arena in zip(blueprint.layouts, arenas, strict=True):
        for slot in described.slots:
            leaf = nn.Parameter(view(arena.value, slot))
            if described.gradient is not described.storage:
                leaf.grad_dtype = described.gradient  # pyright: ignore[reportAttributeAccessIssue]
            leaf.grad = view(arena.gradient, slot)
            leaves[slot.path] = leaf
    return tree.map(lambda path, _: leaves[path], blueprint.specs)


def put_(arena: Arena, described: ArenaLayout, slot: Slot, value: Tensor, *, part: int) -> None:
    """Give one parameter its exact value.

    value    f32, of the slot's shape
    part     which of the ranks that share out the remainders

    Writes:  value and remainder of `arena`.
    """
    if not isinstance(arena.remainder, Tensor):
        view(arena.value, slot).copy_(value)
        return
    rounded, remainder = split(value)
    view(arena.value, slot).copy_(rounded)
    mine = described.share(slot, part)
    low, size = mine.begin - slot.offset, mine.end - mine.begin
    arena.remainder[mine.at : mine.at + size].copy_(remainder.view(-1)[low : low + size])


@torch.no_grad()
def initialise_(arenas: tuple[Arena, ...], blueprint: Blueprint, key: Key, *, ranks: Ranks = SINGLE_RANK) -> None:
    """Draw the initial values, one parameter at a time.

    Writes:  values and remainders of `arenas`.
    """
    held, dims = ranks.experts, blueprint.dims
    for described, arena in zip(blueprint.layouts, arenas, strict=True):
        for slot in described.slots:
            value = initial(key, slot.path, slot.spec, dims, rank=held.rank, world=held.size, device=arena.value.device)
            put_(arena, described, slot, value, part=ranks.sharing(described).part())


def place(node: Any, device: torch.device) -> Any:
    """A tree of tensors on the device."""
    return tree.map(lambda path, leaf: leaf.to(device), node)
