"""Initial values, the same for any number of ranks and any neighbour."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.core.shape import expect_divisor, expect_member
from nmoe.pure.core.spec import POLICY, Dims, Init, Spec, axis_size


def normal(*fan_in: str) -> Init:
    """Normal values of variance 1 / fan-in; the fan-in is the product of the named axes."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
        deviation = 1.0 / math.sqrt(math.prod(axis_size(axis, dims) for axis in fan_in))
        return torch.randn(shape, generator=generator, device=generator.device) * deviation

    return draw


def residual(*fan_in: str) -> Init:
    """As `normal`, over the root of the number of branches that add to the residual stream, 2 L (GPT-2's rule)."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
        return normal(*fan_in)(generator, shape, dims) / math.sqrt(2 * axis_size("L", dims))

    return draw


def ones(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
    """All ones."""
    return torch.ones(shape, device=generator.device)


def zeros(generator: torch.Generator, shape: tuple[int, ...], dims: Dims) -> Tensor:
    """All zeros."""
    return torch.zeros(shape, device=generator.device)


def initial(
    key: Key, path: str, spec: Spec, dims: Dims, *, rank: int = 0, world: int = 1, device: str | torch.device = "cpu"
) -> Tensor:
    """One rank's part of one parameter, fp32.

    An expert tensor is drawn one expert at a time, each under its own key, so that every way of sharing experts out
    sees the same values.

    key          the run's key for initial values
    path         where the parameter is in the tree
    rank, world  expert-parallel rank and size; the size divides the number of experts
    """
    here = key.fold(*path.split("."))
    shape = spec.shape(dims)
    if POLICY[spec.role].shard == "":
        return spec.init(here.generator(device), shape, dims)
    expect_divisor("initial: expected ranks", world, shape[0], f"experts of '{path}'")
    expect_member("initial: expected a rank", rank, world)
    held = shape[0] // world
    return torch.stack(
        [
            spec.init(here.fold(expert).generator(device), shape[1:], dims)
            for expert in range(rank * held, (rank + 1) * held)
        ]
    )


def init(key: Key, specs: Any, dims: Dims, *, rank: int = 0, world: int = 1) -> Any:
    """This rank's part of every parameter as a tree of fp32 tensors on the CPU."""
    return tree.map(lambda path, spec: initial(key, path, spec, dims, rank=rank, world=world), specs)
