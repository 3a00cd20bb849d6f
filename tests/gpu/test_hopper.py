"""The mixture's kernels for Hopper on one: the bits of those that run everywhere, twice, never waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import experts
from nmoe.effects.kernels.moe.hopper import activation, gradient, up
from nmoe.effects.kernels.moe.hopper.tiles import ROWS
from nmoe.effects.kernels.moe.moe import LONG, moe_experts
from nmoe.pure.model import route
from nmoe.pure.model.route import Routing
from tests.kernels import truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")

SHAPES = [
    (1500, 512, 384, 16, 4),
    (700, 264, 200, 7, 2),  # no size that a tile divides
    (3, 64, 48, 8, 2),
    (900, 2048, 1408, 8, 2),
]
"""Tokens, hidden size, width, experts, chosen ones."""


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a GPU of compute capability 9.0 is needed")


def chosen(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Experts of each token, one of them without rows."""
    score = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1))
    score[:, 1] -= 2
    return route.top_k(score, top_k).cuda()


def repeated(call: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What a call returns, after it returned the same once before; neither waited for the device."""
    first = [result.clone() for result in call()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = list(call())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return second


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_up_projection(shape: tuple[int, ...]) -> None:
    tokens, hidden, width, num_experts, top_k = shape
    tiles = attrs.evolve(ops.mixture_tiles(torch.device("cuda"), hidden, width), hopper=False)
    at = places.dispatch(chosen(tokens, num_experts, top_k), num_experts)
    pairs = tokens * top_k
    x, w_up = normal(tokens, hidden), normal(num_experts, hidden, 2, width, seed=2) / hidden**0.5

    def cut(m: int) -> places.RowTiles:
        return places.tiles(at.count, pairs, m)

    own = cut(ROWS)
    h, a = repeated(lambda: up.gather_gemm_swiglu(x, at.source, w_up, at.end, own, 8, 132))
    wanted = experts.gather_gemm_swiglu(x, at.source, w_up, at.end, cut(tiles.up.block_m), tiles.up, 8)
    assert torch.equal(h, wanted[0]) and torch.equal(a, wanted[1])


def backward(shape: tuple[int, ...]) -> tuple[list[Callable[[], tuple[Tensor, ...]]], Callable[[], Tensor]]:
    """The activation's gradient by Hopper's kernel and by the one that runs everywhere; the gate's gradient in fp64."""
    tokens, hidden, width, num_experts, top_k = shape
    tiles = ops.mixture_tiles(torch.device("cuda"), hidden, width)
    at = places.dispatch(chosen(tokens, num_experts, top_k), num_experts)
    pairs = tokens * top_k
    rows, h = normal(pairs, hidden), normal(pairs, 2, width, seed=1)
    weight = torch.rand(tokens, top_k, device="cuda")
    down = normal(num_experts, width, hidden, seed=2) / width**0.5
    cut = {m: places.tiles(at.count, pairs, m) for m in {ROWS, tiles.activation.block_m}}
    given = (rows, at.slot, weight, down, h, at.end)

    def gate() -> Tensor:
        active = torch.nn.functional.silu(h[:, 0].double()) * h[:, 1].double()
        count = at.count.tolist()
        parts = zip(rows.split(count), down, active.split(count), strict=True)
        return torch.cat([((r.double() @ d.double().T) * a).sum(1) for r, d, a in parts])

    kinds = [
        lambda: activation.swiglu_backward_gemm(*given, cut[ROWS], 8, 132),
        lambda: experts.swiglu_backward_gemm(*given, cut[tiles.activation.block_m], tiles.activation, 8, 132),
    ]
    return kinds, gate


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_the_activation(shape: tuple[int, ...]) -> None:
    """Columns are summed in an order of their own; the gate's gradient is as near to the truth as the other one's."""
    (own, other), gate = backward(shape)
    wanted = other()
    held = [torch.full_like(each, torch.nan) for each in wanted]
    torch.cuda.synchronize()
    del held  # what the next call is given
    found = repeated(own)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    true = gate()
    own_error, other_error = ((part.double().sum(1) - true).abs() for part in (found[2], wanted[2]))
    rounding = 1e-6 * true.abs().max()  # all that six rows tell
    assert own_error.mean() <= 1.05 * other_error.mean() + rounding
    assert own_error.max() <= 1.5 * other_error.max() + rounding


def test_the_gradient_of_the_activation_again_and_again() -> None:
    """The shortest products: without the fence behind what threads read, half of these calls had other bits."""
    (own, other), _ = backward((65536, 768, 384, 64, 4))
    wanted = [each.clone() for each in other()[:2]]
    assert [i for i in range(100) if not all(map(torch.equal, own()[:2], wanted))] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Stored and added, of rows and of what they are gathered from."""
    tokens, hidden, width, num_experts, top_k = shape
    tiles = ops.mixture_tiles(torch.device("cuda"), hidden, width)
    at = places.dispatch(chosen(tokens, num_experts, top_k), num_experts)
    x, dh = normal(tokens, hidden), normal(tokens * top_k, 2 * width, seed=1)
    rows = places.spread(x, at.place)
    how: dict[str, Any] = {"end": at.end, "count": at.count, "group": 8}
    before = normal(num_experts, hidden, 2 * width, seed=2).to(dtype)
    for add in (False, True):
        wanted = before.clone() if add else poisoned(*before.shape, dtype=dtype)
        experts.grouped_weight_gradient_(wanted, rows, dh, tile=tiles.up_gradient, **how, add=add)
        for a, source in ((rows, None), (x, at.source)):
            out = before.clone() if add else poisoned(*before.shape, dtype=dtype)
            gradient.grouped_weight_gradient_(out, a, dh, **how, programs=132, source=source, add=add)
            assert torch.equal(out, wanted), (add, source is None)


def layer(shape: tuple[int, ...], mixture: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[bool], list[Tensor]]:
    """Output and gradients of a whole layer, by Hopper's kernels or those of several ranks."""
    tokens, hidden, width, num_experts, top_k = shape
    expert = chosen(tokens, num_experts, top_k)
    leaves = [
        normal(tokens, hidden),
        torch.rand(tokens, top_k, device="cuda"),
        normal(num_experts, hidden, 2, width, seed=2) / hidden**0.5,
        normal(num_experts, width, hidden, seed=3) / width**0.5,
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    pull = normal(tokens, hidden, seed=4)
    tiles = ops.mixture_tiles(torch.device("cuda"), hidden, width)
    assert tiles.hopper

    def run(hopper: bool) -> list[Tensor]:
        x, weight, w_up, w_down = leaves
        y, _ = mixture(x, Routing(expert, weight), w_up, w_down, tiles=attrs.evolve(tiles, hopper=hopper))
        return [y.detach(), *torch.autograd.grad(y, leaves, pull)]

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer(shape: tuple[int, ...]) -> None:
    run = layer(shape, moe_experts)
    found, wanted = repeated(lambda: run(True)), run(False)
    for name, a, b in zip(("y", "dx", "dweight", "dup", "ddown"), found, wanted, strict=True):
        if name == "dweight" and shape[1] >= LONG:  # summed in another order
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
        else:
            assert torch.equal(a, b), name
