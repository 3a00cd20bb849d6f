"""Exact sums: the same in any order, right beside fp64, never beyond 64 bits, and never finite where a part is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.attention.exact import Sums, add_parts_


@triton.jit(do_not_specialize=["stride"])
def add(
    parts, keys, order, sums, fixed, wrong, limit, stride, width, block_n: tl.constexpr, block_k: tl.constexpr
):  # fmt: skip
    """Adds rows of parts [n width] to those of the sums that `keys` has, a block a program, in an order of blocks."""
    n = tl.load(order + tl.program_id(0)) * block_n + tl.arange(0, block_n)
    channel = tl.arange(0, block_k)
    inside = (n >= 0)[:, None] & (channel < width)[None, :]
    part = tl.load(parts + n[:, None] * width + channel[None, :], mask=inside, other=0.0) * tl.load(fixed)
    add_parts_(sums, wrong, part, limit, tl.load(keys + n), stride, channel, inside)


def summed(parts: Tensor, keys: Tensor, rows: int, most: float, order: list[int] | None = None) -> Tensor:
    """Sums [rows width] of the parts of each key, in fp32."""
    blocks = parts.shape[0] // 4
    sums = Sums.of(torch.tensor([0.0, most]), parts.shape[0], (rows, parts.shape[1]), borrowed=torch.empty(0))
    sums.rows.zero_()
    told: dict[str, Any] = {**sums.arguments(), "width": parts.shape[1], "block_n": 4, "block_k": 8}
    add[(blocks,)](parts, keys, torch.tensor(order or range(blocks), dtype=torch.int32), **told)
    out = torch.empty(rows, parts.shape[1])
    sums.write_(out)
    return out


def drawn(number: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Parts of very different sizes, and the key that each is for, of three."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(3 * torch.randn(number, 1, generator=generator))
    keys = torch.randint(3, (number,), generator=generator, dtype=torch.int32)
    return scale * size * torch.randn(number, 7, generator=generator), keys


def test_the_same_in_every_order() -> None:
    parts, keys = drawn(16)
    first, *others = (
        summed(parts, keys, 3, parts.abs().max().item(), list(order)) for order in itertools.permutations(range(4))
    )
    assert first.any() and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("scale", [2.0**-80, 1.0, 2.0**80])
def test_right_to_fp32_with_a_bound_a_million_times_too_large(scale: float) -> None:
    """A part is rounded by less than 2^(n - 60) of the bound; of 2^6 parts that is 2^-34 of a part 2^20 smaller."""
    parts, keys = drawn(64, scale)
    exact = torch.zeros(3, 7, dtype=torch.float64).index_add_(0, keys, parts.double())
    found = summed(parts, keys, 3, 2.0**20 * parts.abs().max().item())
    largest = parts.abs().max().double()
    assert ((found - exact).abs() <= 2.0**-23 * exact.abs() + 2.0**-26 * largest).all()


def test_as_many_parts_as_there_may_be_at_the_bound_do_not_overflow() -> None:
    """All of the largest allowed size, twice the bound, and one sign; one step above it there is no sum."""
    parts, keys = torch.full((64, 7), -2.0), torch.zeros(64, dtype=torch.int32)
    assert torch.equal(summed(parts, keys, 1, 1.0), torch.full((1, 7), -128.0))
    largest = 4 * parts  # a bound of just below 2: a power of two above twice of it
    assert torch.equal(summed(largest / 2, keys, 1, 1.99999), torch.full((1, 7), -256.0))
    assert summed(largest, keys, 1, 1.99999).isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_no_number_or_beyond_the_bound_makes_no_sum_finite(value: float) -> None:
    parts, keys = drawn(16)
    most = parts.abs().max().item()
    parts[5, 2] = value
    assert summed(parts, keys, 3, most).isnan().all()


@pytest.mark.parametrize("most", [torch.nan, torch.inf])
def test_without_a_finite_bound_there_is_no_sum(most: float) -> None:
    parts, keys = drawn(16)
    assert summed(parts, keys, 3, most).isnan().all()


def test_zeros_and_the_smallest_numbers() -> None:
    parts, keys = torch.zeros(8, 7), torch.zeros(8, dtype=torch.int32)
    assert torch.equal(summed(parts, keys, 1, 0.0), torch.zeros(1, 7))
    parts[:] = 2.0**-126
    assert torch.equal(summed(parts, keys, 1, 2.0**-126), torch.full((1, 7), 2.0**-123))


@pytest.mark.parametrize(("elements", "dtype"), [(50, torch.float16), (43, torch.float32), (41, torch.float16)])
def test_borrowed_memory(elements: int, dtype: torch.dtype) -> None:
    """The last of it on steps of 8 bytes, or memory of its own where it is too small."""
    lent = torch.ones(elements, dtype=dtype)
    sums = Sums.of(torch.ones(1), 1, (2, 5), borrowed=lent)
    sums.rows.fill_(-1)
    taken = lent.isnan().sum().item() * lent.element_size()
    assert taken == (80 if elements * lent.element_size() >= 80 else 0)
    assert sums.rows.data_ptr() % 8 == 0 and sums.rows.shape == (2, 5)
