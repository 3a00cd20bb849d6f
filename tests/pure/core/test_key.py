"""Seeds from paths."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.core.key import Key

parts = st.lists(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=3), max_size=4).map(tuple)


def test_seed_is_half_a_digest_of_the_joined_path() -> None:
    """Initial values of every run hang on it: it may never change."""
    digest = hashlib.blake2b(b"7\x00init\x00blocks\x003", digest_size=8).digest()
    assert Key(7).fold("init", "blocks", 3).seed() == int.from_bytes(digest, "little") // 2


def test_where_one_part_ends_matters() -> None:
    assert Key(1).fold("ab", "c").seed() != Key(1).fold("a", "bc").seed()
    assert Key(1).fold("2").seed() != Key(12).seed()
    assert Key(1).fold("a", "").seed() != Key(1).fold("a").seed()


@given(st.integers(0, 99), parts, st.integers(0, 99), parts)
def test_other_paths_have_other_seeds(
    number: int, path: tuple[str, ...], other: int, elsewhere: tuple[str, ...]
) -> None:
    same = (number, path) == (other, elsewhere)
    assert (Key(number).fold(*path).seed() == Key(other).fold(*elsewhere).seed()) == same


@given(st.integers(0, 2**64), parts, parts)
def test_folding_in_steps_is_folding_at_once(number: int, path: tuple[str, ...], more: tuple[str, ...]) -> None:
    key = Key(number)
    assert key.fold(*path).fold(*more) == key.fold(*path, *more)
    assert 0 <= key.fold(*path).seed() < 2**63


def test_generators_are_fresh_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    key = Key(3).fold("x")
    first, second = (torch.randn(8, generator=key.generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(8, generator=key.fold("y").generator()))
    assert torch.equal(torch.get_rng_state(), before)
