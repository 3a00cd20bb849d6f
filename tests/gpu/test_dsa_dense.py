"""The dense stage of sparse latent attention on a GPU: near fp64 with shipped tiles, the same bits, bounded memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import dsa_dense as kernel
from nmoe.pure.model.attention import dsa as pure
from tests.gpu.test_gqa import documents
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")


def attend(*operands: Any, scale: float = 192**-0.5) -> tuple[Tensor, Tensor]:
    """The kernels with the tiles that ship."""
    device = torch.device("cuda")
    tiles: Any = {"tiles": ops.dsa_dense_tiles(device), "attention": ops.mla_tiles(device, 128, 64, 128)}
    dense: Any = kernel.dense_attention
    return dense(*operands, scale=scale, **tiles)


def sample(batch: int, positions: int, heads: int, nope: int = 128, rope: int = 64, index: int = 64) -> list[Tensor]:
    """q, kv, k_rope, and the indexer's q, k, w."""
    return [
        normal(batch, positions, heads, nope + rope),
        normal(batch, positions, heads, nope + 128, seed=1),
        normal(batch, positions, rope, seed=2),
        normal(batch, positions, index, 128, seed=3),
        normal(batch, positions, 128, seed=4),
        normal(batch, positions, index, seed=5) / index,
    ]


def compare(inputs: list[Tensor], start: Any = ()) -> None:
    """Ours has at most a small factor of the error of the pure form in bf16: output, loss and every gradient."""
    plainly: Any = pure.attend_dense

    def plain(*leaves: Tensor) -> Any:
        return plainly(*leaves, start, scale=192**-0.5)

    heads, batch = inputs[0].shape[2], inputs[0].shape[:2]
    factors = [normal(*batch, heads, 128, seed=6), torch.tensor(0.7, device="cuda")]
    found, allowed, right = (
        graded(form, inputs, factors, dtype)
        for form, dtype in ((lambda *leaves: attend(*leaves, start), None), (plain, None), (plain, torch.float64))
    )
    # the loss is one number in fp32: half a step of bf16 in its terms
    # a query with one key has no gradient: two logarithms in fp32, or o . do less v . do
    check(*([run[0], *run[2:]] for run in (found, allowed, right)), floor=1e-3)
    assert abs(found[1].double() - right[1]) <= 2**-8 * right[1].abs() + 1e-3


@pytest.mark.parametrize("positions", [1, 64, 129, 1000])
@pytest.mark.parametrize("heads", [128, 3])
def test_near_the_truth(heads: int, positions: int) -> None:
    compare(sample(1, positions, heads))


@pytest.mark.parametrize("number", [1, 8, 300])
def test_documents(number: int) -> None:
    compare(sample(2, 500, 16), documents(2, 500, number))


def test_small_sizes() -> None:
    compare(sample(2, 300, 4, nope=24, rope=8, index=2))


def test_several_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 queries one after the other, as a row of 98,304 tokens has them."""
    monkeypatch.setattr(kernel, "WORKSPACE", 1)
    compare(sample(2, 700, 16), documents(2, 700, 4))


def test_ten_times_the_same_and_never_waiting() -> None:
    inputs, factors = sample(2, 1000, 128), [normal(2, 1000, 128, 128, seed=6), torch.tensor(0.7, device="cuda")]
    first = graded(attend, inputs, factors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(attend, inputs, factors) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(one, other) for one, other in zip(first, run, strict=True))


def test_workspace_is_bounded_at_32768_tokens() -> None:
    """Of 16 heads: beside the output, log-sums, copies for cuDNN and what is kept at most 64 MiB."""
    length, heads = 32_768, 16
    leaves = [tensor.requires_grad_() for tensor in sample(1, length, heads)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, _ = attend(*leaves)
    peak = torch.cuda.max_memory_allocated() - before
    lse, kept = heads * length * 4, sum(tensor.nbytes for tensor in leaves[3:])
    keys = leaves[0].nbytes  # whole keys for cuDNN's forward pass, gone before the loss
    assert peak <= max(o.nbytes + lse + keys, o.nbytes + 2 * lse + kept) + 64 * 2**20
