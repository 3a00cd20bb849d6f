"""The router's kernels against `pure.route`, on ties, infinities and what is not a number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmoe.effects.kernels.moe import router
from nmoe.pure.model import route
from tests.kernels.truth import check, graded, normal

ODD = [0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 3.4e38]


@pytest.mark.parametrize(("shape", "num"), [((37, 64), 6), ((2, 5, 9), 3), ((1, 1), 1), ((8, 40), 40)], ids=str)
def test_the_first_are_those_of_a_stable_sort(shape: tuple[int, ...], num: int) -> None:
    x = normal(*shape)
    assert torch.equal(router.top_k(x, num), route.top_k(x, num))
    ties = (4 * x).round()
    assert torch.equal(router.top_k(ties, num), route.top_k(ties, num))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(ODD), min_size=7, max_size=7), st.integers(1, 7))
def test_the_first_of_odd_numbers(numbers: list[float], num: int) -> None:
    x = torch.tensor([numbers])
    assert torch.equal(router.top_k(x, num), route.top_k(x, num))


def test_three_parts_are_the_whole() -> None:
    """To the last bit, in fp64, where their sum is exact."""
    x = torch.cat((normal(4096), normal(4096, seed=1) * 1e20, normal(4096, seed=2) * 1e-20, torch.zeros(1)))
    assert torch.equal(torch.stack([each.double() for each in router.split_bf16x3(x)]).sum(0), x.double())


def test_scores_are_as_near_the_truth_as_those_in_fp32() -> None:
    """Tokens in bf16, the router in fp32, a bf16 gradient back to the tokens."""
    x, w, grad_output = normal(300, 96, dtype=torch.bfloat16), normal(96, 12, seed=1) / 10, [normal(300, 12, seed=2)]
    plain = graded(route.scores, [x, w], grad_output)
    truth = graded(route.scores, [x, w], grad_output, torch.float64)
    found = graded(router.scores, [x, w], grad_output)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.float32]
    check(found, plain, truth, factor=1.1)


def test_a_product_of_rounded_factors_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        high = x.to(torch.bfloat16)
        return high, torch.zeros_like(high), torch.zeros_like(high)

    monkeypatch.setattr(router, "split_bf16x3", rounded)
    with pytest.raises(AssertionError, match="result 0"):
        test_scores_are_as_near_the_truth_as_those_in_fp32()
