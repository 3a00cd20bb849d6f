"""The digest is one number however a tensor is cut, and another one when a bit of it is another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.checkpoint import digest as digesting
from nmoe.pure.checkpoint.digest import BLOCK, CPU_ROWS, GPU_ROWS, digest, digests, to_text

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)

NUMBER = 1 << 64


def noise(count: int, dtype: Any = torch.float32, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(count, generator=draw) < 0.5
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=draw)
    return data.view(dtype)


def splitmix(index: int) -> int:
    """An independent spelling of the table: unbounded integers, cut after each step."""
    x = (index * 0x9E3779B97F4A7C15) % NUMBER
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % NUMBER
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % NUMBER
    return (x ^ (x >> 31)) | 1


def plain(data: bytes, words: range) -> int:
    """The digest of a few words of otherwise zero data, as its docstring says."""
    total = 0
    for number, word in enumerate(words):
        value = int.from_bytes(data[8 * number : 8 * number + 8].ljust(8, b"\0"), "little", signed=True)
        block, place = divmod(word, BLOCK)
        total += (value * splitmix(place) + (value >> 32) * splitmix(place + BLOCK)) * splitmix(block + (1 << 32))
    return total % NUMBER


@pytest.mark.parametrize("first", [0, 1, BLOCK - 2, 5 * BLOCK - 1])
def test_is_the_sum_its_docstring_says(first: int) -> None:
    data = noise(40, torch.uint8)
    found = digest(data, 8 * first)
    assert int(found) % NUMBER == plain(bytes(data.tolist()), range(first, first + 5))
    assert (found.shape, found.dtype) == ((), torch.int64)


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(0, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
    base=st.sampled_from([0, 3, 8 * BLOCK - 300]),
)
def test_parts_add_up(dtype: Any, count: int, cuts: list[int], base: int) -> None:
    whole = noise(count, dtype)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    parts = [int(digest(whole[low:high], base + low)) for low, high in itertools.pairwise(edges)]
    assert (sum(parts) - int(digest(whole, base))) % NUMBER == 0


@pytest.mark.parametrize("world", [2, 3, 7])
def test_parts_of_many_blocks_add_up(world: int) -> None:
    """Longer than what is handled at once, cut at no boundary of anything."""
    whole = noise(BLOCK * 8 * (2 * CPU_ROWS + 1) // 2 + 5, torch.bfloat16)
    size = len(whole)
    edges = [size * rank // world for rank in range(world + 1)]
    parts = [int(digest(whole[low:high], low)) for low, high in itertools.pairwise(edges)]
    assert (sum(parts) - int(digest(whole))) % NUMBER == 0


@given(bit=st.integers(0, 8 * 8 * 33 - 1), seed=st.integers(0, 9))
def test_every_flipped_bit_changes_it(bit: int, seed: int) -> None:
    data = noise(8 * 33, torch.uint8, seed)
    other = data.clone()
    other[bit // 8] ^= 1 << bit % 8
    assert int(digest(data)) != int(digest(other))


def test_two_flipped_bits_do_not_cancel() -> None:
    """The highest bits are the hard ones: 2**63 times any odd number is 2**63."""
    data = noise(8 * 8, torch.uint8)
    seen = {int(digest(data))}
    for one, two in itertools.combinations(range(7, 8 * len(data), 8), 2):
        other = data.clone()
        other[one // 8] ^= 1 << one % 8
        other[two // 8] ^= 1 << two % 8
        value = int(digest(other))
        assert value not in seen, (one, two)
        seen.add(value)


def test_swapped_and_moved_elements_change_it() -> None:
    data = torch.arange(64.0)
    values = {int(digest(data)), int(digest(data, 1)), int(digest(data.roll(1))), int(digest(-data))}
    for one, two in itertools.combinations(range(64), 2):
        other = data.clone()
        other[[one, two]] = other[[two, one]]
        values.add(int(digest(other)))
    blocks = torch.zeros(3 * BLOCK, dtype=torch.int64)
    blocks[:BLOCK] = noise(BLOCK, torch.int64)
    values |= {int(digest(blocks)), int(digest(blocks.roll(BLOCK))), int(digest(blocks.roll(2 * BLOCK)))}
    assert len(values) == 4 + 64 * 63 // 2 + 3


def test_a_view_that_lies_crooked_in_memory_counts_the_same() -> None:
    data = noise(400, torch.bfloat16)
    assert int(digest(data[3:].clone(), 0)) == int(digest(data[3:], 0))
    block = noise(8 * BLOCK + 6, torch.uint8)
    assert int(digest(block[3 : 8 * BLOCK + 3])) == int(digest(block[3 : 8 * BLOCK + 3].clone()))


def test_text_is_sixteen_digits_of_the_wrapped_sum() -> None:
    assert (to_text(-1), to_text(2**64 + 5)) == ("f" * 16, "0" * 15 + "5")


@pytest.mark.parametrize("rows", [1, CPU_ROWS + 1, 2 * GPU_ROWS + 1])
def test_both_ways_to_add_up_rows_are_the_same(rows: int) -> None:
    """The one of the GPU and the one of the CPU, on numbers that overflow."""
    words, low, high = (
        noise(count * 5, torch.int64, seed).view(count, 5) for seed, count in ((1, rows), (2, 1), (3, 1))
    )
    one = digesting._row_sums(words, low[0], high[0])  # noqa: SLF001
    assert torch.equal(one, digesting._row_sums_numpy(words, low[0], high[0]))  # noqa: SLF001


def test_many_tensors_at_once_have_the_digests_they_have_alone() -> None:
    parts = [
        (noise(count, dtype, count), begin)
        for count, dtype, begin in (
            (5, torch.uint8, 3),
            (0, torch.float32, 9),
            (BLOCK * 9, torch.int64, 0),
            (70, torch.bfloat16, 40 * BLOCK),
        )
    ]
    assert digests(parts).tolist() == [int(digest(*part)) for part in parts]
    assert digests([]).tolist() == []
