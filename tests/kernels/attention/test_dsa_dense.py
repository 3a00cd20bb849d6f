"""The dense stage of sparse latent attention in the interpreter: numbers of the pure form, in linear memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.attention import dsa_dense as kernel
from nmoe.effects.kernels.attention import dsa_dense_kernels, dsa_index_kernels, mla, mla_kernels
from nmoe.effects.kernels.tables import AttentionTile, SparseTile
from nmoe.pure.model.attention import dsa as pure
from tests.kernels.attention.test_dsa import Silent
from tests.kernels.attention.test_mla import starts
from tests.memory import Peak

NAMES = [field.name for field in attrs.fields(kernel.Tiles)]
BLOCK = AttentionTile(block_m=16, block_n=16, heads=2, num_warps=4, num_stages=1)
ATTENTION = mla.Tiles(forward=BLOCK, dq=BLOCK, dkv=BLOCK)
TILES = kernel.Tiles(**dict.fromkeys(NAMES, SparseTile(block_m=16, block_n=16, num_warps=4, num_stages=1)))

dense: Any = kernel.dense_attention


@attrs.frozen(kw_only=True)
class Sample:
    """q, kv, k_rope and the indexer's q, k, w; a gate of the output; what hides keys."""

    operands: tuple[Tensor, ...]
    gate: Tensor
    start: Tensor | tuple[()] = ()


def sample(positions: int, *, batch: int = 1, heads: int = 3, start: Tensor | tuple[()] = ()) -> Sample:
    """Channels that fill no block; small whole numbers in the indexer: its scores are exact in every format."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, positions, *shape, generator=generator)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, (batch, positions, *shape), generator=generator).float()

    operands = normal(heads, 24), normal(heads, 40), normal(8), whole(2, 8), whole(8), whole(2) / 8
    return Sample(operands=operands, gate=normal(heads, 24), start=start)


def differentiate(attend: Callable[..., Any], s: Sample, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output, loss and the gradients of all six operands, in a format."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in s.operands]
    o, loss = attend(*leaves, s.start, scale=0.3, **options)
    gradients = torch.autograd.grad((o * s.gate.to(dtype)).sum() + 1.7 * loss, leaves)
    return [o.detach(), loss.detach(), *gradients]


def ours(s: Sample, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of the kernels; cuDNN's forward pass of attention is for a GPU alone."""
    return differentiate(kernel.dense_attention, s, dtype, tiles=TILES, attention=ATTENTION)


