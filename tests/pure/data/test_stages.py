"""Quotas and turns: exact totals, bounded drift, and the same at any position however it is asked for."""

from __future__ import annotations

from fractions import Fraction

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data.order import quotas, source_at, taken, turns
from nmoe.pure.data.stages import Ingredient, Recipe, Stream, identity, plan, select

NO_LIMIT = 10**15
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12).filter(any)


@given(weights=WEIGHTS, total=st.integers(0, 10**12))
def test_quotas_add_up_and_are_within_one_of_the_exact_part(weights: list[float], total: int) -> None:
    found = quotas(weights, total, [NO_LIMIT] * len(weights))
    assert sum(found) == total
    mass = sum(map(Fraction, weights))
    for weight, quota in zip(weights, found, strict=True):
        assert abs(quota - Fraction(weight) * total / mass) < 1
        assert weight or not quota


@given(weights=WEIGHTS, total=st.integers(0, 10**6), data=st.data())
def test_limits_hold_and_what_is_cut_goes_to_the_others_in_proportion(
    weights: list[float], total: int, data: st.DataObject
) -> None:
    limits = [data.draw(st.integers(0, 10**6)) for _ in weights]
    held = sum(limit for limit, weight in zip(limits, weights, strict=True) if weight)
    if held < total:
        with pytest.raises(InputError, match=f"limits of {total} at least together, got {held}"):
            quotas(weights, total, limits)
        return
    found = quotas(weights, total, limits)
    assert sum(found) == total
    assert all(quota <= limit for quota, limit in zip(found, limits, strict=True))
    read = [each for each in zip(weights, found, limits, strict=True) if each[0]]
    for weight, quota, _ in (each for each in read if each[1] < each[2]):
        # who is below his limit has as much a unit of weight as anybody, but for the rounding
        assert all((more - 1) / Fraction(other) < (quota + 1) / Fraction(weight) for other, more, _ in read)


def test_equal_remainders_go_to_the_first() -> None:
    assert quotas([1, 1, 1], 4, [9, 9, 9]) == (2, 1, 1)
    assert quotas([1, 0, 3], 4, [9, 9, 9]) == (1, 0, 3)
    assert quotas([2, 1, 1], 100, [10, NO_LIMIT, NO_LIMIT]) == (10, 45, 45)


def drift(shares: list[int], positions: range) -> float:
    """The furthest any source is from its exact part."""
    tree, total = turns(shares), sum(shares)
    return max(
        abs(count - position * share / total)
        for position in positions
        for share, count in zip(shares, taken(tree, position, len(shares)), strict=True)
    )


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
def test_every_source_has_its_share_of_turns_one_after_another(shares: list[int]) -> None:
    tree = turns(shares)
    counts = [0] * len(shares)
    for position in range(sum(shares)):
        assert list(taken(tree, position, len(shares))) == counts
        source, earlier = source_at(tree, position)
        assert earlier == counts[source]
        counts[source] += 1
    assert counts == shares
    assert drift(shares, range(sum(shares) + 1)) < 1.7


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=60), st.data())
def test_drift_is_bounded_at_any_position_of_a_long_stream(shares: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, sum(shares)))
    assert drift(shares, range(position, position + 1)) < 1.7
    if position < sum(shares):
        source, earlier = source_at(turns(shares), position)
        assert 0 <= earlier < shares[source]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**9))
def test_ten_thousand_sources(seed: int, position: int) -> None:
    weights = [float((seed * 31 + index * 7919) % 1009) for index in range(10_000)]
    shares = quotas(weights, 10**9, [NO_LIMIT] * 10_000)
    assert sum(shares) == 10**9
    assert all((weight > 0) == (share > 0) for weight, share in zip(weights, shares, strict=True))
    tree = turns(shares)
    counts = taken(tree, position, 10_000)
    assert sum(counts) == position
    assert max(abs(c - position * s / 10**9) for c, s in zip(counts, shares, strict=True)) < 1.7


def test_one_large_source_is_never_far_away() -> None:
    """A thousand small ones of equal share do not come in one lump."""
    shares = [9000] + [1] * 1000
    tree = turns(shares)
    gaps = [source_at(tree, position)[0] != 0 for position in range(10_000)]
    assert sum(gaps) == 1000 and not any(one and other for one, other in zip(gaps, gaps[1:], strict=False))


def test_one_source_and_none() -> None:
    assert [source_at(turns([0, 5]), position) for position in range(5)] == [(1, position) for position in range(5)]
    with pytest.raises(InputError, match="a share above 0, got none"):
        turns([0, 0])


def test_the_order_is_the_same_on_every_machine_and_for_ever() -> None:
    tree = turns([5, 3, 1, 0, 1])
    assert [source_at(tree, position)[0] for position in range(10)] == [1, 0, 4, 0, 1, 0, 2, 0, 1, 0]


def test_a_stream_with_stretches_left_out_reads_the_others_in_the_same_order() -> None:
    """Over two stages of three sources, however it is asked for; it is as much shorter, and the same data."""
    ingredients = [Ingredient(name=name, windows=9, max_passes=None, content=name) for name in "abc"]
    recipes = [Recipe(name="one", windows=30, weights=(1, 2, 3)), Recipe(name="two", windows=20, weights=(2, 1, 0))]
    stream, key = plan(ingredients, recipes), Key(3)

    def read(of: Stream, first: int, num: int) -> list[tuple[int, int]]:
        by_place = {
            place: (chosen.source, window)
            for chosen in select(of, first, num, key)
            for place, window in zip(chosen.places, chosen.windows, strict=True)
        }
        return [by_place[place] for place in range(num)]

    shorter = attrs.evolve(stream, left_out=((3, 7), (28, 33)))
    expected = [each for place, each in enumerate(read(stream, 0, 50)) if not 3 <= place < 7 and not 28 <= place < 33]
    assert shorter.windows() == len(expected) == 41 and identity(shorter) == identity(stream)
    for first in range(41):
        for num in (1, 7, 41 - first):
            num = min(num, 41 - first)
            assert read(shorter, first, num) == expected[first : first + num]
    with pytest.raises(InputError, match="expected a stream of 42 windows, got 41"):
        select(shorter, 40, 2, key)
