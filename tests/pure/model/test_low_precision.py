"""Experts in fp8, MXFP8 and NVFP4, beside one expert at a time in fp64 with operands rounded by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import POLICY, Role
from nmoe.pure.cost.plan import emulation_bytes
from nmoe.pure.formats import e4m3, mxfp8, nvfp4
from nmoe.pure.formats import random as draws
from nmoe.pure.model.experts import Rows, dispatch, mlp, moe_experts
from nmoe.pure.model.experts import experts as exact_experts
from nmoe.pure.model.low_precision import RECIPES, LowProduct, emulated, experts_low, grouped
from nmoe.pure.model.route import Routing
from tests.memory import Peak

N, D, F, E, K = 40, 128, 128, 5, 2
KEY = Key(3).fold("precision")


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Rows, Tensor, Tensor, Tensor]:
    """The last expert has no row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, grad_output = draw(N, D).requires_grad_(), draw(N * K, D)
    chosen = torch.rand(N, E - 1, generator=generator).argsort(-1)[:, :K]
    rows = dispatch(x, Routing(chosen, torch.ones(N, K)), num_experts=E)
    up, down = draw(E, D, 2, F).mul_(D**-0.5), draw(E, F, D).mul_(F**-0.5)
    return x, rows, up.requires_grad_(), down.requires_grad_(), grad_output


def low(name: str, rows: Rows, up: Tensor, down: Tensor) -> Tensor:
    return experts_low(rows, up, down, recipe=RECIPES[name], key=KEY)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def round_row(name: str, x: Tensor, noise: Tensor | None = None) -> Tensor:
    if name == "fp8":
        return e4m3.dequantise(*e4m3.quantise(x)).double()
    if name == "mxfp8":
        return mxfp8.dequantise(*mxfp8.quantise(x)).double()
    return nvfp4.dequantise(*nvfp4.quantise(x, noise=noise)).double()


def round_weight(name: str, w: Tensor) -> Tensor:
    """Of one expert, blocks along the last axis."""
    if name == "fp8":
        return e4m3.dequantise(*e4m3.quantise(w, rows=128), rows=128).double()
    if name == "mxfp8":
        return mxfp8.dequantise(*mxfp8.quantise(w)).double()
    return nvfp4.dequantise(*nvfp4.quantise(w, rows=16), rows=16).double()


