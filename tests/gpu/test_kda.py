"""Kimi delta attention on a GPU: near fp64 at the shipped tiles, the same bits ten times, linear memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Kda
from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import kda as kernel
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model import rope
from nmoe.pure.model.attention import KINDS
from nmoe.pure.model.attention import kda as pure
from nmoe.pure.model.norm import rms_norm
from tests.gpu.test_gqa import documents
from tests.kernels import truth
from tests.kernels.truth import graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")


def tiles(channels: int) -> kernel.Tiles:
    return ops.kda_tiles(torch.device("cuda"), channels)


def sample(batch: int, positions: int, heads: int, channels: int = 128, strength: float = 0.05) -> list[Tensor]:
    """q, k, v as slices of one product; gates; bias, logarithm of the rate and steps in fp32."""
    product = normal(batch, positions, 3, heads, channels)
    gate = [normal(batch, positions, heads, channels, seed=1), normal(heads, channels, seed=6).float()]
    rate = torch.full((heads,), strength, device="cuda").log()
    return [*product.unbind(2), *gate, rate, normal(batch, positions, heads, seed=2).float().sigmoid()]


def pulls(inputs: list[Tensor]) -> list[Tensor]:
    batch, _, heads, channels = inputs[0].shape
    return [normal(*inputs[0].shape, seed=3), normal(batch, heads, channels, channels, seed=4).float()]


def compare(
    inputs: list[Tensor], start: Tensor | tuple[()] = (), *, limit: float | None = None, steps: float = 2
) -> None:
    """Results and gradients within two steps of bf16 of fp64, beside what plain torch errs, which computes in fp32."""
    memory, attend = inputs[7:], partial(kernel.kda_attention, tiles=tiles(inputs[0].shape[-1]))

    def run(which: Callable[..., tuple[Tensor, Tensor]], *leaves: Tensor) -> tuple[Tensor, Tensor]:
        return which(*leaves[:7], start, *leaves[7:], limit=limit)

    found, allowed, right = (
        graded(partial(run, which), inputs, pulls(inputs), dtype)
        for which, dtype in ((attend, None), (pure.attend_gated, None), (pure.attend_gated, torch.float64))
    )
    names = ("o", "after", "q", "k", "v", "x", "bias", "log_rate", "step", *("memory" for _ in memory))
    wrong = [
        (name, error, others, size)
        for name, a, b, t in zip(names, found, allowed, right, strict=True)
        for error, others, size in [((a.double() - t).norm(), (b.double() - t).norm(), t.norm())]
        if not error <= 1.5 * others + steps * torch.finfo(torch.bfloat16).eps * size
    ]
    assert wrong == []
    assert [each.dtype for each in found] == [each.dtype for each in allowed]


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("shape", [(2, 2048, 4), (1, 1000, 3), (2, 1, 2), (1, 64, 1), (1, 65, 1)], ids=str)
def test_near_the_truth(shape: tuple[int, int, int], channels: int) -> None:
    compare(sample(*shape, channels))


@pytest.mark.parametrize("number", [1, 8, 700])
def test_documents_and_a_memory(number: int) -> None:
    memory = normal(2, 4, 128, 128, seed=5).float()
    compare([*sample(2, 1500, 4), memory], documents(2, 1500, number))


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 20.0])
def test_decays(strength: float) -> None:
    """Under the strongest a gradient of decays is what is left of terms a thousand times as large."""
    inputs = sample(1, 700, 2, strength=strength)
    inputs[3][:, ::5] = -100
    compare(inputs, steps=2 if strength < 2 else 4)


def test_the_bounded_gate() -> None:
    compare(sample(1, 700, 2, strength=1.0), limit=5.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_key_that_repeats_and_steps_of_nothing_and_all(value: float) -> None:
    inputs = sample(1, 300, 2, strength=0.0)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1]).contiguous()
    inputs[6].fill_(value)
    compare(inputs, steps=4)


@pytest.mark.parametrize("limit", [None, 5.0])
def test_a_layer_near_the_truth(limit: float | None) -> None:
    """Convolutions, gates, delta rule, head norm: output and gradients of input and parameters, beside plain torch."""
    c = Kda(num_heads=4, head_dim=128, decay_limit=limit)
    kind = KINDS[Kda]
    values = init(Key(0), kind.specs(c), {"D": 256, "L": 1, **kind.dims(c)})
    names = [path for path, _ in tree.leaves(values)]
    wide = {"taps", "decay_bias", "log_rate", "norm"}
    leaves = [each.to("cuda", torch.float32 if path in wide else torch.bfloat16) for path, each in tree.leaves(values)]
    where = rope.documents(documents(2, 500, 4))
    built = ops._gpu_kda(torch.device("cuda"), kind, c)

    def run(which: pure.KdaOps, x: Tensor, *leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        return pure.kda(tree.map(lambda path, _: given[path], values), x, (), rms_norm, which, c, where, eps=1e-6)

    inputs = [normal(2, 500, 256), *leaves]
    found, allowed, right = (
        graded(partial(run, which), inputs, [normal(2, 500, 256, seed=3)], dtype)
        for which, dtype in ((built, None), (pure.REFERENCE, None), (pure.REFERENCE, torch.float64))
    )
    for name, a, b, t in zip(("y", "x", *names), found, allowed, right, strict=True):
        error, others = ((each.double() - t).norm() for each in (a, b))
        assert error <= 2 * others + 2 * torch.finfo(torch.bfloat16).eps * t.norm(), (name, error, others, t.norm())


def test_ten_times_the_same_and_never_waiting() -> None:
    inputs = sample(2, 2000, 8)
    start, gradients = documents(2, 2000, 5), pulls(inputs)

    def ours(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        attend: Callable[..., tuple[Tensor, Tensor]] = kernel.kda_attention
        return attend(*leaves, start, limit=None, tiles=tiles(128))

    first = graded(ours, inputs, gradients)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(ours, inputs, gradients) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def test_memory_is_linear() -> None:
    """What a call holds beyond its arguments, by token and channel: 26 bytes forward, and backward 18 more."""

    attend: Callable[..., tuple[Tensor, Tensor]] = kernel.kda_attention

    def held(positions: int) -> tuple[int, int]:
        leaves = [x.requires_grad_() for x in sample(1, positions, 8)]
        pull = normal(1, positions, 8, 128, seed=3)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o, _ = attend(*leaves, limit=None, tiles=tiles(128))
        forward = torch.cuda.max_memory_allocated() - before
        gradients = torch.autograd.grad(o, leaves, pull)
        peak = torch.cuda.max_memory_allocated() - before
        del gradients
        return forward, peak

    for positions in (4096, 8192, 32768):
        forward, both = held(positions)
        assert forward <= positions * 8 * 128 * 26 + 2**22
        assert both <= positions * 8 * 128 * 44 + 2**22
