"""What holds for every op by kernels: arguments and incoming gradients stay as they are; one derivative alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels import loss, norm
from nmoe.effects.kernels.attention import gqa, mla, project
from nmoe.effects.kernels.moe import combine, report, router, swiglu
from nmoe.effects.kernels.moe.moe import moe_experts
from nmoe.effects.kernels.optim import adamw
from nmoe.pure.model.rope import table
from nmoe.pure.model.route import Routing, top_k
from tests.kernels.attention import test_gqa, test_mla
from tests.kernels.exchange.ranks import chosen
from tests.kernels.exchange.test_exchange import TILES
from tests.kernels.truth import normal

SCORE, BIAS = torch.sigmoid(normal(2, 5, 8)), torch.linspace(0, 0.3, 8)
EXPERT = chosen("random", 6, 4, 2)
ROPE = table(9, 4, theta=100.0, yarn=None)


def experts(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return moe_experts(x, Routing(EXPERT, weight), up, down, tiles=TILES)[0]


OPS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "norm": (partial(norm.rms_norm, eps=1e-5), (normal(5, 24), normal(24, seed=1))),
    "add, norm": (partial(norm.add_rms_norm, eps=1e-5), (normal(5, 24), normal(5, 24, seed=1), normal(24, seed=2))),
    "swiglu": (swiglu.swiglu, (normal(5, 2, 24),)),
    "loss": (
        lambda x, head, target: loss.linear_cross_entropy(x, head, target, chunk=4)[0],
        (normal(6, 16), normal(16, 40, seed=1), torch.tensor([3, -1, 0, 39, 7, 7])),
    ),
    "scores": (router.scores, (normal(6, 16, dtype=torch.bfloat16), normal(16, 8, seed=1))),
    "report": (
        lambda score, favoured, expert: report.report(score, favoured, BIAS, expert, margins=True)[:2],
        (SCORE, top_k(SCORE, 2), top_k(SCORE.flatten(0, 1) + BIAS, 2)),
    ),
    "route": (
        lambda x, w: (told := router.route(x, w, BIAS, top_k=3), (told.score, told.routing.weight))[1],
        (normal(6, 16, dtype=torch.bfloat16), normal(16, 8, seed=1)),
    ),
    "project": (
        partial(project.project, rope=ROPE, num_heads=2, latent=16),
        (normal(2, 9, 16), normal(16, 2 * 12 + 16 + 4, seed=1)),
    ),
    "query": (partial(project.query, rope=ROPE), (normal(2, 9, 16), normal(16, 2, 12, seed=1), normal(2, 9, 4))),
    "attention": (
        partial(mla.mla_attention, scale=0.3, tiles=test_mla.tiles(16, 16)),
        test_mla.sample(1, 20, 2, (24, 16, 8), dtype=torch.float16)[0],
    ),
    "project, grouped": (
        partial(gqa.project, rope=ROPE, num_heads=2),
        (normal(2, 9, 16), normal(16, 4, 4, seed=1)),
    ),
    "attention, grouped": (
        partial(gqa.gqa_attention, scale=0.3, window=5, tiles=test_gqa.Same()),
        (normal(1, 20, 2, 64), normal(1, 20, 1, 64, seed=1), normal(1, 20, 1, 64, seed=2), normal(2, seed=3)),
    ),
    "experts": (
        experts,
        (normal(6, 16), normal(6, 2, seed=1), normal(4, 16, 2, 16, seed=2), normal(4, 16, 16, seed=3)),
    ),
    "choice": (partial(router.top_k, num=3), (normal(6, 8),)),
    "combine": (combine.combine, (normal(12, 16), torch.arange(12, dtype=torch.int32).view(6, 2), normal(6, 2).abs())),
    "global norm": (lambda *arenas: adamw.global_norm(arenas), (normal(64), normal(48, seed=1))),
}
DIFFERENTIABLE = [name for name in OPS if name not in ("choice", "combine", "global norm")]


def called(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Arguments of an op, those of them that have a gradient, and its differentiable results."""
    op, inputs = OPS[name]
    arguments = [x.clone().requires_grad_(name in DIFFERENTIABLE and x.is_floating_point()) for x in inputs]
    results = op(*arguments)
    results = results if isinstance(results, Sequence) else (results,)
    return arguments, [x for x in arguments if x.requires_grad], [x for x in results if x.requires_grad]


@pytest.mark.parametrize("name", OPS)
def test_arguments_stay_as_they_are(name: str) -> None:
    arguments, leaves, results = called(name)
    pulls = [normal(*x.shape, seed=5, dtype=x.dtype) for x in results]
    kept = [x.clone() for x in pulls]
    if leaves:
        torch.autograd.grad(results, leaves, pulls)
    assert all(torch.equal(x, before) for x, before in zip(arguments, OPS[name][1], strict=True))
    assert all(torch.equal(x, before) for x, before in zip(pulls, kept, strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_that_is_one_number_expanded(name: str) -> None:
    """As that of a sum is: the same bits as laid out."""
    _, leaves, results = called(name)
    expanded = [torch.full((), 0.5, dtype=x.dtype).expand(x.shape) for x in results]
    found = torch.autograd.grad(results, leaves, expanded, retain_graph=True)
    wanted = torch.autograd.grad(results, leaves, [x.contiguous() for x in expanded])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(name: str) -> None:
    """Also beside one that is there: it was dropped from the sum without a word."""
    _, leaves, results = called(name)
    total = torch.stack([x.float().square().sum() for x in results]).sum() if name != "loss" else results[0]
    total = total + leaves[0].float().square().sum()
    with pytest.raises(RuntimeError, match="expected a first derivative, got create_graph=True"):
        torch.autograd.grad(total, leaves, create_graph=True)