@pytest.mark.parametrize("name", RECIPES)
def test_a_product_and_its_gradients_are_those_of_operands_rounded_by_hand(name: str) -> None:
    """One product at a time: that of `down` alone, whose rows are given."""
    _, rows, _, down, dy = operands()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N * K, F, generator=generator).requires_grad_()
    apply: Any = LowProduct.apply
    y = apply(x, down, rows.expert, rows.count, RECIPES[name], KEY)
    dx, dw = torch.autograd.grad(y, (x, down), dy)

    # a matrix has one factor in NVFP4, and noise is drawn over all of it: rounded before it is cut into experts
    salt, noisy = draws.salt(dy), name == "nvfp4"
    x_low = round_row(name, x.detach())
    noise = draws.noise(KEY.fold("input gradient"), salt, tuple(dy.shape)) if noisy else None
    d_low = round_row(name, dy, noise)
    end = rows.count.cumsum(0).tolist()
    for expert in range(E):
        mine = slice(end[expert] - int(rows.count[expert]), end[expert])
        w = down[expert].detach()
        if rows.count[expert] == 0:
            assert dw[expert].count_nonzero() == 0
            continue
        # two operands in bf16 are exact, their product is rounded to bf16 once
        close = 1e-6 if name == "fp8" else 3e-3
        assert error(y[mine], x_low[mine] @ round_weight(name, w.T).T) < close
        assert error(dx[mine], d_low[mine] @ round_weight(name, w).T) < close
        if name == "fp8":
            assert error(dw[expert], x[mine].T @ dy[mine]) < 1e-6, "nothing is rounded"
    if name == "mxfp8":
        for expert in range(E - 1):
            mine = slice(end[expert] - int(rows.count[expert]), end[expert])
            filled = [torch.nn.functional.pad(t[mine].detach(), (0, 0, 0, -(t[mine].shape[0]) % 32)).T for t in (x, dy)]
            assert error(dw[expert], round_row(name, filled[0]) @ round_row(name, filled[1]).T) < 3e-3


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
def test_a_grouped_product_is_rounded_to_its_operands_format_once(operand: torch.dtype) -> None:
    """Sums in fp32 of values that bf16 holds: beside fp64 within half a unit of the format's last place, and in it."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-64, 65, shape, generator=generator).float() / 64 for shape in ((24, 32), (3, 32, 16)))
    end = torch.tensor([7, 7, 24], dtype=torch.int32)
    found = grouped(a, b, end, operand)
    wanted = torch.cat([a[:7].double() @ b[0].double(), a[7:].double() @ b[2].double()])
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.to(operand).float()), "these sums are exact in fp32"
    assert torch.equal(found.double(), wanted) == (operand == torch.float32)


def test_the_weight_gradient_in_nvfp4_is_right_on_average() -> None:
    """Of the gradient stochastic rounding is unbiased, and the rotation cancels: over many keys the mean comes close to
    the product with the rows rounded alone."""
    _, rows, _, down, dy = operands()
    x = torch.randn(N * K, F, generator=torch.Generator().manual_seed(1)).requires_grad_()
    apply: Any = LowProduct.apply

    def gradients(key: Key) -> tuple[Tensor, Tensor]:
        y = apply(x, down, rows.expert, rows.count, RECIPES["nvfp4"], key)
        dx, dw = torch.autograd.grad(y, (x, down), dy)
        return dx, dw

    every = [gradients(Key(seed)) for seed in range(24)]
    mean_x, mean_w = (torch.stack(parts).mean(0) for parts in zip(*every, strict=True))
    wanted_x = torch.cat([dy[rows.expert == e] @ down[e].detach().T for e in range(E)])
    wanted_w = torch.stack([x[rows.expert == e].T @ dy[rows.expert == e] for e in range(E)])
    # of dx the weight's rounding stays, 0.11
    assert error(every[0][0], wanted_x) > 0.15 > error(mean_x, wanted_x)
    assert error(every[0][1], wanted_w) > 0.13 and error(mean_w, wanted_w) < 0.07
    assert torch.equal(gradients(Key(0))[0], every[0][0]), "the same key, the same bits"
    assert not torch.equal(every[1][0], every[0][0])


@pytest.mark.parametrize(
    ("name", "forward", "backward"), [("fp8", 0.08, 0.09), ("mxfp8", 0.08, 0.09), ("nvfp4", 0.3, 0.36)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_as_close_as_their_format_allows(
    name: str, forward: float, backward: float, dtype: torch.dtype
) -> None:
    x, rows, up, down, dy = operands(dtype)
    got = low(name, rows, up, down)
    gradients = torch.autograd.grad(got, (x, up, down), dy)
    wide = Rows(x.double(), rows.source, rows.expert, rows.count, rows.slot)
    wanted = exact_experts(wide, up.double(), down.double())
    truth = torch.autograd.grad(wanted, (x, up, down), dy.double())
    assert got.dtype is dtype and all(part.dtype is dtype for part in gradients)
    assert 0.01 < error(got, wanted) < forward
    assert all(0.01 < error(part, exact) < backward for part, exact in zip(gradients, truth, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_an_expert_knows_nothing_of_the_others_rows(name: str) -> None:
    """Rows of another expert change none of this one's results, but for the one factor that NVFP4 has."""
    _, rows, up, down, _ = operands()
    before = low(name, rows, up, down)
    changed = rows.x.detach().clone()
    mine = rows.source[rows.expert == 0]
    others = [token for token in range(N) if token not in mine.tolist()]
    amax = changed.abs().max()
    changed[others] = (changed[others] * 1.5).clamp(-amax, amax)
    after = low(name, Rows(changed, rows.source, rows.expert, rows.count, rows.slot), up, down)
    # of nvfp4 the factor of the activation moves, and with it roundings
    same = torch.equal(after[rows.expert == 0], before[rows.expert == 0])
    assert same or (name == "nvfp4" and error(after[rows.expert == 0], before[rows.expert == 0]) < 0.1)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_finite_reaches_the_result(name: str) -> None:
    x, rows, up, down, dy = operands()
    bad = rows.x.detach().clone()
    bad[7, 3] = torch.inf
    y = low(name, Rows(bad, rows.source, rows.expert, rows.count, rows.slot), up, down)
    assert y[rows.source == 7].isnan().all()
    dy[0, 0] = torch.nan
    (dx,) = torch.autograd.grad(low(name, rows, up, down), (x,), dy)
    assert dx.isnan().any()


