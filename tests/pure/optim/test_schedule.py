"""Learning rate over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.config.sections import Schedule
from nmoe.pure.optim.schedule import factor

lengths = st.integers(0, 10**6)
schedules = st.builds(
    Schedule, warmup_tokens=lengths, hold_tokens=lengths, decay_tokens=lengths, floor=st.floats(0.0, 1.0)
)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (1, 0.01),
        (50, 0.5),
        (99, 0.99),
        (100, 1.0),
        (300, 1.0),
        (400, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        (500, 0.55),
        (600, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4),
        (700, 0.1),
        (10**12, 0.1),
    ],
)
def test_corners_and_middles(tokens: int, expected: float) -> None:
    c = Schedule(warmup_tokens=100, hold_tokens=200, decay_tokens=400, floor=0.1)
    assert factor(tokens, c) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("c", "values"),
    [
        (Schedule(warmup_tokens=0, hold_tokens=5, decay_tokens=0, floor=0.2), [1.0, 1.0, 0.2]),
        (Schedule(warmup_tokens=5, hold_tokens=0, decay_tokens=0, floor=0.2), [0.0, 1.0, 0.2]),
        (Schedule(warmup_tokens=0, hold_tokens=0, decay_tokens=0, floor=0.0), [1.0, 0.0, 0.0]),
    ],
)
def test_pieces_of_no_length(c: Schedule, values: list[float]) -> None:
    assert [factor(tokens, c) for tokens in (0, 5, 6)] == values


@given(schedules, st.lists(st.integers(0, 4 * 10**6), min_size=2))
def test_rises_then_stays_then_falls_and_stays_in_range(c: Schedule, tokens: list[int]) -> None:
    peak = c.warmup_tokens + (c.hold_tokens or 0)
    for before, after in pairwise(sorted(tokens)):
        first, second = factor(before, c), factor(after, c)
        assert 0 <= first <= 1
        if after <= peak:
            assert first <= second
        if before >= c.warmup_tokens:
            assert first >= second >= c.floor
        if before >= c.warmup_tokens and after <= peak:
            assert first == second == 1


@given(schedules, st.integers(0, 3 * 10**6))
def test_no_jump_but_where_a_piece_has_no_length(c: Schedule, tokens: int) -> None:
    """One token more moves the rate by no more than the steepest piece does."""
    warmup = 1 / c.warmup_tokens if c.warmup_tokens else 0.0
    decay = (1 - c.floor) * math.pi / 2 / c.decay_tokens if c.decay_tokens else 1 - c.floor
    assert abs(factor(tokens + 1, c) - factor(tokens, c)) <= max(warmup, decay) * (1 + 1e-9) + 1e-12


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 10**9))
def test_shares_of_a_run_fill_it(warmup: float, decay: float, total: int) -> None:
    """The decay ends with the run; what warm-up and decay leave is the hold."""
    decay = min(decay, 1 - warmup)
    c = Schedule(warmup=warmup, decay=decay, floor=0.25).in_tokens(total)
    assert c.warmup is None and c.decay is None and c.hold_tokens is not None and c.decay_tokens is not None
    assert c.warmup_tokens + c.hold_tokens + c.decay_tokens == total and c.hold_tokens >= 0
    assert abs(c.warmup_tokens - warmup * total) <= 1 and abs(c.decay_tokens - decay * total) <= 1
    assert factor(total, c) == (1.0 if c.decay_tokens == 0 else 0.25)


def test_shares_and_tokens_of_the_same_lengths_are_one_schedule() -> None:
    in_tokens = Schedule(warmup_tokens=50, hold_tokens=350, decay_tokens=600, floor=0.1)
    assert Schedule(warmup=0.05, decay=0.6, floor=0.1).in_tokens(1000) == in_tokens
    assert Schedule(warmup_tokens=50, decay=0.6, floor=0.1).in_tokens(1000) == in_tokens
    assert Schedule(warmup=0.05, hold_tokens=350, decay_tokens=600, floor=0.1).in_tokens(1000) == in_tokens
    assert in_tokens.in_tokens(7) is in_tokens
    for shares in (Schedule(warmup=0.05, decay=0.6), Schedule(warmup=0.05, hold_tokens=1, decay_tokens=1)):
        with pytest.raises(ValueError, match="expected lengths in tokens"):
            factor(1, shares)
