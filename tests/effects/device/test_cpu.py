"""Ops of a CPU against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nmoe.config import sections
from nmoe.effects.device import cpu
from nmoe.pure.core import tree
from nmoe.pure.model import norm
from nmoe.pure.model.attention import mla
from nmoe.pure.model.attention.cached import new_tokens
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


@torch.inference_mode()
def test_the_norm_of_a_few_rows_is_the_reference() -> None:
    """In fp32 against fp64, with an epsilon that counts; many rows, or those of training, are the reference's own."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 1, 24, generator=generator) for _ in range(2))
    gain = torch.randn(24, generator=generator)
    wanted = norm.add_rms_norm(x.double(), y.double(), gain.double(), eps=0.3)
    got = cpu.add_rms_norm(x, y, gain, eps=0.3)
    torch.testing.assert_close(tuple(part.double() for part in got), wanted, rtol=1e-6, atol=1e-6)
    with torch.inference_mode(False), torch.no_grad():  # as a block that is computed again for its gradient
        assert torch.equal(cpu.rms_norm(x, gain, eps=0.3), norm.rms_norm(x, gain, eps=0.3))
    many = torch.randn(cpu.FEW + 1, 24, generator=generator)
    assert torch.equal(cpu.rms_norm(many, gain, eps=0.3), norm.rms_norm(many, gain, eps=0.3))


@pytest.mark.parametrize("query_latent", [None, 6])
@torch.no_grad()
def test_a_new_token_attends_as_the_reference(query_latent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two lengths, a cache with room left: output and cache in fp32 against the reference in fp64."""
    c = sections.Mla(
        num_heads=3, q_lora_rank=query_latent, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    )
    generator = torch.Generator().manual_seed(1)
    sizes = {"D": 16, **mla.dims(c)}
    p = tree.map(lambda _, spec: torch.randn(spec.shape(sizes), generator=generator, dtype=torch.float64), mla.specs(c))
    x, cache = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((1, 16), (9, 14)))
    new = new_tokens(torch.tensor(6), (2, 1), torch.tensor([0, 4], dtype=torch.int32), 9)
    rope = mla.tables(c, 9)

    def run(attend: Any, *values: Any) -> Any:
        return attend(*values, new, rope, norm.rms_norm, mla.REFERENCE, c, eps=1e-6)

    wanted = run(mla.attend_new, p, x, cache)
    monkeypatch.setattr(mla, "attend_new", None)  # not by the reference itself
    got = run(cpu.attend_new, *tree.map(lambda _, value: value.float(), (p, x, cache)))
    torch.testing.assert_close(tuple(part.double() for part in got), wanted, rtol=1e-4, atol=1e-4)
