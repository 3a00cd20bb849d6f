"""Dispatch, experts and combine against a loop over tokens, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.pure.model.experts import combine, dispatch, experts, mlp, swiglu
from nmoe.pure.model.route import Routing


def mixture(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """The three functions in their order."""
    routing = Routing(expert, weight)
    rows = dispatch(x, routing, num_experts=up.shape[0])
    return combine(experts(rows, up, down), rows, routing)


def by_loop(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """One token and one of its experts at a time, written out."""
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for choice in range(expert.shape[1]):
            e = int(expert[token, choice])
            gate, value = x[token] @ up[e, :, 0], x[token] @ up[e, :, 1]
            y[token] += weight[token, choice] * ((gate / (1 + torch.exp(-gate)) * value) @ down[e])
    return y


def problem(
    tokens: int, num_experts: int, top_k: int, *, seed: int, width: int = 5, hidden: int = 3
) -> tuple[Tensor, ...]:
    """Random fp64 input, experts, distinct choices and gates of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    up = torch.randn(num_experts, width, 2, hidden, generator=generator, dtype=torch.float64)
    down = torch.randn(num_experts, hidden, width, generator=generator, dtype=torch.float64)
    expert = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    weight = torch.randn(tokens, top_k, generator=generator, dtype=torch.float64)
    return x, up, down, expert, weight


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.data())
def test_against_a_loop(seed: int, tokens: int, num_experts: int, data: st.DataObject) -> None:
    arguments = problem(tokens, num_experts, data.draw(st.integers(1, num_experts)), seed=seed)
    torch.testing.assert_close(mixture(*arguments), by_loop(*arguments), rtol=1e-12, atol=1e-12)


ADVERSARIAL = {
    "all rows to the first expert": [[0]] * 6,
    "all rows to the last expert": [[3]] * 6,
    "an expert without rows between two with": [[0, 2]] * 3 + [[2, 3]] * 3,
    "every expert for every token, in turned orders": [[(e + t) % 4 for e in range(4)] for t in range(6)],
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_routing(name: str) -> None:
    expert = torch.tensor(ADVERSARIAL[name])
    x, up, down, _, _ = problem(6, 4, 1, seed=7)
    weight = torch.randn(expert.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    arguments = (x, up, down, expert, weight)
    torch.testing.assert_close(mixture(*arguments), by_loop(*arguments), rtol=1e-12, atol=1e-12)
    check_gradients(*arguments)


def test_gradients() -> None:
    check_gradients(*problem(7, 4, 2, seed=9))


def check_gradients(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, weight: Tensor) -> None:
    """Finite differences in fp64, the gates' gradient included; the loop agrees on all of them."""
    leaves = [each.detach().requires_grad_() for each in (x, up, down, weight)]
    assert torch.autograd.gradcheck(
        lambda x, up, down, weight: mixture(x, up, down, expert, weight), leaves, fast_mode=True
    )
    grad_output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    ours, right = (
        torch.autograd.grad(fn(leaves[0], leaves[1], leaves[2], expert, leaves[3]), leaves, grad_output)
        for fn in (mixture, by_loop)
    )
    torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


def test_rows_are_sorted_by_expert_and_then_by_token() -> None:
    routing = Routing(torch.tensor([[2, 0], [0, 3], [2, 3]]), torch.ones(3, 2))
    rows = dispatch(torch.zeros(3, 1), routing, num_experts=5)
    assert rows.expert.tolist() == [0, 0, 2, 2, 3, 3]
    assert rows.source.tolist() == [0, 1, 0, 2, 1, 2]
    assert rows.slot.tolist() == [1, 2, 0, 4, 3, 5]
    assert rows.count.tolist() == [2, 0, 2, 2, 0]


def test_combine_adds_in_fp32() -> None:
    """In bf16, 256 + 1 is 256: the ones would be lost one by one."""
    routing = Routing(torch.arange(5)[None], torch.ones(1, 5))
    rows = dispatch(torch.zeros(1, 1), routing, num_experts=5)
    y = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    total = combine(y, rows, routing)
    assert total.dtype == torch.bfloat16
    assert total.item() == 260.0


def test_combine_weighs_in_fp32() -> None:
    """1 + 2**-9 is 1 in bf16: the difference would be nothing."""
    routing = Routing(torch.tensor([[0, 1]]), torch.tensor([[1 + 2.0**-9, 1.0]]))
    rows = dispatch(torch.zeros(1, 1), routing, num_experts=2)
    assert combine(torch.tensor([[128.0], [-128.0]], dtype=torch.bfloat16), rows, routing).item() == 0.25


def test_mlp_and_its_activation() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64)  # gates, then values
    expected = [1 / (1 + math.exp(-1)) * 3, -2 / (1 + math.exp(2)) * 5]
    assert swiglu(x).tolist() == pytest.approx(expected, rel=1e-14)
    up = x[None]  # one input channel
    down = torch.tensor([[1.0], [10.0]], dtype=torch.float64)
    single = torch.ones(1, 1, dtype=torch.float64)
    assert mlp(single, up, down).item() == pytest.approx(expected[0] + 10 * expected[1], rel=1e-14)
