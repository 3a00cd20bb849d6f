"""Replayed choices, dense models, derivatives of any order, and misuse that ends in an error."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.pure.core import tree
from nmoe.pure.model import model
from nmoe.pure.model.loss import linear_cross_entropy
from nmoe.pure.model.route import Routing, route
from tests import shapes

C = shapes.config()
SHARE: dict[str, Any] = {"num_targets": torch.tensor(18), "num_sequences": 2, "chunk": 8, "z_loss": 1e-3}


def graded(routing: tuple[Routing | Tensor, ...]) -> tuple[list[Tensor], model.RouterReport]:
    """Loss and every gradient."""
    p = shapes.parameters(C)
    loss, _, report = model.objective(
        p, shapes.batch(C), shapes.router_bias(C), shapes.env(C), C, routing=routing, **SHARE
    )
    leaves = [leaf for _, leaf in tree.leaves(p)]
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)], report


def test_own_choices_replayed_are_bitwise_the_same() -> None:
    right, report = graded(())
    ours, _ = graded(tuple(layer.expert for layer in report.routing))
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))
    loss, _ = graded(report.routing)
    assert torch.equal(loss[0], right[0])


def test_other_choices_are_taken_and_gradients_flow_through_their_gates() -> None:
    right, report = graded(())
    others = tuple((layer.expert + 1) % C.moe.num_experts for layer in report.routing)
    ours, replayed = graded(others)
    assert all(torch.equal(a.expert, b) for a, b in zip(replayed.routing, others, strict=True))
    assert not torch.equal(ours[0], right[0])
    # without the balance loss a router's gradient comes through the gates alone
    p, c = shapes.parameters(C), attrs.evolve(C, moe=attrs.evolve(C.moe, sequence_balance=0.0))
    loss = model.objective(p, shapes.batch(C), shapes.router_bias(C), shapes.env(C), c, routing=others, **SHARE)[0]
    loss.backward()
    assert all(block.ffn.router.grad.abs().sum() > 0 for block in p.blocks if isinstance(block.ffn, model.Moe))


def test_a_dense_model_has_a_loss_and_no_router() -> None:
    c = shapes.config(num_dense_layers=3)
    p = shapes.parameters(c)
    loss, _, report = model.objective(p, shapes.batch(c), shapes.router_bias(c), shapes.env(c), c, **SHARE)
    loss.backward()
    assert report.load.shape == (0, c.moe.num_experts) and report.routing == ()
    assert all(leaf.grad is not None for _, leaf in tree.leaves(p))


def test_functional_gradients_are_those_of_backward() -> None:
    p = shapes.parameters(C)
    right = graded(())[0][1:]

    def loss(p: model.Transformer) -> Tensor:
        return model.objective(p, shapes.batch(C), shapes.router_bias(C), shapes.env(C), C, **SHARE)[0]

    ours = torch.func.grad(loss)(tree.map(lambda _, leaf: leaf.detach(), p))
    for (path, one), other in zip(tree.leaves(ours), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13, msg=path)


def test_second_derivatives_of_the_chunked_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((7, 5), (5, 9)))
    target = torch.tensor([1, -1, 3, 0, 8, 2, 5])

    def loss(x: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(x, head, target, chunk=3, logit_scale=0.7, z_loss=0.1)[0]

    assert torch.autograd.gradgradcheck(loss, (x, head))


ROUTING = torch.zeros(22, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokens": torch.zeros(11, dtype=torch.int64)}, r"forward: expected tokens \[B T\]"),
        ({"bias": torch.zeros(1, 1)}, r"forward: expected a router bias of shape \[2, 8\], got \[1, 1\]"),
        ({"start": torch.zeros(2, 1, dtype=torch.int32)}, "forward: expected start"),
        ({"routing": (ROUTING,)}, "forward: expected a routing for each of the 2 MoE layers, got 1"),
        ({"routing": (ROUTING[:-1], ROUTING)}, r"replay: expected routing.expert of shape \[22, 3\]"),
        ({"routing": (ROUTING.int(), ROUTING)}, "replay: expected routing.expert in i64"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: str) -> None:
    given: dict[str, Any] = {"tokens": shapes.batch(C).tokens, "bias": shapes.router_bias(C)} | change
    with pytest.raises(ValueError, match=error):
        model.forward(shapes.parameters(C), env=shapes.env(C), c=C, **given)


def test_a_router_refuses_a_bias_that_would_broadcast_and_more_choices_than_experts() -> None:
    with pytest.raises(ValueError, match=r"route: expected a bias of shape \[4\], got \[1\]"):
        route(torch.rand(3, 4), torch.zeros(1), top_k=2)
    with pytest.raises(ValueError, match="route: expected top_k from 1 to the 4 experts"):
        route(torch.rand(3, 4), torch.zeros(4), top_k=5)
