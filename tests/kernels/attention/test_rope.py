"""Rotation in the interpreter: the reference's numbers, in place and back, and nothing beside the rotated channels."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.attention import rope as kernel
from nmoe.pure.model.attention.mla import rotate_mla
from nmoe.pure.model.rope import Rope, table

TILE = attrs.evolve(kernel.TILE, block_m=16)


def sample(batch: int, length: int, heads: int, c: int, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Rope]:
    """A projection's output, the shared key as a slice of a wider product, and a table longer than the sequence."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, length, heads, c, generator=generator).to(dtype)
    down = torch.randn(batch, length, 16 + p, generator=generator).to(dtype)
    return q, down[..., 16:], table(length + 7, p, theta=100.0, yarn=None)


def scrambled(batch: int, length: int, kind: torch.dtype) -> Tensor:
    """Positions in no order, up to the end of the table."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(length + 7, (batch, length), generator=generator).to(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 37, 3, 24, 8), (1, 1, 1, 12, 6), (3, 5, 2, 48, 16)])
def test_as_the_reference(shape: tuple[int, ...], positions: torch.dtype | None, dtype: torch.dtype) -> None:
    batch, length, heads, channels, turned = shape
    q, k_rope, rope = sample(batch, length, heads, channels, turned, dtype)
    placed = () if positions is None else scrambled(batch, length, positions)
    leaves = [q.clone().requires_grad_(), k_rope.clone().requires_grad_()]
    theirs = rotate_mla(*leaves, rope=rope, positions=placed)
    gates = [torch.randn(each.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for each in theirs]
    expected = [*theirs, *torch.autograd.grad(theirs, leaves, gates)]

    # Heads beside each other in a wider product, as when the query has no low rank of its own
    wide = torch.cat((torch.zeros(*q.shape[:2], 8, dtype=dtype), q.flatten(2)), -1)
    mine = [wide[..., 8:].unflatten(-1, q.shape[2:]).requires_grad_(), k_rope.requires_grad_()]
    kept = k_rope.detach().clone()
    ours = kernel.rotate_mla_(*mine, rope=rope, positions=placed, tile=TILE)
    found = [*ours, *torch.autograd.grad(ours, mine, [each.clone() for each in gates])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert torch.equal(k_rope, kept)
    assert ours[0].data_ptr() == wide[..., 8:].data_ptr()
    assert not wide[..., :8].any()
    nope = q.shape[-1] - k_rope.shape[-1]
    assert torch.equal(found[0][..., :nope], q[..., :nope])
    assert torch.equal(found[2][..., :nope], gates[0][..., :nope])


def test_an_extended_table_stretches_forward_and_backward_alike() -> None:
    """With YaRN's magnitude the rotation is no isometry; its gradient is the transpose, not the inverse."""
    q, k_rope, rope = sample(1, 9, 2, 12, 4, torch.float32)
    rope = Rope(1.5 * rope.cos, 1.5 * rope.sin)
    leaves = [q.clone().requires_grad_(), k_rope.clone().requires_grad_()]
    expected = torch.autograd.grad([each.square().sum() for each in rotate_mla(*leaves, rope=rope)], leaves)
    mine = [q.clone().requires_grad_(), k_rope.clone().requires_grad_()]
    ours = kernel.rotate_mla_(*mine, rope=rope, tile=TILE)
    found = torch.autograd.grad([each.square().sum() for each in ours], mine)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
