"""Programs that push rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.parallel.pushing import IN_FLIGHT, programs


@pytest.mark.parametrize(
    ("rows", "bytes_at_once", "most", "wanted"),
    [
        (16384, 16384, 264, 128),  # 4096 turns of rows of 2048: 32 for each
        (8192, 8192, 264, 256),  # 2048 turns of rows of 7168, half as many bytes at once: 8 for each
        (4096, 16384, 264, 128),
        (32768, 16384, 32, 32),  # beside a GEMM
        (3, 16384, 264, 1),
        (0, 16384, 264, 1),
    ],
)
def test_programs_of_measured_pushes(rows: int, bytes_at_once: int, most: int, wanted: int) -> None:
    assert programs(rows=rows, rows_at_once=4, bytes_at_once=bytes_at_once, most=most) == wanted


@given(st.integers(1, 10**6), st.sampled_from([1, 2, 4, 8]), st.sampled_from([512, 8192, 65536, IN_FLIGHT * 2]))
@pytest.mark.parametrize("most", [1, 32, 264])
def test_shares_are_equal_and_fill_the_links(most: int, rows: int, rows_at_once: int, bytes_at_once: int) -> None:
    """No fewer programs take as few turns, and not more bytes are on the way than fill the links."""
    number = programs(rows=rows, rows_at_once=rows_at_once, bytes_at_once=bytes_at_once, most=most)
    turns = -(-rows // rows_at_once)
    limit = min(most, turns, max(1, IN_FLIGHT // bytes_at_once))
    assert 1 <= number <= limit
    assert -(-turns // number) == -(-turns // limit)
    assert number == 1 or -(-turns // (number - 1)) > -(-turns // limit)
