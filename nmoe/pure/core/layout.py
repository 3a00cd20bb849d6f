"""Where every parameter lies in memory: integers only.

All parameters of one policy lie in one flat arena, in the order of the tree, so that an optimizer step is one pass an
arena. Gradients have the same offsets. Ranks that hold the same arena share out its moments and remainders (ZeRO-2,
arXiv:1910.02054): the arena is a row of buckets of whole parameters, and each rank has an equal part of every bucket.
Where the update rule needs whole matrices, the part of a rank holds whole parameters too, and padding at its end.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch

from nmoe.pure.core import tree
from nmoe.pure.core.shape import expect_divisor, expect_member
from nmoe.pure.core.spec import ELEMENTWISE, Dims, Policy, Spec, policy

ALIGNMENT = 128
"""Elements; each parameter starts at a multiple, so that rows start on a memory transaction in every format."""

BUCKET = 1 << 24
"""Elements that are reduced at once: 64 MiB of fp32 gradients, enough for the full rate of a link."""

WIDENED = 2
"""Buckets of 16-bit gradients that are on their way in fp32, as NCCL and gloo sum them, at a time."""


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
class Stretch:
    """Elements `begin` to `end` of an arena, which lie from element `at` on in what one rank holds of it."""

    begin: int
    end: int
    at: int


@attrs.frozen(kw_only=True)
class ArenaLayout:
    """One arena: what lies in it, in which formats."""

    name: str
    policy: Policy
    slots: tuple[Slot, ...]
    size: int  # elements, padding included
    storage: torch.dtype
    gradient: torch.dtype  # of what one rank computes
    moments: torch.dtype
    parts: int  # ranks that hold the arena, and share out its moments and remainders
    ends: tuple[int, ...]  # of the buckets, in elements; a bucket is a multiple of `parts` long

    def has_remainder(self) -> bool:
        """Whether 16 more bits an element restore the fp32 value."""
        return self.storage is torch.bfloat16

    def has_sums(self) -> bool:
        """Whether sums over ranks have fp32 memory of their own, because a rank's gradients are in 16 bits."""
        return self.parts > 1 and self.gradient is not torch.float32

    def whole(self) -> bool:
        """Whether each parameter is updated as a whole, by one rank."""
        return self.policy.optimizer not in ELEMENTWISE

    def held(self) -> int:
        """Elements whose moments one rank has, and sums of gradients."""
        return self.size // self.parts

    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of each bucket."""
        return tuple(zip((0, *self.ends), self.ends, strict=False))

    def stretches(self, part: int) -> tuple[Stretch, ...]:
        """What the `part`-th of the ranks has, one stretch a bucket.

        Raises:  ValueError when there are not so many parts.
        """
        expect_member(f"arena {self.name}: expected a part", part, self.parts)
        runs: list[Stretch] = []
        for low, high in self.buckets():
            size = (high - low) // self.parts
            begin = low + part * size
            runs.append(Stretch(begin=begin, end=begin + size, at=low // self.parts))
        return tuple(runs)

    def owned(self, part: int) -> tuple[tuple[Slot, ...], ...]:
        """The parameters that begin in what the `part`-th of the ranks has, by bucket.

        Raises:  ValueError when there are not so many parts.
        """
        offsets = [slot.offset for slot in self.slots]
        runs = self.stretches(part)
        return tuple(self.slots[bisect_left(offsets, run.begin) : bisect_left(offsets, run.end)] for run in runs)

    def share(self, slot: Slot, part: int) -> Stretch:
        """What the `part`-th of the ranks has of one parameter; it may be nothing, at the parameter's end."""
        bucket = next(index for index, end in enumerate(self.ends) if slot.offset < end)
        whole = self.stretches(part)[bucket]
        end = slot.offset + slot.size()
        begin = min(max(whole.begin, slot.offset), end)
        return Stretch(begin=begin, end=max(min(whole.end, end), begin), at=begin - whole.begin + whole.at)


