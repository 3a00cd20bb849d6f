"""What the backward pass computes again instead of keeping: wrappers the step puts around a block, and around ops."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from nmoe.pure.model.model import block
from nmoe.pure.model.ops import Ops


def full(run: Callable[..., Any] = block) -> Callable[..., Any]:
    """A block that keeps its input only and runs again in the backward pass."""

    def again(*arguments: Any) -> Any:
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)

    return again


class Recipe:
    """How to make a tensor again from what is kept anyway; made once however many ask for it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: weakref.ref[Tensor] | None = None

    def tensor(self) -> Tensor:
        """The tensor, as it was."""
        made = None if self._made is None else self._made()
        if made is None:
            with torch.no_grad():
                made = self._make()
            self._made = weakref.ref(made)
        return made


@attrs.frozen(kw_only=True)
class Kept:
    """What is kept of a saved tensor that a recipe can make: its place in what the recipe makes."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def cheap(ops: Ops, run: Callable[..., Any] = block) -> tuple[Ops, Callable[..., Any]]:
    """Ops whose norms and activations are made again in the backward pass, and the block that must run them.

    Their results are what products keep to make weight gradients. Inside the block a saved tensor that lies in such a
    result is replaced by what made it: the op's own arguments, which the op keeps for its own backward pass anyway.
    """
    recipes: dict[int, tuple[StorageWeakRef, Recipe]] = {}  # by the storage of the result

    def remember(result: Tensor, make: Callable[[], Tensor]) -> Tensor:
        storage = StorageWeakRef(result.untyped_storage())
        recipes[storage.cdata] = (storage, Recipe(make))
        return result

    def norm(x: Tensor, gain: Tensor, *, eps: float) -> Tensor:
        return remember(ops.norm(x, gain, eps=eps), partial(ops.norm, x.detach(), gain.detach(), eps=eps))

    def add_norm(x: Tensor, y: Tensor | tuple[()], gain: Tensor, *, eps: float, readers: int = 1) -> tuple[Tensor, ...]:
        total, *normed = ops.add_norm(x, y, gain, eps=eps, readers=readers)
        remember(normed[0], partial(ops.norm, total.detach(), gain.detach(), eps=eps))  # all lie in one storage
        return total, *normed

    def swiglu(x: Tensor) -> Tensor:
        return remember(ops.swiglu(x), partial(ops.swiglu, x.detach()))

    def pack(tensor: Tensor) -> Tensor | Kept:
        # the weak reference keeps another storage from taking the number of one that is gone
        recipe = recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None:
            return tensor
        return Kept(recipe=recipe[1], size=tensor.size(), stride=tensor.stride(), offset=int(tensor.storage_offset()))

    def unpack(kept: Tensor | Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return kept.recipe.tensor().as_strided(kept.size, kept.stride, kept.offset)

    def leaving(*arguments: Any) -> Any:
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return run(*arguments)
        finally:
            recipes.clear()

    return attrs.evolve(ops, norm=norm, add_norm=add_norm, swiglu=swiglu), leaving
