"""Latent attention in the interpreter: as near to fp64 as torch's own arithmetic in the same format, and repeatable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.attention import mla as kernel
from nmoe.effects.kernels.tables import AttentionTile
from nmoe.errors import InputError

SMALL = AttentionTile(block_m=16, block_n=16, heads=2, num_warps=4, num_stages=1)


def tiles(m: int, n: int, heads: int = 2) -> kernel.Tiles:
    tile = attrs.evolve(SMALL, block_m=m, block_n=n, heads=heads)
    return kernel.Tiles(forward=tile, dq=tile, dkv=tile)


def truth(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """Attention as a matrix of probabilities, in the format of its arguments."""
    nope, positions = q.shape[-1] - k_rope.shape[-1], torch.arange(q.shape[1])
    s = torch.einsum("bqhc,bkhc->bhqk", q[..., :nope], kv[..., :nope])
    s = s + torch.einsum("bqhp,bkp->bhqk", q[..., nope:], k_rope)
    seen = positions[:, None] >= positions
    if isinstance(start, Tensor):
        seen = seen & (start[:, None, :, None] <= positions)
    p = (s * scale).masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhu->bqhu", p, kv[..., nope:])


def sample(
    batch: int, positions: int, heads: int, sizes: tuple[int, int, int], *, seed: int = 0, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Operands in a format, and a gate for each output."""
    c, u, p = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, positions, heads, c), (batch, positions, heads, c - p + u), (batch, positions, p))
    q, kv, k_rope = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return (q, kv, k_rope), torch.randn(batch, positions, heads, u, generator=generator).to(dtype)


def differentiate(
    attend: Callable[..., Tensor],
    operands: tuple[Tensor, ...],
    gate: Tensor,
    dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Output and gradients, computed in a format."""
    leaves = [each.to(dtype).requires_grad_() for each in operands]
    o = attend(*leaves, *args, **kwargs)
    found = torch.autograd.grad(o, leaves, gate.to(dtype))
    return dict(zip(("o", "q", "kv", "k_rope"), (o.detach(), *found), strict=True))


def check(
    operands: tuple[Tensor, ...], gate: Tensor, start: Tensor | tuple[()], *, scale: float, tiles: kernel.Tiles
) -> None:
    """The kernel errs at most a few times as much as the plain computation in its format."""
    dtype = gate.dtype
    exact = differentiate(truth, operands, gate, torch.float64, start, scale=scale)
    plain = differentiate(truth, operands, gate, dtype, start, scale=scale)
    ours = differentiate(kernel.mla_attention, operands, gate, dtype, start, scale=scale, tiles=tiles)
    for name, right in exact.items():
        size = right.norm().item() * torch.finfo(dtype).eps
        error, allowed = ((each[name].double() - right).norm().item() for each in (ours, plain))
        assert ours[name].dtype is dtype
        assert error <= 3 * allowed + size, (name, error, allowed, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "sizes", "m", "n"),
    [
        ((2, 45, 3, (24, 16, 8)), (24, 16, 8), 16, 16),
        ((1, 1, 1, (24, 16, 8)), (24, 16, 8), 16, 16),
        ((2, 33, 1, (40, 64, 16)), (40, 64, 16), 16, 32),
        ((1, 70, 2, (48, 24, 16)), (48, 24, 16), 32, 16),
        ((1, 64, 5, (24, 16, 8)), (24, 16, 8), 32, 64),
    ],
)
def test_near_the_truth(dtype: torch.dtype, shape: Any, sizes: Any, m: int, n: int) -> None:
    operands, gate = sample(*shape, dtype=dtype)
    check(operands, gate, (), scale=0.3, tiles=tiles(m, n))


def starts(positions: int, *lengths: list[int]) -> Tensor:
    """First position of each position's document, one list of lengths a sequence; the last fills up."""
    rows = []
    for each in lengths:
        first = torch.tensor([0, *each]).cumsum(0).clamp(max=positions)
        counts = torch.diff(first, append=torch.tensor([positions]))
        rows.append(first.repeat_interleave(counts))
    return torch.stack(rows).to(torch.int32)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("lengths", [[1] * 48, [16, 16], [3, 20, 1, 1, 7], []])
def test_documents_do_not_see_each_other(m: int, n: int, lengths: list[int]) -> None:
    operands, gate = sample(2, 51, 1, (24, 16, 8), dtype=torch.float32)
    check(operands, gate, starts(51, lengths, [33, 5]), scale=0.3, tiles=tiles(m, n))


def test_every_split_of_heads_and_blocks_is_computed_once() -> None:
    operands, gate = sample(2, 20, 3, (24, 16, 8), dtype=torch.float32)
    found = [
        differentiate(kernel.mla_attention, operands, gate, torch.float32, scale=0.3, tiles=tiles(16, 16, k))
        for k in (1, 4, 16)
    ]
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in each)