@pytest.fixture(autouse=True)
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our forward pass of attention, whatever is asked."""

    def own(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return mla.triton_forward(q, kv, k_rope, (), scale, BLOCK)

    monkeypatch.setattr(mla, "cudnn_forward", own)


def check(s: Sample, dtype: torch.dtype = torch.float32) -> None:
    """Errors at most a few times those of the pure form in its format."""
    exact, plain = (differentiate(pure.attend_dense, s, format_) for format_ in (torch.float64, dtype))
    for place, (right, allowed, result) in enumerate(zip(exact, plain, ours(s, dtype), strict=True)):
        # where a query sees one key, the loss and the gradients of scores are differences that end in zero: of two
        # products of a row of the gate and one of the values, or of two logarithms
        size = torch.finfo(dtype).eps * max(right.norm().item(), (exact[0].norm() * s.gate[0, 0, 0].norm()).item())
        error, bound = ((x.double() - right).norm().item() for x in (result, allowed))
        assert result.dtype is allowed.dtype
        assert error <= 3 * bound + 2 * size, (place, error, bound, size)


@pytest.mark.parametrize(("positions", "batch"), [(1, 2), (16, 1), (17, 2), (34, 1)])
def test_lengths(positions: int, batch: int) -> None:
    """One position, a block, one more, and several blocks."""
    check(sample(positions, batch=batch))


@pytest.mark.parametrize("heads", [1, 5])
def test_heads(heads: int) -> None:
    check(sample(18, heads=heads))


@pytest.mark.parametrize("lengths", [[1] * 36, [3, 33], [20, 16]], ids=str)
def test_documents(lengths: list[int]) -> None:
    """Of one token each, and some that end within a block."""
    check(sample(36, batch=2, start=starts(36, lengths, [17, 5])))


def test_half_precision() -> None:
    check(sample(20), torch.float16)


def test_all_scores_equal() -> None:
    """The indexer cannot tell the keys apart: the loss is the distance from an even choice, and w has no gradient."""
    s = sample(20)
    s.operands[4].zero_()
    check(s)
    assert not ours(s)[7].any()


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of queries at a time, and two: gradients of the indexer are the same to rounding."""
    s = sample(34, batch=2, heads=1, start=starts(34, [21, 13], [34]))
    q, kv, k_rope, *index = s.operands
    _, lse = mla.triton_forward(q, kv, k_rope, s.start, 0.3, BLOCK)

    def chunked(workspace: int) -> list[Tensor]:
        monkeypatch.setattr(kernel, "WORKSPACE", workspace)
        loss, gradients = kernel.loss_and_gradients(index, (q, kv, k_rope, lse), s.start, 0.3, True, TILES)
        return [loss, *gradients]

    two_blocks = 2 * 16 * 34 * 4
    whole = chunked(2 * two_blocks)
    for workspace in (1, two_blocks):
        torch.testing.assert_close(chunked(workspace), whole, rtol=2e-5, atol=2e-6)


def test_twice_the_same_bits() -> None:
    s = sample(20)
    assert all(map(torch.equal, ours(s, torch.float16), ours(s, torch.float16)))


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sample(20)
    right = ours(s)[1]
    for name in ("query_kernel", "key_kernel"):
        monkeypatch.delattr(dsa_dense_kernels, name)
    with torch.no_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in s.operands]
        assert torch.equal(dense(*leaves, scale=0.3, tiles=TILES, attention=ATTENTION)[1], right)
    constants = dense(*s.operands, scale=0.3, tiles=TILES, attention=ATTENTION)
    assert torch.equal(constants[1], right) and not constants[1].requires_grad


def test_the_factor_of_the_loss_is_not_rounded() -> None:
    """To fp16 first, 1 + 2^-12 would be 1."""
    s = sample(5)
    leaves = [tensor.half().requires_grad_() for tensor in s.operands]
    _, loss = dense(*leaves, scale=0.3, tiles=TILES, attention=ATTENTION)
    exact = torch.autograd.grad(loss, leaves[3:], torch.tensor(1.0), retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves[3:], torch.tensor(1.0 + 2**-12))
    for one, other in zip(exact, scaled, strict=True):
        assert torch.equal((one.float() * (1 + 2**-12)).half(), other)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing."""
    for module in (dsa_dense_kernels, dsa_index_kernels, mla_kernels, kernel, mla):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Silent())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("length", [8192, 32_768])
def test_workspace_at_the_published_sizes(length: int) -> None:
    """Under 64 MiB beside the gradients of the indexer, which are what is kept: no tensor of all pairs."""
    tile = SparseTile(block_m=64, block_n=128, num_warps=8, num_stages=1)
    shapes = ((128, 192), (128, 256), (64,), (64, 128), (128,), (64,))
    made = [torch.empty(1, length, *shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    lse = torch.empty(1, 128, length, device="meta")
    own = kernel.Tiles(**dict.fromkeys(NAMES, tile))
    with Peak() as peak:
        _, gradients = kernel.loss_and_gradients(made[3:], (*made[:3], lse), (), 0.1, True, own)
    kept = sum(gradient.nbytes for gradient in gradients)
    assert kept == sum(tensor.nbytes for tensor in made[3:])
    assert 16 * 2**20 < peak.bytes - kept <= 64 * 2**20
