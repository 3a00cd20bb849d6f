"""Which windows come next: every epoch a permutation, any stretch the same however it is asked for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.core.key import Key
from nmoe.pure.data.order import kept, stretch, windows

KEY = Key(7).fold("data")


@pytest.mark.parametrize("count", [*range(1, 301), 65_536, 99_991, 1_000_000])
def test_every_epoch_reads_each_window_once(count: int) -> None:
    for epoch in (0, 3):
        read = windows(epoch * count, count, count, KEY)
        assert np.array_equal(np.sort(read), np.arange(count))


@given(
    count=st.integers(1, 2000),
    first=st.integers(0, 10**12),
    num=st.integers(0, 60),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**40),
)
def test_a_stretch_may_be_asked_for_in_pieces(count: int, first: int, num: int, more: int, seed: int) -> None:
    key = Key(seed)
    pieces = [windows(first, num, count, key), windows(first + num, more, count, key)]
    assert np.array_equal(np.concatenate(pieces), windows(first, num + more, count, key))


def test_epochs_seeds_and_paths_have_orders_of_their_own() -> None:
    orders = [
        windows(0, 500, 500, KEY),
        windows(500, 500, 500, KEY),
        windows(0, 500, 500, Key(8).fold("data")),
        windows(0, 500, 500, Key(7).fold("other")),
    ]
    for index, order in enumerate(orders):
        assert np.mean(order == np.arange(500)) < 0.02
        for other in orders[:index]:
            assert np.mean(order == other) < 0.02


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_window_of_a_small_source_comes_first_equally_often(count: int) -> None:
    first = np.concatenate([windows(epoch * count, 1, count, KEY) for epoch in range(1000)])
    expected = 1000 / count
    assert np.all(np.abs(np.bincount(first, minlength=count) - expected) < 6 * np.sqrt(expected))


def test_neighbours_are_sent_far_apart() -> None:
    """A random permutation of n has a mean distance of n / 3 between what follows one another."""
    count = 100_000
    distance = np.abs(np.diff(windows(0, count, count, KEY))).mean()
    assert abs(distance / count - 1 / 3) < 0.01


def test_the_order_is_the_same_on_every_machine_and_for_ever() -> None:
    """A run that is resumed elsewhere goes on in this order; change it only with a new version of the data's format."""
    read = windows(10**9, 10_000, 123_457, Key(0)).astype("<i8").tobytes()
    assert hashlib.sha256(read).hexdigest() == "d7bde8093d1a6d3f680f98a8ce47ef5f0a6d95a7079f38bc2436840afb91691f"


def test_a_source_of_more_windows_than_memory_can_be_read() -> None:
    count = 10**15 + 37
    read = windows(count - 50, 100, count, KEY)
    assert len(set(read.tolist())) >= 99 and read.min() >= 0 and read.max() < count and read.max() > count // 2


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_a_stretch_of_several_arrays_is_a_slice_of_their_concatenation(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    arrays = np.split(whole, np.cumsum(lengths)[:-1])
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    found = stretch(arrays, start, count)
    assert found.dtype == np.uint16 and np.array_equal(found, whole[start : start + count])


def test_a_stretch_touches_no_array_outside_it() -> None:
    """A shard is read and hashed when it is first sliced, so that one too many costs a second a gigabyte."""

    class Untouchable:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, part: slice, /) -> np.ndarray:
            raise AssertionError("sliced")

    arrays = [Untouchable(), np.arange(5, 9), np.arange(9, 12), Untouchable()]
    assert stretch(arrays, 6, 5).tolist() == [6, 7, 8, 9, 10]
    assert stretch(arrays, 5, 7).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert stretch([np.arange(3)], 3, 0).tolist() == []


@pytest.mark.parametrize("left_out", [(), ((0, 3),), ((2, 5), (5, 6), (9, 14)), ((4, 5), (7, 9), (30, 40))])
def test_what_is_left_out_of_a_stream_is_read_by_no_stretch(left_out: tuple[tuple[int, int], ...]) -> None:
    """Every stretch against a list of the positions that are kept."""
    outside = [place for place in range(200) if not any(begin <= place < end for begin, end in left_out)]
    for first in range(20):
        for num in range(20):
            pieces = kept(first, num, left_out)
            read = [place for begin, length in pieces for place in range(begin, begin + length)]
            assert read == outside[first : first + num]
            assert all(length > 0 for _, length in pieces)
