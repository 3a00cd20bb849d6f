"""The router's kernels against `pure.route`, on ties, infinities and what is not a number."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("num", [0, 6, 7])
def test_more_choices_than_there_are_is_refused(num: int) -> None:
    """It was index 7 of 5."""
    with pytest.raises(ValueError, match=f"from 1 to 5 entries of 5, got {num}; lower top_k"):
        router.top_k(normal(2, 5), num)


@pytest.mark.parametrize("logits", [(-120.0, -120.0, -120.0), (-95.0, -110.0, -3e38), (-88.0, -104.0, 0.0)], ids=str)
def test_scores_that_vanish_have_weights(logits: tuple[float, ...]) -> None:
    """Sigmoid is 0 in fp32 below -103, and the weights of chosen zeros were 0/0; their gradients are finite, too."""
    x = torch.eye(3, dtype=torch.bfloat16)[:1].expand(2, 3).requires_grad_()
    w = torch.zeros(3, 3).index_copy(0, torch.tensor([0]), torch.tensor([logits])).requires_grad_()
    told = route.route_tokens(
        x, w, torch.zeros(3), top_k=2, scale=2.5, score=router.scores, select=router.top_k
    ).routing
    assert torch.allclose(told.weight.sum(-1), torch.tensor(2.5), rtol=1e-6)
    found = torch.autograd.grad(told.weight, [x, w], normal(2, 2))
    assert all(gradient.isfinite().all() for gradient in found)


def test_three_parts_are_the_whole() -> None:
    """To the last bit, in fp64, where their sum is exact."""
    x = torch.cat((normal(4096), normal(4096, seed=1) * 1e20, normal(4096, seed=2) * 1e-20, torch.zeros(1)))
    assert torch.equal(torch.stack([each.double() for each in router.split_bf16x3(x)]).sum(0), x.double())


@pytest.mark.parametrize("shape", [(96, 12), (768, 64), (5, 300)], ids=str)
def test_a_router_in_parts_has_the_bits_of_torch(shape: tuple[int, int]) -> None:
    """Infinities and numbers of which the low parts vanish, too; no part is where another one belongs."""
    w = normal(*shape)
    w[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 3.3e38])
    w[1] *= 1e-36
    high, middle, low = router.split_bf16x3(w)
    for found, wanted in zip(router.split_router(w), ((high, middle, low), (high, middle, high)), strict=True):
        wanted = torch.cat(wanted, -1)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7).view(torch.int16), wanted.nan_to_num(7).view(torch.int16))


def test_scores_are_as_near_the_truth_as_those_in_fp32() -> None:
    """Tokens in bf16, the router in fp32, a bf16 gradient back to the tokens."""
    x, w, grad_output = normal(300, 96, dtype=torch.bfloat16), normal(96, 12, seed=1) / 10, [normal(300, 12, seed=2)]
    plain = graded(route.scores, [x, w], grad_output)
    truth = graded(route.scores, [x, w], grad_output, torch.float64)
    found = graded(router.scores, [x, w], grad_output)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.float32]
    check(found, plain, truth, factor=1.1)


@pytest.mark.parametrize("softmax", (True, False))
def test_logits_with_a_shift_are_as_near_the_truth(softmax: bool) -> None:
    name = "softmax_scores" if softmax else "scores"
    inputs = [normal(300, 96, dtype=torch.bfloat16), normal(96, 12, seed=1) / 10, normal(12, seed=3)]
    pulls = [normal(300, 12, seed=2)]
    plain = graded(getattr(route, name), inputs, pulls)
    truth = graded(getattr(route, name), inputs, pulls, torch.float64)
    check(graded(getattr(router, name), inputs, pulls), plain, truth, factor=1.1)


def test_a_product_of_rounded_factors_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(w: Tensor) -> tuple[Tensor, Tensor]:
        high = w.to(torch.bfloat16)
        parts = torch.cat((high, torch.zeros(len(w), 2 * w.shape[1], dtype=high.dtype)), -1)
        return parts, parts

    monkeypatch.setattr(router, "split_router", rounded)
    with pytest.raises(AssertionError, match="result 0"):
        test_scores_are_as_near_the_truth_as_those_in_fp32()


@pytest.mark.parametrize(("rows", "experts"), [(100, 12), (3, 64), (5, 300)])
def test_the_gradient_of_scores_has_the_bits_of_torch(rows: int, experts: int) -> None:
    """Infinities, what is no number, negative zeros, and numbers of which the low parts vanish, too."""
    gradient, score = normal(rows, experts), torch.sigmoid(normal(rows, experts, seed=1))
    gradient[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 3.3e38])
    gradient[1] *= 1e-36
    gradient[2, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    high, middle, low = router.split_bf16x3(gradient * score * (1 - score))
    narrow, wide = router.score_gradient(gradient, score)
    for found, wanted in ((narrow, torch.cat((high, high, middle), -1)), (wide, torch.cat((high, middle, low), -1))):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7).view(torch.int16), wanted.nan_to_num(7).view(torch.int16))


SIZES = [(37, 64, 4), (100, 40, 3), (6, 8, 8), (70, 256, 8), (1, 2, 1)]
"""Tokens, experts and choices: blocks that are not full, one that is."""


def operands(tokens: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a router and a bias that changes choices; two experts are equal, some scores small."""
    x, router, bias = (
        normal(tokens, 96, dtype=torch.bfloat16),
        normal(96, experts, seed=1) / 8,
        normal(experts, seed=2) / 4,
    )
    router[:, -1], bias[-1] = router[:, 0], bias[0]
    x[::7, :48] = 4
    router[:48] -= 0.02
    return x, router, bias