def dtype(name: Literal["fp32", "bf16"]) -> torch.dtype:
    """The tensor format a config names."""
    return torch.float32 if name == "fp32" else torch.bfloat16


def layout(
    specs: Any,
    dims: Dims,
    *,
    optimizers: Mapping[str, str],
    compute: Literal["fp32", "bf16"],
    moments: Literal["fp32", "bf16"],
    microbatches: int,
    world: int = 1,
    replicas: int = 1,
    bucket: int = BUCKET,
) -> tuple[ArenaLayout, ...]:
    """The arenas of one rank, in order of first appearance in the tree.

    optimizers  group -> update rule of its hidden matrices
    compute     format of parameters whose policy stores them in "compute"
    moments     format of the moments of what is stored in bf16; others have fp32 ones
    microbatches  of a step on one rank; gradients that are sums over several are kept in fp32
    world       ranks the experts are shared out to
    replicas    groups of that many ranks; each has all parameters
    bucket      elements after which a bucket ends, at the end of the parameter; of whole parameters it has one a rank
                at least, where there are so many
    Raises:     ValueError when `world` does not divide the number of experts.
    """
    members: dict[tuple[str, bool, str, str, torch.dtype], list[tuple[str, Spec]]] = {}
    policies: dict[tuple[str, bool, str, str, torch.dtype], Policy] = {}
    for path, spec in tree.leaves(specs):
        own = policy(spec.role, optimizers)
        storage = dtype(compute) if own.storage == "compute" else torch.float32
        key = (own.group, own.decay, own.shard, own.optimizer, storage)
        policies.setdefault(key, own)
        members.setdefault(key, []).append((path, spec))

    arenas: list[ArenaLayout] = []
    for key, parameters in members.items():
        own, storage = policies[key], key[-1]
        parts, whole = replicas if own.shard else world * replicas, own.optimizer not in ELEMENTWISE
        slots: list[Slot] = []
        ends = [0]
        offset = 0
        begin = 0  # first slot of the bucket
        for path, spec in parameters:
            shape = spec.shape(dims)
            if own.shard:
                expect_divisor("layout: expected ranks", world, shape[0], f"experts of '{path}'")
                shape = (shape[0] // world, *shape[1:])
            slots.append(Slot(path=path, spec=spec, shape=shape, offset=offset))
            offset += _up(math.prod(shape), ALIGNMENT)
            is_last = len(slots) == len(parameters)
            is_full = offset - ends[-1] >= bucket and (not whole or len(slots) - begin >= parts)
            if is_last or (parts > 1 and is_full):
                if whole:
                    slots[begin:], offset = _dealt(slots[begin:], ends[-1], parts)
                else:
                    offset = ends[-1] + _up(offset - ends[-1], parts * ALIGNMENT)
                ends.append(offset)
                begin = len(slots)
        arenas.append(
            ArenaLayout(
                name=".".join(
                    (own.group, *(["decay"] if own.decay else []), "fp32" if storage is torch.float32 else "bf16")
                ),
                policy=own,
                slots=tuple(slots),
                size=offset,
                storage=storage,
                gradient=torch.float32 if microbatches > 1 else storage,
                moments=dtype(moments) if storage is torch.bfloat16 else torch.float32,
                parts=parts,
                ends=tuple(ends[1:]),
            )
        )
    return tuple(arenas)


def _dealt(slots: Sequence[Slot], begin: int, parts: int) -> tuple[list[Slot], int]:
    """The slots of a bucket in equal parts that cut none of them, and the bucket's end; the largest are dealt first."""
    ends = [0] * parts
    placed: list[tuple[int, Slot]] = []
    for slot in sorted(slots, key=lambda slot: -slot.size()):
        part = ends.index(min(ends))
        placed.append((part, attrs.evolve(slot, offset=ends[part])))
        ends[part] += _up(slot.size(), ALIGNMENT)
    size = max(ends)
    moved = [attrs.evolve(slot, offset=begin + part * size + slot.offset) for part, slot in placed]
    return sorted(moved, key=lambda slot: slot.offset), begin + parts * size


def _up(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit
