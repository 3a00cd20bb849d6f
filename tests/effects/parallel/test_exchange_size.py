"""The plan's arena is the one that an exchange allocates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.effects.parallel.exchange import Sizes
from nmoe.effects.parallel.exchange.arena import fields
from nmoe.pure.cost.traffic import arena, expert_rows


@given(
    ranks=st.sampled_from([2, 4, 8, 64]),
    tokens=st.integers(1, 64).map(lambda n: 128 * n),
    top_k=st.sampled_from([1, 6, 8]),
    hidden_size=st.sampled_from([512, 2048, 7168]),
    capacity=st.sampled_from([1.0, 1.25, 2.0, math.inf]),
    dedup=st.booleans(),
)
def test_the_plan_is_within_a_percent_of_the_arena(
    ranks: int, tokens: int, top_k: int, hidden_size: int, capacity: float, dedup: bool
) -> None:
    shape = {"ranks": ranks, "tokens": tokens, "top_k": top_k}
    told = arena(**shape, num_experts=256, hidden_size=hidden_size, element=2, capacity=capacity, dedup=dedup)
    sizes = Sizes(
        **shape,
        experts=256,
        hidden_size=hidden_size,
        capacity=expert_rows(**shape, num_experts=256, capacity=capacity),
        dedup=dedup,
        dtype=torch.bfloat16,
    )
    # the plan rounds to the 2 MiB that a GPU maps at once
    assert told.total() == pytest.approx(fields(sizes).size, rel=0.01, abs=2**21)
