"""Spikes against numpy's median, and what a window makes of a change that stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nmoe.pure.optim.spikes import ENOUGH, FLOOR, WINDOW, is_spike, nothing, remembered

YES = torch.tensor(True)


def window(losses: list[float], norms: list[float]) -> Tensor:
    recent = nothing()
    for pair in zip(losses, norms, strict=True):
        recent = remembered(recent, torch.tensor(pair), YES)
    return recent


def drawn(count: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(0)
    return (generator.normal(2, 0.1, count).tolist(), generator.lognormal(0, 0.5, count).tolist())


@pytest.mark.parametrize("count", [ENOUGH, 57, WINDOW, WINDOW + 31])
@pytest.mark.parametrize("row", [0, 1])
def test_the_threshold_is_that_of_numpy(count: int, row: int) -> None:
    """Just below it is no spike, just above it is one, of either number."""
    both = drawn(count)
    kept = np.sort(np.array(both, dtype=np.float32)[row, -WINDOW:])
    middle = kept[(len(kept) - 1) // 2]
    spread = 1.4826 * np.sort(abs(kept - middle))[(len(kept) - 1) // 2]
    seen = [2.0, 1.0]
    for place, expected in ((0.999, False), (1.001, True)):
        seen[row] = float(middle + place * 6 * spread)
        assert bool(is_spike(window(*both), torch.tensor(seen), deviations=6.0)) is expected


def test_less_than_enough_steps_say_nothing_and_low_numbers_are_none() -> None:
    assert not is_spike(nothing(), torch.tensor([1e9, 1e9]), deviations=1.0)
    recent = window(*drawn(ENOUGH - 1))
    assert not is_spike(recent, torch.tensor([1e9, 1e9]), deviations=1.0)
    assert not is_spike(window(*drawn(WINDOW)), torch.tensor([-1e9, 0.0]), deviations=1.0)


def test_a_flat_window_is_no_reason() -> None:
    recent = window([2.0] * WINDOW, [1.0] * WINDOW)
    assert not is_spike(recent, torch.tensor([2 * (1 + 4 * FLOOR), 1.0]), deviations=5.0)
    assert is_spike(recent, torch.tensor([2 * (1 + 6 * FLOOR), 1.0]), deviations=5.0)


def test_another_level_becomes_the_usual_one() -> None:
    """As at a new stage of a data mixture: half a window of steps is skipped, and no more."""
    recent, skipped = window(*drawn(WINDOW)), 0
    for loss, norm in zip(*drawn(WINDOW), strict=True):
        seen = torch.tensor([loss + 10, norm])
        skipped += int(is_spike(recent, seen, deviations=8.0))
        recent = remembered(recent, seen, YES)
    assert WINDOW // 2 - 2 <= skipped <= WINDOW // 2 + 2


def test_what_does_not_count_is_not_remembered() -> None:
    recent = window(*drawn(40))
    assert torch.equal(remembered(recent, torch.tensor([torch.nan, torch.inf]), ~YES), recent)
