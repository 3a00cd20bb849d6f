"""Sparse latent attention on a GPU: the shipped tiles against fp64, the same bits ten times, bounded memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import dsa as kernel
from nmoe.pure.model.attention import dsa as pure
from tests.gpu.test_gqa import documents
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

select: Any = kernel.select
attend: Any = kernel.dsa_attention
plainly: Any = pure.attend_dsa
pure_select: Any = pure.select

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")


def shipped(heads: int = 128) -> kernel.Tiles:
    return ops.dsa_tiles(torch.device("cuda"), heads, 512, 64)


def whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: scores are exact in bf16 products, and many are equal."""
    drawn = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to("cuda", torch.bfloat16)


def sample(batch: int, positions: int, heads: int, rank: int = 512, rope: int = 64) -> list[Tensor]:
    """q, kv, and the indexer's q, k, w."""
    return [
        normal(batch, positions, heads, rank + rope),
        normal(batch, positions, rank + rope, seed=1),
        normal(batch, positions, 64, 128, seed=2),
        normal(batch, positions, 128, seed=3),
        normal(batch, positions, 64, seed=4) / 64,
    ]


@pytest.mark.parametrize("number", [0, 1, 9, 600])
@pytest.mark.parametrize(("positions", "count"), [(1, 2048), (1500, 64), (5000, 2048), (700, 2048), (3000, 1)])
def test_choice_is_exact(positions: int, count: int, number: int) -> None:
    """Of equal scores the lower index, with documents and without: as fp64 has it."""
    index = whole(2, positions, 8, 128, seed=0), whole(2, positions, 128, seed=1), whole(2, positions, 8, seed=2)
    start: Any = documents(2, positions, number) if number else ()
    found = select(*index, start, count=count, tiles=shipped())
    right = pure_select(*(tensor.double() for tensor in index), start, count=count)
    assert torch.equal(found, right)


def test_choice_beyond_16_bits() -> None:
    """A row of 70,001 tokens; the last ones are what its last query wants."""
    q, k = torch.zeros(1, 70_001, 1, 16), torch.zeros(1, 70_001, 16)
    q[..., 0] = 1
    k[0, -100:, 0] = torch.arange(1.0, 101)
    index = [tensor.to("cuda", torch.bfloat16) for tensor in (q, k, torch.ones(1, 70_001, 1))]
    found = select(*index, count=100, tiles=shipped())
    assert found[0, -1].tolist() == [*range(69_901, 70_001)]
    assert found[0, 69_900].tolist() == [*range(100)], "all scores are zero there"


def compare(inputs: list[Tensor], count: int, start: Any = ()) -> None:
    """Ours has at most a small factor of the error of the pure form in bf16: output, loss and every gradient."""
    rank = 512 if inputs[0].shape[-1] == 576 else inputs[0].shape[-1] - 8
    keys = select(*inputs[2:], start, count=count, tiles=shipped())
    told: dict[str, Any] = {"scale": 576**-0.5, "rank": rank}

    def ours(*leaves: Tensor) -> Any:
        return attend(*leaves, keys, start, tiles=shipped(leaves[0].shape[2]), **told)

    def plain(*leaves: Tensor) -> Any:
        return plainly(*leaves, keys, start, **told)

    pulls = [normal(*inputs[0].shape[:3], rank, seed=5), torch.tensor(0.7, device="cuda")]
    found, allowed, right = (
        graded(which, inputs, pulls, dtype) for which, dtype in ((ours, None), (plain, None), (plain, torch.float64))
    )
    # the loss is one number in fp32: half a step of bf16 in its terms
    # a query with one key has no gradient: o . do less kv . do, two sums of 512 products in fp32
    check(*([each[0], *each[2:]] for each in (found, allowed, right)), floor=1e-3)
    assert abs(found[1].double() - right[1]) <= 2**-8 * right[1].abs() + 1e-3


@pytest.mark.parametrize(("positions", "count"), [(1, 4), (129, 2048), (600, 100), (1100, 1024)])
@pytest.mark.parametrize("heads", [128, 3])
def test_near_the_truth(heads: int, positions: int, count: int) -> None:
    compare(sample(1, positions, heads), count)


@pytest.mark.parametrize("number", [1, 8, 300])
def test_documents(number: int) -> None:
    compare(sample(2, 500, 16), 128, documents(2, 500, number))


def test_small_sizes() -> None:
    compare(sample(2, 300, 4, 32, 8), 32)


def test_ten_times_the_same_and_never_waiting() -> None:
    inputs, pulls = sample(2, 1000, 128), [normal(2, 1000, 128, 512, seed=5), torch.tensor(0.7, device="cuda")]

    def ours(*leaves: Tensor) -> Any:
        keys = select(*leaves[2:], count=256, tiles=shipped())
        return attend(*leaves, keys, scale=0.04, rank=512, tiles=shipped())

    first = graded(ours, inputs, pulls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(ours, inputs, pulls) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def test_workspace_is_bounded_at_32768_tokens() -> None:
    """Of 16 heads: beside outputs, what is kept and gradients at most 64 MiB."""
    length, heads = 32_768, 16
    leaves = [tensor.requires_grad_() for tensor in sample(1, length, heads)]
    torch.cuda.synchronize()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() - before

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    keys = select(*leaves[2:], count=2048, tiles=shipped())
    assert peak() <= keys.nbytes + 64 * 2**20
    o, _ = attend(*leaves, keys, scale=0.04, rank=512, tiles=shipped(heads))
    gate = torch.ones_like(o)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(o, leaves[:2], gate)
    rows = heads * length * 4
    assert peak() <= sum(each.nbytes for each in found) + rows + 64 * 2**20
