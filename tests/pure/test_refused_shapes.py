"""Arguments that would broadcast or be cut off in silence are refused, each with what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from nmoe.config.sections import Mtp
from nmoe.pure.checkpoint.pieces import arena_pieces, share, whole
from nmoe.pure.core.init import init, initial, normal
from nmoe.pure.core.key import Key
from nmoe.pure.core.layout import ArenaLayout, layout
from nmoe.pure.core.spec import Role, Spec
from nmoe.pure.cost.traffic import distinct_ranks
from nmoe.pure.data.order import quotas, stretch
from nmoe.pure.formats.master import join, split
from nmoe.pure.model.attention.gqa import attend_gqa
from nmoe.pure.model.attention.mla import attend_mla
from nmoe.pure.model.experts import dispatch, experts, mlp, moe_experts
from nmoe.pure.model.loss import linear_cross_entropy
from nmoe.pure.model.model import dims, forward, specs
from nmoe.pure.model.norm import add_rms_norm, rms_norm
from nmoe.pure.model.ops import environment
from nmoe.pure.model.rope import Rope, rotate, table
from nmoe.pure.model.route import (
    BINS,
    Routing,
    balance,
    balance_quantile,
    gates,
    margin_histogram,
    replay,
    route,
    sequence_imbalance,
    top_k,
)
from nmoe.pure.optim.adamw import adamw
from nmoe.pure.optim.muon import muon
from nmoe.pure.optim.update import TreeState, tree_update
from nmoe.pure.parallel.exchange_arena import expert_rows
from nmoe.pure.parallel.exchange_plan import owners, plan
from nmoe.pure.watch.curve import smooth
from tests.effects.train.tiny import tiny

FOUR = torch.full((3, 4), 0.5)
HEADS = torch.ones(2, 4, 2, 6)
CHOICES = torch.zeros(3, 2, dtype=torch.int64)
DIMS = {"E": 4, "D": 2}
EXPERTS = Spec(("E", "D"), Role.EXPERT, normal("D"))
GAIN = Spec(("D",), Role.GAIN, normal("D"))
ONE: dict[str, Any] = {"updates": torch.ones(()), "lr": torch.ones((), dtype=torch.float64), "decay": 0.0}
ADAMW: dict[str, Any] = {**ONE, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8}
MUON: dict[str, Any] = {**ONE, "momentum": 0.9, "by_matrix": lambda apply, tensor: apply(tensor), "bf16": False}


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def placed(**sizes: int) -> tuple[ArenaLayout, ...]:
    rules = {"dense": "adamw", "expert": "adamw", "router": "adamw"}
    return layout(EXPERTS, DIMS, optimizers=rules, compute="fp32", moments="fp32", microbatches=1, **sizes)


def updated(gradient: torch.Tensor, moment: torch.Tensor) -> object:
    state = TreeState(ints(), ((moment, torch.zeros(4)),))
    return tree_update((torch.zeros(4),), (gradient,), state, (GAIN,), tiny().optim)


def one_block_fewer() -> object:
    c = tiny(vocab_size=16).model
    p = init(Key(0), specs(c), dims(c))
    p = attrs.evolve(p, blocks=p.blocks[:-1])
    bias = torch.zeros(c.num_layers - c.num_dense_layers, c.moe.num_experts)
    return forward(p, ints(1, 4), bias, environment(c, 4), c)


def another_depth() -> object:
    c = tiny(vocab_size=16).model
    p = init(Key(0), specs(c), dims(c))
    c = attrs.evolve(c, mtp=Mtp(depth=2))
    return forward(p, ints(1, 4), torch.zeros(4, c.moe.num_experts), environment(c, 4), c)


NORM: list[tuple[Callable[[], object], str]] = [
    (lambda: rms_norm(FOUR, torch.ones(1), eps=1e-6), r"rms_norm: expected a gain of shape \[4\], got \[1\]; "),
    (
        lambda: add_rms_norm(FOUR, torch.ones(4), torch.ones(4), eps=1e-6),
        r"add_rms_norm: expected y of shape \[3, 4\], got \[4\]; ",
    ),
    (lambda: table(3, 5, theta=1e4, yarn=None), "table: expected an even number of rotated channels, got 5; "),
    (
        lambda: rotate(torch.ones(1, 5, 2), Rope(torch.ones(4, 1), torch.ones(4, 1))),
        "rotate: expected at most the 4 positions of the table, got 5; ",
    ),
    (
        lambda: rotate(torch.ones(1, 4, 4), Rope(torch.ones(8, 1), torch.ones(8, 1))),
        r"rotate: expected a table of shape \[8, 2\], got \[8, 1\]; ",
    ),
    (
        lambda: rotate(torch.ones(2, 4, 2), Rope(torch.ones(8, 1), torch.ones(8, 1)), ints(1, 4)),
        r"rotate: expected positions of shape \[2, 4\], got \[1, 4\]; ",
    ),
]
ROUTE: list[tuple[Callable[[], object], str]] = [
    (lambda: route(FOUR, torch.zeros(4), top_k=9), "route: expected top_k from 1 to the 4 experts .*, got 9; "),
    (lambda: route(FOUR, torch.zeros(1, 1), top_k=2), r"route: expected a bias of shape \[4\], got \[1, 1\]; "),
    (lambda: top_k(FOUR, 5), "top_k: expected num from 1 to the 4 entries of the last axis, got 5; "),
    (lambda: top_k(FOUR, 0), "top_k: expected num from 1 to the 4 entries of the last axis, got 0; "),
    (lambda: gates(FOUR, CHOICES[:2]), r"gates: expected choices of shape \[3, 2\], got \[2, 2\]; "),
    (
        lambda: replay(FOUR, CHOICES[:2], top_k=2),
        r"replay: expected routing.expert of shape \[3, 2\], got \[2, 2\]; ",
    ),
    (
        lambda: replay(FOUR, Routing(CHOICES, torch.ones(3, 1)), top_k=2),
        r"replay: expected routing.weight of shape \[3, 2\], got \[3, 1\]; ",
    ),
    (
        lambda: margin_histogram(FOUR, torch.zeros(1), CHOICES),
        r"margin_histogram: expected a bias of shape \[4\], got \[1\]; ",
    ),
    (
        lambda: margin_histogram(FOUR, torch.zeros(4), CHOICES[:1]),
        r"margin_histogram: expected choices of shape \[3, 2\], got \[1, 2\]; ",
    ),
    (
        lambda: sequence_imbalance(FOUR[None], CHOICES[None, :2]),
        r"sequence_imbalance: expected experts of shape \[1, 3, 2\], got \[1, 2, 2\]; ",
    ),
    (
        lambda: balance(torch.zeros(2, 4), ints(4), rate=1.0),
        r"balance: expected a load of shape \[2, 4\], got \[4\]; ",
    ),
    (
        lambda: balance_quantile(torch.zeros(2, 4), ints(4, BINS), top_k=1, decay=0.0),
        r"balance_quantile: expected margins of shape \[2, 4, 1024\], got \[4, 1024\]; ",
    ),
]
EXPERT: list[tuple[Callable[[], object], str]] = [
    (
        lambda: mlp(torch.ones(3, 4), torch.ones(4, 4, 5), torch.ones(10, 4)),
        r"mlp: expected up of shape \[4, 2, 10\], got \[4, 4, 5\]; ",
    ),
    (
        lambda: mlp(torch.ones(3, 4), torch.ones(4, 2, 5), torch.ones(2, 5, 4)),
        r"mlp: expected up of shape \[4, 2, 2\], got \[4, 2, 5\]; ",
    ),
    (
        lambda: mlp(torch.ones(3, 4), torch.ones(4, 2, 2), torch.ones(2, 2, 4)),
        r"mlp: expected down of shape \[2, 4\], got \[2, 2, 4\]; ",
    ),
    (
        lambda: dispatch(torch.ones(3, 2), Routing(CHOICES[:2], torch.ones(2, 2)), num_experts=4),
        r"dispatch: expected choices of shape \[3, 2\], got \[2, 2\]; ",
    ),
    (
        lambda: dispatch(torch.ones(3, 2), Routing(CHOICES, torch.ones(2, 3)), num_experts=4),
        r"dispatch: expected weights of shape \[3, 2\], got \[2, 3\]; ",
    ),
    (
        lambda: experts(
            dispatch(torch.ones(3, 2), Routing(CHOICES, torch.ones(3, 2)), num_experts=4),
            torch.ones(6, 2, 2, 5),
            torch.ones(6, 5, 2),
        ),
        r"experts: expected up of shape \[4, 2, 2, 5\], got \[6, 2, 2, 5\]; ",
    ),
    (
        lambda: moe_experts(
            torch.ones(3, 2), Routing(CHOICES, torch.ones(3, 2)), torch.ones(4, 2, 4, 5), torch.ones(4, 10, 2)
        ),
        r"experts: expected up of shape \[4, 2, 2, 10\], got \[4, 2, 4, 5\]; ",
    ),
    (
        lambda: linear_cross_entropy(torch.ones(5, 2), torch.ones(2, 7), ints(3), chunk=8),
        r"linear_cross_entropy: expected targets of shape \[5\], got \[3\]; ",
    ),
    (another_depth, "forward: expected parameters of 2 depths ahead, got 0; "),
    (one_block_fewer, "forward: expected parameters of . layers, got .; "),
]
ATTENTION: list[tuple[Callable[[], object], str]] = [
    (
        lambda: attend_mla(torch.ones(2, 4, 3, 6), torch.ones(1, 4, 3, 8), torch.ones(2, 4, 2), scale=1.0),
        r"attend_mla: expected kv of shape \[2, 4, 3, 8\], got \[1, 4, 3, 8\]; ",
    ),
    (
        lambda: attend_mla(torch.ones(2, 4, 3, 6), torch.ones(2, 4, 3, 8), torch.ones(2, 5, 2), scale=1.0),
        r"attend_mla: expected k_rope of shape \[2, 4, 2\], got \[2, 5, 2\]; ",
    ),
    (
        lambda: attend_mla(torch.ones(2, 4, 3, 6), torch.ones(2, 4, 3, 8), torch.ones(2, 4, 2), ints(1, 4), scale=1.0),
        r"attend_mla: expected start of shape \[2, 4\], got \[1, 4\]; ",
    ),
    (
        lambda: attend_gqa(torch.ones(2, 4, 4, 6), torch.ones(2, 7, 2, 6), torch.ones(2, 7, 2, 6), scale=1.0),
        r"attend_gqa: expected k of shape \[2, 4, 2, 6\], got \[2, 7, 2, 6\]; ",
    ),
    (
        lambda: attend_gqa(torch.ones(2, 4, 4, 6), torch.ones(2, 4, 2, 6), torch.ones(1, 4, 2, 6), scale=1.0),
        r"attend_gqa: expected v of shape \[2, 4, 2, 6\], got \[1, 4, 2, 6\]; ",
    ),
    (
        lambda: attend_gqa(HEADS, HEADS, HEADS, (), ints(1, 4), scale=1.0),
        r"attend_gqa: expected start of shape \[2, 4\], got \[1, 4\]; ",
    ),
]
SHARING: list[tuple[Callable[[], object], str]] = [
    (
        lambda: initial(Key(0), "up", EXPERTS, DIMS, world=3),
        "initial: expected ranks that divide the 4 experts of 'up', got 3; ",
    ),
    (lambda: initial(Key(0), "up", EXPERTS, DIMS, rank=2, world=2), "initial: expected a rank from 0 to 1, got 2; "),
    (lambda: placed(world=3), "layout: expected ranks that divide the 4 experts of '', got 3; "),
    (lambda: placed(replicas=2)[0].stretches(2), "arena expert.decay.fp32: expected a part from 0 to 1, got 2; "),
    (
        lambda: arena_pieces(placed()[0], {"value": torch.zeros(5)}, DIMS, rank=0, world=1),
        "arena_pieces: expected 'value' of 128 elements, .*, got 5; ",
    ),
    (
        lambda: arena_pieces(placed(world=2)[0], {}, DIMS, rank=2, world=2),
        "arena_pieces: expected a rank from 0 to 1, got 2; ",
    ),
    (lambda: share(whole("x", torch.zeros(4)), 2, 2), "share: expected a rank from 0 to 1, got 2; "),
    (
        lambda: owners(CHOICES, ranks=3, experts=4),
        "owners: expected ranks that divide the 4 experts, got 3; ",
    ),
    (lambda: plan(ints(2, 5), rank=0, capacity=1), "plan: expected ranks that divide the 3 experts .*, got 2; "),
    (lambda: plan(ints(2, 6), rank=-1, capacity=1), "plan: expected a rank from 0 to 1, got -1; "),
    (
        lambda: expert_rows(tokens=1, top_k=1, num_experts=4, ranks=3, capacity=1.0),
        "expert_rows: expected ranks that divide the 4 experts, got 3; ",
    ),
    (
        lambda: distinct_ranks(num_experts=4, top_k=1, ranks=3),
        "distinct_ranks: expected ranks that divide the 4 experts, got 3; ",
    ),
    (
        lambda: distinct_ranks(num_experts=4, top_k=1, ranks=2, num_groups=3),
        "distinct_ranks: expected groups that divide the 4 experts, got 3; ",
    ),
]
UPDATES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: adamw(torch.zeros(4), torch.zeros(1), (torch.zeros(4), torch.zeros(4)), **ADAMW),
        r"adamw: expected a gradient of shape \[4\], got \[1\]; ",
    ),
    (
        lambda: adamw(torch.zeros(4), torch.zeros(4), (torch.zeros(4), torch.zeros(1)), **ADAMW),
        r"adamw: expected a second moment of shape \[4\], got \[1\]; ",
    ),
    (
        lambda: muon(torch.zeros(2, 2), torch.zeros(2), (torch.zeros(2, 2),), **MUON),
        r"muon: expected a gradient of shape \[2, 2\], got \[2\]; ",
    ),
    (
        lambda: muon(torch.zeros(2, 2), torch.zeros(2, 2), (torch.zeros(1, 2),), **MUON),
        r"muon: expected a momentum of shape \[2, 2\], got \[1, 2\]; ",
    ),
    (
        lambda: updated(torch.zeros(1), torch.zeros(4)),
        r"tree_update: expected gradient and moments of '0' of shape \[4\], got \[1\]; ",
    ),
    (
        lambda: updated(torch.zeros(4), torch.zeros(1)),
        r"tree_update: expected gradient and moments of '0' of shape \[4\], got \[1\]; ",
    ),
    (lambda: split(torch.zeros(4, dtype=torch.float64)), "split: expected an fp32 tensor, got torch.float64; "),
    (
        lambda: join(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int16)),
        r"join: expected a remainder of shape \[4\], got \[1\]; ",
    ),
    (
        lambda: join(torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.int16)),
        "join: expected tensors in bf16 and i16, got torch.float16 and torch.int16; ",
    ),
]
ARRAYS: list[tuple[Callable[[], object], str]] = [
    (lambda: quotas([1, 1], 4, [4, 4, 4]), r"quotas: expected limits of shape \[2\], got \[3\]; "),
    (lambda: stretch([np.arange(3), np.arange(4)], 5, 4), "stretch: expected arrays of at least 9 elements, got 7; "),
    (lambda: smooth(np.zeros(3), np.zeros(1), 0.0), r"smooth: expected y of shape \[3\], got \[1\]; "),
]
CASES = [*NORM, *ROUTE, *EXPERT, *ATTENTION, *SHARING, *UPDATES, *ARRAYS]


@pytest.mark.parametrize(("call", "expected"), CASES, ids=[text[:40] for _, text in CASES])
def test_refused(call: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}"):
        call()
