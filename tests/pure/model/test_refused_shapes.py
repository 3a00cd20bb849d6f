"""Arguments that would broadcast or be cut off in silence are refused, each with what was expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nmoe.pure.core.init import initial, normal
from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import Role, Spec
from nmoe.pure.model.experts import moe_experts
from nmoe.pure.model.loss import linear_cross_entropy
from nmoe.pure.model.norm import add_rms_norm, rms_norm
from nmoe.pure.model.rope import Rope, rotate
from nmoe.pure.model.route import Routing, balance, route, top_k

FOUR = torch.full((3, 4), 0.5)
CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: route(FOUR, torch.zeros(4), top_k=9), "route: expected top_k from 1 to the 4 experts .*, got 9; "),
    (lambda: route(FOUR, torch.zeros(1, 1), top_k=2), r"route: expected a bias of shape \[4\], got \[1, 1\]; "),
    (lambda: top_k(FOUR, 5), "top_k: expected num from 1 to the 4 entries of the last axis, got 5; "),
    (lambda: top_k(FOUR, 0), "top_k: expected num from 1 to the 4 entries of the last axis, got 0; "),
    (
        lambda: balance(torch.zeros(2, 4), torch.ones(4, dtype=torch.int64), rate=1.0),
        r"balance: expected a load of the shape of the bias \[2, 4\], got \[4\]; ",
    ),
    (
        lambda: linear_cross_entropy(torch.ones(5, 2), torch.ones(2, 7), torch.zeros(3, dtype=torch.int64), chunk=8),
        r"linear_cross_entropy: expected a target for each of 5 rows, got shape \[3\]; ",
    ),
    (
        lambda: moe_experts(
            torch.ones(3, 2),
            Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)),
            torch.ones(4, 2, 2, 5),
            torch.ones(4, 5, 2),
        ),
        r"dispatch: expected choices for each of 3 tokens, got shape \[2, 1\]; ",
    ),
    (lambda: rms_norm(FOUR, torch.ones(1), eps=1e-6), r"rms_norm: expected a gain of shape \[4\], got \[1\]; "),
    (
        lambda: add_rms_norm(FOUR, torch.ones(4), torch.ones(4), eps=1e-6),
        r"add_rms_norm: expected y of the shape of x \[3, 4\], got \[4\]; ",
    ),
    (
        lambda: rotate(torch.ones(1, 5, 2), Rope(torch.ones(4, 1), torch.ones(4, 1))),
        "rotate: expected at most the 4 positions of the table, got 5; ",
    ),
    (
        lambda: initial(Key(0), "up", Spec(("E", "D"), Role.EXPERT, normal("D")), {"E": 4, "D": 2}, world=3),
        "initial: expected a number of ranks that divides the 4 experts of 'up', got 3; ",
    ),
]


@pytest.mark.parametrize(("call", "expected"), CASES, ids=[text[:40] for _, text in CASES])
def test_refused(call: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}"):
        call()