def routed(which: Any, bias: Tensor, **how: Any) -> Any:
    """Scores and weights, which have gradients."""

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        told = which(x, w, bias.to(w.dtype), **how)
        return told.score, told.routing.weight

    return run


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_route_is_as_near_the_truth(size: tuple[int, int, int], normalize: bool) -> None:
    tokens, experts, top_k = size
    x, w, bias = operands(tokens, experts)
    how: dict[str, Any] = {"top_k": top_k, "scale": 2.5, "normalize": normalize}
    pulls = [normal(tokens, experts, seed=3) / 50, normal(tokens, top_k, seed=4)]
    plain = graded(routed(route.route_tokens, bias, **how), [x, w], pulls)
    truth = graded(routed(route.route_tokens, bias, **how), [x, w], pulls, torch.float64)
    check(graded(routed(router.route, bias, **how), [x, w], pulls), plain, truth, factor=1.5, steps=2, floor=1e-6)
    found, wanted = router.route(x, w, bias, **how), route.route_tokens(x.double(), w.double(), bias.double(), **how)
    assert torch.equal(found.routing.expert, wanted.routing.expert)
    assert torch.equal(found.favoured, wanted.favoured)
    assert tokens == 1 or top_k == experts or not torch.equal(found.favoured, found.routing.expert), "the bias decides"


@pytest.mark.parametrize("place", [0, 1])
def test_scores_alone_or_weights_alone_have_a_gradient(place: int) -> None:
    """Where nothing follows from the other, its gradient is zero."""
    x, w, bias = operands(20, 12)
    pulls = [(normal(20, 12, seed=3), normal(20, 3, seed=4))[place]]

    def run(which: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        return graded(lambda *a: routed(which, bias, top_k=3)(*a)[place], [x, w], pulls, dtype)

    check(run(router.route), run(route.route_tokens), run(route.route_tokens, torch.float64), factor=1.5, steps=2)


@pytest.mark.parametrize(
    "logits", [(-120.0, -120.0, -120.0), (-95.0, -110.0, -3e38), (-45.0, -46.0, -50.0), (-88.0, -104.0, 0.0)], ids=str
)
def test_a_route_by_scores_that_vanish(logits: tuple[float, ...]) -> None:
    """As through `scores`, whose sigmoids are 0 in fp32 below -103."""
    x = torch.eye(3, dtype=torch.bfloat16)[:1].expand(2, 3).requires_grad_()
    w = torch.zeros(3, 3).index_copy(0, torch.tensor([0]), torch.tensor([logits])).requires_grad_()
    found = router.route(x, w, torch.zeros(3), top_k=2, scale=2.5).routing
    wanted = route.route_tokens(x, w, torch.zeros(3), top_k=2, scale=2.5, score=router.scores).routing
    assert torch.equal(found.expert, wanted.expert)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-5, atol=0)
    ours, plain = (torch.autograd.grad(told.weight, [x, w], normal(2, 2)) for told in (found, wanted))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-30)


def test_logits_that_are_no_numbers_are_the_largest() -> None:
    x, w = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]], dtype=torch.bfloat16), normal(2, 5)
    told = router.route(x, w, torch.zeros(5), top_k=2)
    assert told.routing.expert[0].tolist() == [0, 1] and told.score[0].isnan().all() and told.score[1].isfinite().all()
