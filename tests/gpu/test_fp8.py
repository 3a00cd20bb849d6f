"""fp8 kernels of the experts on a GPU, in memory full of NaN: codes of the pure form, and products beside its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.moe import fp8, moe_fp8
from nmoe.pure.core.key import Key
from nmoe.pure.formats import e4m3
from nmoe.pure.model import experts, route
from nmoe.pure.model.low_precision import RECIPES, experts_low, shared_low
from nmoe.pure.model.route import Routing
from tests.pure.formats.vectors import inputs

pytestmark = pytest.mark.gpu


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def same(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in inputs() if name != "ends of fp32"])
def test_codes_of_rows_are_those_of_a_cpu(name: str) -> None:
    x = inputs()[name]
    codes, scale = fp8.quantise_rows(x.cuda())
    wanted, wanted_scale = e4m3.quantise(x)
    assert same(codes.cpu(), wanted) and torch.equal(scale.cpu(), wanted_scale)


@pytest.mark.parametrize("across", [False, True])
def test_codes_of_weights_are_those_of_a_cpu(across: bool) -> None:
    w = draw(3, 256, 384, seed=0)
    codes, scale = fp8.quantise_weight(w, across=across)
    wanted, wanted_scale = e4m3.quantise(w.cpu(), rows=128)
    assert same(codes.cpu(), wanted.mT.contiguous() if across else wanted) and torch.equal(scale.cpu(), wanted_scale)


@pytest.mark.parametrize(("hidden", "width", "num_experts", "top_k"), [(512, 384, 16, 4), (2048, 1408, 64, 6)])
def test_the_mixture_is_as_near_the_truth_as_the_recipe(hidden: int, width: int, num_experts: int, top_k: int) -> None:
    """With random gates; a row's result does not depend on its neighbours, and two calls make the same bits."""
    tokens = 900
    x, dy = draw(tokens, hidden, seed=1), draw(tokens, hidden, seed=2)
    up = draw(num_experts, hidden, 2, width, seed=3, scale=hidden**-0.5)
    down = draw(num_experts, width, hidden, seed=4, scale=width**-0.5)
    score = torch.rand(tokens, num_experts, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    chosen = route.top_k(score, top_k)
    gate = score.gather(-1, chosen)
    kernel = partial(moe_fp8.moe_experts_fp8, tiles=ops.mixture_tiles(torch.device("cuda"), hidden, width))

    def run(which: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, up, down)]
        gates = gate.to(device, copy=True).requires_grad_()
        y, _ = which(leaves[0], Routing(chosen.to(device), gates), *leaves[1:])
        grads = torch.autograd.grad(y, (*leaves, gates), dy.to(device, dtype))
        return [t.detach().cpu().double() for t in (y, *grads)]

    low = partial(experts.moe_experts, experts=partial(experts_low, recipe=RECIPES["fp8"], key=Key(0)))
    ours = run(kernel, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, run(kernel, torch.bfloat16, "cuda"), strict=True))
    if hidden < 2048:  # one expert at a time, on a CPU
        exact = run(experts.moe_experts, torch.float32, "cpu")
        pure = run(low, torch.bfloat16, "cpu")
        for name, got, wanted, truth in zip(("y", "dx", "dup", "ddown", "dgate"), ours, pure, exact, strict=True):
            assert (got - truth).norm() <= 1.15 * (wanted - truth).norm(), name
            assert (got - truth).norm() < 0.09 * truth.norm(), name
    some = torch.arange(tokens, device="cuda") % 3 != 0
    part, _ = kernel(x[some], Routing(chosen[some], gate[some]), up, down)
    assert torch.equal(part.cpu().double(), ours[0][some.cpu()])


@pytest.mark.parametrize(("hidden", "width"), [(512, 384), (2048, 2816)])
def test_shared_experts_are_as_near_the_truth_as_the_recipe(hidden: int, width: int) -> None:
    """Two calls make the same bits, and so do the kernels of other GPUs; a row does not depend on its neighbours."""
    tokens = 900
    x, dy = draw(tokens, hidden, seed=1), draw(tokens, hidden, seed=2)
    up, down = draw(hidden, 2, width, seed=3, scale=hidden**-0.5), draw(width, hidden, seed=4, scale=width**-0.5)
    tiles = ops.mixture_tiles(torch.device("cuda"), hidden, width)
    kernel = partial(moe_fp8.shared_experts_fp8, tiles=tiles)

    def run(which: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, up, down)]
        y = which(*leaves, experts.swiglu)
        return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaves, dy.to(device, dtype)))]

    ours = run(kernel, torch.bfloat16, "cuda")
    for other in (kernel, partial(moe_fp8.shared_experts_fp8, tiles=attrs.evolve(tiles, hopper=False))):
        assert all(torch.equal(a, b) for a, b in zip(ours, run(other, torch.bfloat16, "cuda"), strict=True))
    exact = run(experts.mlp, torch.float32, "cpu")
    pure = run(partial(shared_low, recipe=RECIPES["fp8"], key=Key(0)), torch.bfloat16, "cpu")
    for name, got, wanted, truth in zip(("y", "dx", "dup", "ddown"), ours, pure, exact, strict=True):
        assert (got - truth).norm() <= 1.15 * (wanted - truth).norm(), name
        assert (got - truth).norm() < 0.09 * truth.norm(), name
    some = torch.arange(tokens, device="cuda") % 3 != 0
    assert torch.equal(kernel(x[some], up, down, experts.swiglu).cpu().double(), ours[0][some.cpu()])
