"""The router and the routed experts of a few tokens against `pure`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.moe import few
from nmoe.pure.model import experts, route
from nmoe.pure.model.route import Routing
from tests.kernels.truth import check, normal

ROUTES: dict[str, dict[str, Any]] = {
    "sigmoid": {"top_k": 3, "scale": 2.5},
    "softmax, not normalised": {"top_k": 1, "softmax": True, "normalize": False, "scale": 0.5},
    "all experts": {"top_k": 9, "softmax": True},
}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ROUTES)
def test_a_token_goes_where_the_reference_sends_it(name: str, shifted: bool) -> None:
    """Widths that fill no block; a bias that changes choices; two experts of equal scores."""
    x, router, bias = normal(5, 150), normal(150, 9, seed=1) / 8, normal(9, seed=2) / 4
    router[:, 7], bias[7] = router[:, 2], bias[2]
    shift = normal(9, seed=3) if shifted else ()
    got = few.route(x, router, bias, shift, **ROUTES[name])
    right = route.route_tokens(
        *(x.double(), router.double(), bias.double(), shift.double() if isinstance(shift, Tensor) else ()),
        **ROUTES[name],
    )
    plain = route.route_tokens(x, router, bias, shift, **ROUTES[name])
    assert torch.equal(got.routing.expert, right.routing.expert) and torch.equal(got.favoured, right.favoured)
    assert name == "all experts" or not torch.equal(got.routing.expert, got.favoured), "the bias decides"
    check(
        [got.score, got.routing.weight],
        [plain.score, plain.routing.weight],
        [right.score, right.routing.weight],
        factor=4,
        steps=4,
    )


def test_scores_that_vanish_have_equal_weights() -> None:
    x, router = torch.ones(1, 4), torch.full((4, 5), -60.0)
    got = few.route(x, router, torch.zeros(5), top_k=2, scale=2.0).routing
    assert got.expert.tolist() == [[0, 1]]
    torch.testing.assert_close(got.weight, torch.ones(1, 2))


def test_logits_that_are_no_numbers_are_the_largest() -> None:
    """As in the sort of the reference: text whose logits are not finite ends with an error, not with an index."""
    x, router = torch.tensor([[float("nan"), 0.0]]), normal(2, 5)
    got = few.route(x, router, torch.zeros(5), top_k=2)
    assert got.routing.expert.tolist() == [[0, 1]] and got.score.isnan().all()


FORMS: dict[str, dict[str, Any]] = {"plain": {}, "biases": {"bias": True}, "clamped": {"limit": 0.7, "alpha": 1.702}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_experts_are_the_reference(form: str, dtype: torch.dtype) -> None:
    """Sizes that fill no block; two tokens share experts, and one expert has none."""
    tokens, width, inner, num_experts = 3, 150, 70, 7
    x, up, down = (
        normal(*shape, seed=seed) / scale
        for seed, (shape, scale) in enumerate(
            [((tokens, width), 1), ((num_experts, width, 2, inner), 12), ((num_experts, inner, width), 8)]
        )
    )
    settings = dict(FORMS[form])
    bias = normal(num_experts, 2, inner, seed=5) if settings.pop("bias", False) else ()
    routing = Routing(torch.tensor([[5, 1], [1, 6], [0, 3]]), normal(tokens, 2, seed=6))
    operands = [tensor.to(dtype) if isinstance(tensor, Tensor) else () for tensor in (x, up, down, bias)]

    def run(mixture: Any, to: torch.dtype) -> list[Tensor]:
        x, up, down, bias = (tensor.to(to) if isinstance(tensor, Tensor) else () for tensor in operands)
        y, count = mixture(x, routing, up, down, bias, **settings)
        assert count.tolist() == [1, 2, 0, 1, 0, 1, 1] and count.dtype is torch.int64
        return [y]

    check(run(few.moe_experts, dtype), run(experts.moe_experts, dtype), run(experts.moe_experts, torch.float64))


def test_many_pairs_are_the_reference() -> None:
    """Which are cut up otherwise than those of a token."""
    x, up, down = normal(16, 64), normal(6, 64, 2, 48, seed=1) / 8, normal(6, 48, 64, seed=2) / 8
    routing = Routing(torch.stack([torch.randperm(6)[:2] for _ in range(16)]), normal(16, 2, seed=3))
    got, plain = few.moe_experts(x, routing, up, down)[0], experts.moe_experts(x, routing, up, down)[0]
    right = experts.moe_experts(x.double(), routing, up.double(), down.double())[0]
    check([got], [plain], [right])


def test_a_token_does_not_depend_on_others() -> None:
    x, up, down = normal(4, 64), normal(6, 64, 2, 48, seed=1), normal(6, 48, 64, seed=2)
    routing = Routing(torch.tensor([[5, 1], [1, 3], [0, 2], [4, 5]]), normal(4, 2, seed=3))
    together, _ = few.moe_experts(x, routing, up, down)
    for at in range(4):
        alone, _ = few.moe_experts(
            x[at : at + 1], Routing(routing.expert[at : at + 1], routing.weight[at : at + 1]), up, down
        )
        assert torch.equal(alone[0], together[at])
