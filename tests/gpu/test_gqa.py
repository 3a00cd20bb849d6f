"""Grouped-query attention on a GPU: every shipped tile against fp64, the same bits ten times, linear memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import gqa as kernel
from nmoe.pure.model.attention import gqa as pure
from nmoe.pure.model.rope import Rope, table
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")


def shipped(channels: int, window: int | None) -> dict[int | None, kernel.Tiles]:
    """The tiles of a layer."""
    return {window: ops.gqa_tiles(torch.device("cuda"), channels, *(() if window is None else (window,)))}


def sample(batch: int, positions: int, heads: int, groups: int, channels: int = 64) -> list[Tensor]:
    """q, k, v as slices of one product, and sinks in fp32."""
    product = normal(batch, positions, heads + 2 * groups, channels)
    return [*product.split((heads, groups, groups), dim=2), normal(heads, seed=1).float()]


def documents(batch: int, positions: int, number: int) -> Tensor:
    """Starts of random documents, [B T] i32."""
    begins = torch.rand(batch, positions, generator=torch.Generator().manual_seed(5)) < number / positions
    return torch.where(begins, torch.arange(positions), 0).cummax(1).values.to(torch.int32).cuda()


def compare(inputs: list[Tensor], start: Tensor | tuple[()], window: int | None) -> None:
    """Ours has at most a small factor of the error of the pure form in bf16, output and every gradient."""
    channels = inputs[0].shape[-1]
    told: dict[str, Any] = {"scale": channels**-0.5, "window": window}

    def ours(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        return kernel.gqa_attention(q, k, v, sinks[0] if sinks else (), start, tiles=shipped(channels, window), **told)

    def plain(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        return pure.attend_gqa(q, k, v, sinks[0] if sinks else (), start, **told)

    pulls = [normal(*inputs[0].shape, seed=3)]
    found, allowed, right = (
        graded(which, inputs, pulls, dtype) for which, dtype in ((ours, None), (plain, None), (plain, torch.float64))
    )
    check(found[:4], allowed[:4], right[:4])
    # few numbers in fp32, each a sum over outputs in bf16: half a step of that
    check(
        found[4:], allowed[4:], right[4:], steps=0.5 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("window", [128, 1024, None])
@pytest.mark.parametrize("shape", [(2, 2048, 16, 2), (1, 1000, 3, 1), (2, 1, 8, 8), (1, 129, 8, 1)], ids=str)
def test_near_the_truth(shape: tuple[int, int, int, int], window: int | None) -> None:
    compare(sample(*shape), (), window)


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [1, 200, None])
def test_wide_heads_by_the_default_tiles(window: int | None, sinks: bool) -> None:
    compare(sample(1, 777, 8, 2, 128)[: 4 if sinks else 3], (), window)


@pytest.mark.parametrize("window", [128, 1024, None])
@pytest.mark.parametrize("number", [1, 8, 700])
def test_documents(number: int, window: int | None) -> None:
    compare(sample(2, 1500, 8, 1), documents(2, 1500, number), window)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_sinks_that_take_all_or_nothing(value: float) -> None:
    q, k, v, sinks = sample(1, 500, 8, 1)
    told: dict[str, Any] = {"scale": 0.125, "window": 128, "tiles": shipped(64, 128)}
    found = graded(partial(kernel.gqa_attention, **told), [q, k, v, torch.full_like(sinks, value)], [normal(*q.shape)])
    without = graded(partial(kernel.gqa_attention, **told), [q, k, v], [normal(*q.shape)])
    assert not found[4].any()
    for one, other in zip(found[:4], without, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if value > 0 else other, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("window", [128, None])
def test_ten_times_the_same_and_never_waiting(window: int | None) -> None:
    inputs, pulls = sample(2, 2048, 16, 2), [normal(2, 2048, 16, 64, seed=3)]
    start = documents(2, 2048, 5)

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return kernel.gqa_attention(q, k, v, sinks, start, scale=0.125, window=window, tiles=shipped(64, window))

    first = graded(ours, inputs, pulls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(ours, inputs, pulls) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


@pytest.mark.parametrize("window", [128, None])
def test_memory_is_linear_and_no_key_is_copied(window: int | None) -> None:
    """What a call holds beyond its arguments: output and a number a row; gradients and another; nothing a pair."""

    def held(positions: int) -> tuple[int, int]:
        product = torch.randn(1, positions, 80, 64, dtype=torch.bfloat16, device="cuda")
        leaves = [*product.split((64, 8, 8), dim=2), torch.zeros(64, device="cuda")]
        leaves = [x.requires_grad_() for x in leaves]
        pull = torch.randn(1, positions, 64, 64, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = kernel.gqa_attention(*leaves, scale=0.125, window=window, tiles=shipped(64, window))
        forward = torch.cuda.max_memory_allocated() - before
        gradients = torch.autograd.grad(o, leaves, pull)
        peak = torch.cuda.max_memory_allocated() - before
        del gradients
        return forward, peak

    output, row, keys = 64 * 64 * 2, 64 * 4, 8 * 64 * 2
    parts = 64 * 4 // 8
    for positions in (4096, 8192, 32768):
        forward, both = held(positions)
        assert forward <= positions * (output + row) + 2**20
        assert both <= positions * (2 * output + 2 * row + 2 * keys + parts) + 2**20


def test_projection() -> None:
    """Rotated in place, within a step of bf16 of the reference, forward and backward."""
    rope = table(1024, 64, theta=1.5e5, yarn=None)
    rope = Rope(rope.cos.cuda(), rope.sin.cuda())
    x, qkv = normal(2, 1000, 256), normal(256, 20, 64, seed=1) / 16
    pulls = [normal(2, 1000, heads, 64, seed=heads) for heads in (16, 2, 2)]
    ours, plain, exact = (
        graded(lambda *leaves, which=which: which(*leaves, rope, num_heads=16), [x, qkv], pulls, dtype)
        for which, dtype in ((kernel.project, None), (pure.project, None), (pure.project, torch.float64))
    )
    check(ours, plain, exact)