def test_large_scores_and_a_scale_above_one() -> None:
    """Rows whose largest score is far from zero, and hidden scores larger than every visible one."""
    (q, kv, k_rope), gate = sample(1, 40, 2, (24, 16, 8), dtype=torch.float32)
    kv = kv + torch.arange(40)[:, None, None] * 0.1
    check((q, kv, k_rope), gate, starts(40, [9, 20]), scale=1.7, tiles=tiles(16, 16))


@pytest.mark.parametrize(
    ("positions", "sizes", "dtype", "there", "wanted"),
    [
        (256, (192, 128, 64), torch.bfloat16, True, True),
        (256, (192, 128, 64), torch.bfloat16, False, False),
        (320, (192, 128, 64), torch.bfloat16, True, False),
        (256, (192, 128, 64), torch.float16, True, False),
        (256, (192, 64, 64), torch.bfloat16, True, False),
        (256, (192, 128, 32), torch.bfloat16, True, False),
        (256, (160, 128, 32), torch.bfloat16, True, False),
        (256, (224, 128, 96), torch.bfloat16, True, False),
    ],
    ids=str,
)
def test_what_goes_to_the_kernels_for_hopper(
    positions: int, sizes: tuple[int, int, int], dtype: torch.dtype, there: bool, wanted: bool
) -> None:
    operands, _ = sample(1, positions, 2, sizes, dtype=dtype)
    assert attrs.evolve(tiles(16, 16), hopper=there).specialized(*operands) is wanted


@pytest.mark.parametrize("documents", [True, False])
def test_gradients_of_keys_and_values_for_hopper_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, documents: bool
) -> None:
    """The kernel gets the ends of documents, and its parts of the rotated keys' gradient are added up."""
    (q, kv, k_rope), do = sample(1, 128, 3, (192, 128, 64), dtype=torch.bfloat16)
    top, delta = torch.randn(2, 3, 128)
    start: Tensor | tuple[()] = starts(128, [20, 43]) if documents else ()
    told: list[Any] = []
    parts = torch.randn(1, 3, 128, 64)

    def gradients(*given: Any) -> tuple[Tensor, Tensor]:
        told.extend(given)
        return kv + 1, parts

    monkeypatch.setattr(kernel.mla_dkv, "gradients", gradients)
    there = attrs.evolve(tiles(16, 16), hopper=True)
    dkv, dk_rope = kernel.dkv_pass(q, kv, k_rope, start, top, delta, do, 0.3, there)
    assert torch.equal(dkv, kv + 1) and torch.equal(dk_rope, parts.sum(1))
    end = told.pop(3)
    assert all(a is b for a, b in zip(told, (q, kv, k_rope, top, delta, do, 0.3), strict=True))
    if documents:
        ends = torch.tensor([20, 63, 128], dtype=torch.int32)
        assert torch.equal(end, ends.repeat_interleave(torch.tensor([20, 43, 65]))[None])
    else:
        assert end is None


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Tensor, ...]:
    """What cuDNN returns: output like q, natural log-sums [B H T 1] that may lie in memory as [B T H 1]."""
    assert rest == (None, True, 0.0, True, False)
    s = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
    lse = s.logsumexp(-1, keepdim=True).float()
    o = (s.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2)
    nothing = torch.empty(0)
    return o, lse.transpose(1, 2).contiguous().transpose(1, 2), nothing, nothing, nothing, nothing, nothing, nothing, q


