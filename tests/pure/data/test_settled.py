"""Which part of a text that grows byte by byte may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.data.text import settled


@pytest.mark.parametrize(
    ("data", "stops", "expected"),
    [
        (b"abc", (), ("abc", False)),
        ("aä".encode()[:-1], (), ("a", False)),
        (b"a\xffb", (), ("a�b", False)),
        (b"abc", ("cd",), ("ab", False)),
        (b"abcd", ("cd",), ("ab", True)),
        (b"ab", ("ab", "b"), ("", True)),
        (b"a<e<e", ("<eo", "x"), ("a<e", False)),
        (b"ab\n", ("\n\n", "\nclass"), ("ab", False)),
    ],
)
def test_before_the_end(data: bytes, stops: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert settled(data, stops, final=False) == expected


@pytest.mark.parametrize(
    ("data", "expected"), [(b"abc", ("abc", False)), (b"a\xc3", ("a�", False)), (b"acd", ("a", True))]
)
def test_at_the_end(data: bytes, expected: tuple[str, bool]) -> None:
    assert settled(data, ("cd",), final=True) == expected


@given(st.binary(max_size=12), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3))
def test_what_was_shown_stays(data: bytes, stops: list[str]) -> None:
    """Every prefix shows a prefix of the next one, and no stop text is ever shown."""
    shown = [settled(data[:size], stops, final=False) for size in range(len(data) + 1)]
    shown.append(settled(data, stops, final=True))
    for (before, stopped), (after, _) in zip(shown, shown[1:], strict=False):
        assert after == before if stopped else after.startswith(before)
    assert not any(stop in shown[-1][0] for stop in stops)