def test_the_mixture_takes_it_in_the_place_of_its_experts() -> None:
    x, _, up, down, _ = operands()
    routing = Routing(torch.arange(N * K).view(N, K) % E, torch.full((N, K), 0.5))
    run = partial(experts_low, recipe=RECIPES["fp8"], key=KEY)
    y, count = moe_experts(x, routing, up, down, experts=run)
    assert error(y, moe_experts(x, routing, up, down)[0]) < 0.08 and count.sum() == N * K


@pytest.mark.parametrize("name", RECIPES)
def test_shared_experts_are_one_expert_that_sees_each_token(name: str) -> None:
    """The same bits, but where gradients are rounded stochastically: there each has draws of its own."""
    x, _, up, down, _ = operands()
    every = Routing(torch.zeros(N, 1, dtype=torch.int64), torch.ones(N, 1))
    low, dy = emulated(RECIPES[name], KEY), torch.randn(N, D, generator=torch.Generator().manual_seed(4))

    def run(y: Tensor) -> tuple[Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, (x, up, down), dy)

    y, *gradients = run(low.shared(x, up[0], down[0]))
    wanted, *others = run(moe_experts(x, every, up[:1], down[:1], experts=low.experts)[0])
    assert torch.equal(y, wanted) and 0.01 < error(y, mlp(x, up[0], down[0]))
    for got, other in zip(gradients, others, strict=True):
        assert torch.equal(got, other) or (RECIPES[name].noisy and error(got, other) < 0.5)
    assert RECIPES[name].noisy == (not torch.equal(gradients[0], others[0]))


def test_no_two_roundings_of_a_block_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the input's and the weight's gradient, of up and down, of routed and shared experts: 8, and 4 rotations."""
    drawn: list[int] = []
    noise = draws.noise

    def note(key: Key, salt: Tensor, shape: tuple[int, ...]) -> Tensor:
        drawn.append(key.seed())
        return noise(key, salt, shape)

    monkeypatch.setattr(draws, "noise", note)
    x, rows, up, down, dy = operands()
    low = emulated(RECIPES["nvfp4"], KEY)
    low.experts(rows, up, down).backward(dy)
    low.shared(x, up[0], down[0]).backward(dy[:N])
    assert len(drawn) == len(set(drawn)) == 12


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_counts_what_a_product_holds_at_once(name: str) -> None:
    """Of the larger product, the up-projection, forward and backward, with as many rows a weight as trainings have."""
    experts, width, hidden, rows = 4, 256, 192, 3072
    dims = {"D": width, "F": hidden, "E": experts, "S": 0}
    planned = emulation_bytes(dims, tokens=1, rows=rows, expert_ranks=1, noisy=RECIPES[name].noisy)
    x, up, dy = (torch.randn(*shape) for shape in ((rows, width), (experts, width, 2 * hidden), (rows, 2 * hidden)))
    expert = torch.arange(rows) * experts // rows
    leaves = (x.bfloat16().requires_grad_(), up.bfloat16().requires_grad_())
    apply: Any = LowProduct.apply
    with Peak() as peak:
        y = apply(*leaves, expert, expert.bincount(), RECIPES[name], KEY)
        torch.autograd.grad(y, leaves, dy.bfloat16())
    assert planned / 2 < peak.bytes < planned


def test_the_experts_alone_are_lowered() -> None:
    assert {role for role, policy in POLICY.items() if policy.lowered} == {Role.EXPERT, Role.SHARED}
    assert all(policy.flops for policy in POLICY.values() if policy.lowered)