def back_by_cudnn(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Tensor, ...]:
    """What its backward returns: gradients of whole queries, keys and values."""
    assert rest[-2:] == (0.0, True)
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    with torch.enable_grad():
        o = by_cudnn(*leaves, None, True, 0.0, True, False, scale=scale)[0]
    return torch.autograd.grad(o, leaves, do)


def test_our_backward_takes_the_forward_of_cudnn() -> None:
    operands, gate = sample(2, 37, 3, (24, 16, 8), dtype=torch.float32)
    told = {"scale": 0.3, "tiles": tiles(16, 16)}
    ours = differentiate(kernel.mla_attention, operands, gate, torch.float32, **told)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", by_cudnn)
        patch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", back_by_cudnn)
        mixed = differentiate(kernel.mla_attention, operands, gate, torch.float32, forward="cudnn", **told)
        theirs = differentiate(kernel.mla_attention_cudnn, operands, gate, torch.float32, scale=0.3)
    for name, one in ours.items():
        torch.testing.assert_close(mixed[name], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs[name], one, rtol=1e-4, atol=1e-5)


def test_slices_of_wider_products_are_read_where_they_lie() -> None:
    """The query without a low rank of its own, beside the shared key; and a gradient that is an expanded number."""
    (q, kv, k_rope), _ = sample(2, 21, 2, (24, 16, 8), dtype=torch.float32)
    down = torch.cat((q.flatten(2), k_rope), -1).requires_grad_()
    sliced = down[..., :48].unflatten(-1, (2, 24)), kv, down[..., 48:]
    o = kernel.mla_attention(*sliced, scale=0.3, tiles=tiles(16, 16))
    (found,) = torch.autograd.grad(o.sum(), down)
    gate = torch.ones(o.shape)
    whole = differentiate(kernel.mla_attention, (q, kv, k_rope), gate, torch.float32, scale=0.3, tiles=tiles(16, 16))
    assert torch.equal(o, whole["o"])
    assert torch.equal(found, torch.cat((whole["q"].flatten(2), whole["k_rope"]), -1))


@pytest.mark.parametrize(
    ("sizes", "change", "told"),
    [
        ((22, 16, 8), {}, "model.attention.qk_nope_head_dim: expected a multiple of 4 .* got 14; write 16"),
        ((24, 16, 6), {}, "model.attention.qk_rope_head_dim: expected a multiple of 4 .* got 6; write 8"),
        ((24, 260, 8), {}, "model.attention.v_head_dim: .* up to 256 .* got 260; write 256"),
        ((24, 16, 8), {"scale": 0.0}, "mla_attention: expected scale > 0, got 0.0"),
        ((24, 16, 8), {"forward": "cudnn", "start": torch.zeros(1, 3)}, "got start; pass forward='triton'"),
    ],
)
def test_what_the_kernels_do_not_take(sizes: Any, change: dict[str, Any], told: str) -> None:
    operands, _ = sample(1, 3, 1, sizes, dtype=torch.float32)
    options: dict[str, Any] = {"scale": 0.3, "tiles": tiles(16, 16), **change}
    with pytest.raises(InputError, match=told):
        kernel.mla_attention(*operands, **options)


def test_formats_are_one() -> None:
    (q, kv, k_rope), _ = sample(1, 3, 1, (24, 16, 8), dtype=torch.float32)
    with pytest.raises(InputError, match="all in bf16 or all in fp16, got torch.float32, torch.float16"):
        kernel.mla_attention(q, kv.half(), k_rope, scale=0.3, tiles=tiles(16, 16))
