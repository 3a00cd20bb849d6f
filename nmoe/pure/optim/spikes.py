"""Steps whose loss or gradient norm lies far above those of recent steps. All is decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape

WINDOW = 128
"""Steps that are remembered. Skipped ones are among them: after 64 steps on another level that level is the usual one,
so that no run skips for ever."""

ENOUGH = 32
"""Steps in the window before anything is compared with it."""

NORMAL = 1.4826
"""Makes the median deviation of a normal distribution its standard deviation."""

FLOOR = 0.01
"""Least deviation over the median: a window of nearly equal numbers is no reason to skip."""


def nothing(device: torch.device | None = None) -> Tensor:
    """The window before the first step: [2 WINDOW] f32, loss and gradient norm, infinite where there is none."""
    return torch.full((2, WINDOW), torch.inf, device=device)


def is_spike(recent: Tensor, seen: Tensor, *, deviations: float) -> Tensor:
    """Whether a step's loss or gradient norm is more than so many robust deviations above the window's median.

    recent   [2 WINDOW] f32   as `nothing` and `remembered` return
    seen     [2] f32          loss and gradient norm of the step
    returns  0-d bool; false while the window has fewer than ENOUGH steps
    Source:  median and median absolute deviation, which a few spikes in the window do not move.
    """
    expect_shape("is_spike: expected numbers", seen.shape, recent.shape[:1], "pass one for each row of the window")
    count = recent.isfinite().sum(-1, keepdim=True)
    middle = _median(recent, count)
    deviation = torch.maximum(NORMAL * _median((recent - middle).abs(), count), FLOOR * middle.abs())
    return ((seen[:, None] > middle + deviations * deviation) & (count >= ENOUGH)).any()


def remembered(recent: Tensor, seen: Tensor, counts: Tensor) -> Tensor:
    """The window with one more step in the place of its oldest, where `counts` (0-d bool)."""
    return torch.where(counts, torch.cat((recent[:, 1:], seen[:, None]), dim=-1), recent)


def _median(values: Tensor, count: Tensor) -> Tensor:
    """The lower median [2 1] of the `count` finite numbers of each row, which sort first."""
    return values.sort(dim=-1).values.gather(-1, (count - 1).clamp(min=0) // 2)
