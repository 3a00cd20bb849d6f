"""Ops of a CPU against the reference."""

from __future__ import annotations

import pytest
import torch

from nmoe.effects.device import cpu
from nmoe.pure.model.experts import moe_experts
from nmoe.pure.model.route import Routing

EXPERTS, WIDTH, HIDDEN = 16, 12, 6


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (1, 1), (3, 4), (7, 2), (8, 2)])
def test_a_few_rows_are_the_rows_of_the_reference(tokens: int, top_k: int) -> None:
    """Output, counts and gradients in fp64, on both sides of the number of rows from which on they are grouped."""
    generator = torch.Generator().manual_seed(tokens)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight = values(tokens, WIDTH), values(tokens, top_k)
    up, down = values(EXPERTS, WIDTH, 2, HIDDEN), values(EXPERTS, HIDDEN, WIDTH)
    choices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    few = cpu.few_rows(x, Routing(choices, weight), up, down)
    whole = moe_experts(x, Routing(choices, weight), up, down)
    assert torch.equal(few[1], whole[1])
    torch.testing.assert_close(few[0], whole[0], rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight, up, down)) for y, _ in (few, whole)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    if tokens * top_k < EXPERTS:
        assert torch.equal(cpu.moe_experts(x, Routing(choices, weight), up, down)[0], few[0])
