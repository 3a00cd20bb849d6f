"""Where this process computes: its device and its place among the ranks."""

from __future__ import annotations

import attrs
import torch

from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks


@attrs.frozen(kw_only=True)
class Runtime:
    """Where this process computes. A function that takes one has effects there."""

    device: torch.device
    rank: int
    world: int
    peak_flops: float  # of this rank
    ranks: Ranks = SINGLE_RANK
