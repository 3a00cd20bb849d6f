"""QK-clip in the step: the scores of each layer's attention are looked at, and its weights scaled after the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Config, Mla
from nmoe.effects.device.buffers import Arena
from nmoe.effects.parallel.ranks import Ranks, all_reduce_largest
from nmoe.pure.core.layout import ArenaLayout, Slot
from nmoe.pure.formats import master
from nmoe.pure.model.attention.qk_clip import factors, largest_scores
from nmoe.pure.model.ops import Ops


class Scores:
    """The largest score of each head and layer in a step. Layers are in the order of a forward pass."""

    def __init__(self) -> None:
        self._layers: list[Tensor] = []  # of one microbatch, [H] a layer
        self._largest: Tensor | None = None  # [L H], of the microbatches so far
        self._forward = False  # whether a forward pass runs, not one that the backward pass makes again

    def noting(self, ops: Ops) -> Ops:
        """Ops whose attention is looked at."""
        attend: Callable[..., Tensor] = ops.attention.attend

        def noted(*arguments: Any, **keywords: Any) -> Tensor:
            if self._forward:
                self._layers.append(largest_scores(*arguments, **keywords))
            return attend(*arguments, **keywords)

        return attrs.evolve(ops, attention=attrs.evolve(ops.attention, attend=noted))

    def begin(self, *, first: bool) -> None:
        """A forward pass begins, the step's first or another."""
        self._layers, self._forward = [], True
        self._largest = None if first else self._largest

    def end(self) -> None:
        """The forward pass is over."""
        self._forward, largest = False, torch.stack(self._layers)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def factors(self, config: Config, allowed: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        """Path of a parameter -> what multiplies it, of the step of all ranks; 1 everywhere where not `allowed`."""
        c, limit = config.model, config.optim.qk_clip
        if self._largest is None or limit is None or not isinstance(c.attention, Mla):
            return {}
        paths = [f"blocks.{layer}" for layer in range(c.num_layers)] + [f"mtp.{k}.block" for k in range(c.depth())]
        return {
            f"{path}.attention.{name}": torch.where(allowed, factor, 1.0)
            for path, largest in zip(paths, all_reduce_largest(ranks.world, self._largest), strict=True)
            for name, factor in factors(c.attention, largest, limit).items()
        }


def multiply_(arena: Arena, layout: ArenaLayout, slot: Slot, factor: Tensor, *, part: int) -> None:
    """Multiply what one rank owns of a parameter, in fp32.

    factor  broadcasts to the parameter

    Writes:  value and remainder of `arena`.
    """
    mine = layout.share(slot, part)
    value = arena.value[mine.begin : mine.end]
    flat = factor.expand(slot.shape).reshape(-1)[mine.begin - slot.offset : mine.end - slot.offset]
    if not isinstance(arena.remainder, Tensor):
        value.mul_(flat)
        return
    remainder = arena.remainder[mine.at : mine.at + len(flat)]
    high, low = master.split(master.join(value, remainder) * flat)
    value.copy_(high)
    remainder.copy_(low)
