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


def settle_threads() -> None:
    """Take as many threads as torch has chosen, for good.

    torch's first call also forbids MKL to take fewer than it is told. The products within attention's backward pass on
    a CPU have other bits after it than before, with two threads and torch 2.13; so it is made before the first step,
    and not by the first text that is generated on the way (docs/log.md, 2026-11-29, thirteenth session).
    """
    torch.set_num_threads(torch.get_num_threads())
