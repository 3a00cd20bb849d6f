"""What a parameter is, said once on the field that holds it: axes, role, initial values.

`Role` is closed and `POLICY` has one row a role: together they are the whole truth about optimizer groups, decay,
sharding, storage and FLOPs. A deviation is a new role.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import attrs
import torch
from torch import Tensor

Dims = Mapping[str, int]
"""Size of each axis letter."""

Init = Callable[[torch.Generator, tuple[int, ...], Dims], Tensor]
"""Draws initial values: generator, shape, dims -> fp32 tensor on the generator's device."""

T = TypeVar("T")


BY_GROUP = "by group"
"""As a policy's optimizer: hidden matrices, of which the config says which rule updates them."""

ELEMENTWISE = frozenset({"adamw"})
"""Update rules under which an element depends on its own gradient alone: ranks may cut parameters anywhere."""


class Role(enum.Enum):
    """What a parameter does."""

    EMBED = "embed"
    HEAD = "head"
    MATRIX = "matrix"
    SHARED = "shared"  # a hidden matrix of the shared experts
    EXPERT = "expert"
    ROUTER = "router"
    GAIN = "gain"
    BIAS = "bias"  # added to a product in the format of the product
    POOL = "pool"  # a hidden matrix that meets several tokens at once: its kind of attention counts the FLOPs


@attrs.frozen(kw_only=True)
class Policy:
    """How parameters of one role are trained and stored.

    optimizer  update rule, a name in `pure.optim.update.UPDATES`; BY_GROUP: the one that the group's table names
    group      table of `[optim]` that holds its learning rate
    decay      whether weight decay applies
    shard      axis letter that is split over the expert-parallel ranks, or "" for none
    storage    "compute": the format of `precision.storage()`; "fp32": always fp32
    flops      whether each token is multiplied with it in a GEMM
    lowered    whether that GEMM is in fp8, MXFP8 or NVFP4 where `precision.compute` is; else it stays in bf16
    """

    optimizer: str
    group: Literal["dense", "expert", "router"]
    decay: bool
    shard: Literal["E", ""]
    storage: Literal["compute", "fp32"]
    flops: bool
    lowered: bool


def row(
    group: Literal["dense", "expert", "router"],
    *,
    decay: bool,
    flops: bool,
    shard: Literal["E", ""] = "",
    storage: Literal["compute", "fp32"] = "compute",
    optimizer: str = "adamw",
    lowered: bool = False,
) -> Policy:
    """One row of the table."""
    return Policy(
        optimizer=optimizer, group=group, decay=decay, shard=shard, storage=storage, flops=flops, lowered=lowered
    )


POLICY: Mapping[Role, Policy] = MappingProxyType(
    {
        Role.EMBED: row("dense", decay=False, flops=False),
        Role.HEAD: row("dense", decay=False, flops=True),
        Role.MATRIX: row("dense", decay=True, flops=True, optimizer=BY_GROUP),
        Role.SHARED: row("dense", decay=True, flops=True, optimizer=BY_GROUP, lowered=True),
        Role.EXPERT: row("expert", decay=True, flops=True, shard="E", optimizer=BY_GROUP, lowered=True),
        Role.ROUTER: row("router", decay=False, flops=True, storage="fp32"),
        Role.GAIN: row("dense", decay=False, flops=False, storage="fp32"),
        Role.BIAS: row("dense", decay=False, flops=False),
        Role.POOL: row("dense", decay=True, flops=False, optimizer=BY_GROUP),
    }
)


def policy(role: Role, optimizers: Mapping[str, str]) -> Policy:
    """The row of a role, with the update rule that a config gives it.

    optimizers  group -> name of its update rule
    Raises:     ValueError for a group without one.
    """
    chosen = POLICY[role]
    if chosen.optimizer == BY_GROUP and chosen.group not in optimizers:
        raise ValueError(
            f"optim.{chosen.group}.optimizer: expected an update rule, got none; name one of it for each group"
        )
    return attrs.evolve(chosen, optimizer=optimizers[chosen.group]) if chosen.optimizer == BY_GROUP else chosen


def axis_size(axis: str, dims: Dims) -> int:
    """Size of one axis; a number is its own size, `A+B` lies A and B side by side, `H*C` has C of each of H.

    Raises:  ValueError when `dims` has no size for the letter.
    """
    if axis.isdigit():
        return int(axis)
    if "+" in axis:
        return sum(axis_size(part, dims) for part in axis.split("+"))
    if "*" in axis:
        return math.prod(axis_size(part, dims) for part in axis.split("*"))
    if axis not in dims:
        raise ValueError(
            f"dims: expected a size for axis '{axis}', got sizes for {', '.join(sorted(dims))}; add it to dims"
        )
    return dims[axis]


@attrs.frozen
class Spec:
    """One parameter: the letters of its axes, its role, how its values start."""

    axes: tuple[str, ...]
    role: Role
    init: Init
    merged: tuple[str, ...] = ()  # axes that are one side of a matrix together; in parentheses where it is declared

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Global shape.

        Raises:  ValueError when `dims` has no size for one of the letters.
        """
        return tuple(axis_size(axis, dims) for axis in self.axes)

    def size(self, dims: Dims) -> int:
        """Number of elements over all ranks."""
        return math.prod(self.shape(dims))


def renamed(spec: Spec, names: Mapping[str, str]) -> Spec:
    """The same parameter with other axis letters, of which `dims` has the sizes; its values start as before.

    names  letter -> letter in its place
    """

    def axis(old: str) -> str:
        return "+".join("*".join(names.get(one, one) for one in part.split("*")) for part in old.split("+"))

    def draw(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
        return spec.init(generator, shape, {**dims, **{old: dims[new] for old, new in names.items()}})

    return Spec(tuple(map(axis, spec.axes)), spec.role, draw, tuple(map(axis, spec.merged)))


def spec_tree(cls: type[T], **kids: Any) -> T:
    """A record of `cls` whose leaves are Specs.

    kids     the fields that hold no parameter of their own: spec trees of parts
    Raises:  ValueError when a field is neither a parameter nor given.
    """
    values: list[Any] = []
    for field in attrs.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name in kids:
            values.append(kids[field.name])
        elif "param" in field.metadata:
            axes, role, init = field.metadata["param"]
            merged = axes[axes.find("(") + 1 : axes.find(")")].split() if "(" in axes else ()
            letters = axes.replace("(", " ").replace(")", " ").split()
            values.append(Spec(tuple(letters), role, init, tuple(merged)))
        else:
            raise ValueError(
                f"spec_tree({cls.__name__}): expected a parameter or a given part in every field, got no value for "
                f"'{field.name}'; pass {field.name}=spec_tree(...)"
            )
    return cls(*values)
