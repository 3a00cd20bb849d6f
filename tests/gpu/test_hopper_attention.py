"""Latent attention's backward pass for Hopper: as near to fp64 as the other kernels, the same bits, never waiting."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import hopper, mla
from nmoe.effects.kernels.attention.blocks import ends
from nmoe.effects.kernels.attention.hopper import mla_dkv, mla_dq
from tests.kernels import truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
    # of the gradients in fp64, where autograd's thread multiplies for the first time
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")

NOPE, ROPE, VALUE = hopper.SIZES
SCALE = (NOPE + ROPE) ** -0.5

SHAPES = [(2, 128, 1, 0), (2, 384, 3, 0), (1, 2048, 5, 0), (1, 1024, 3, 1), (2, 640, 2, 20), (1, 1024, 2, 400)]
"""Sequences, positions, heads, documents of a sequence; 0: none are told apart."""


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a GPU of compute capability 9.0 is needed")


@attrs.frozen(kw_only=True)
class Pass:
    """What the backward pass is given, and its gradients in fp64: of q, kv and k_rope."""

    q: Tensor
    kv: Tensor
    k_rope: Tensor
    start: Tensor | tuple[()]
    o: Tensor
    lse: Tensor
    do: Tensor
    tiles: mla.Tiles
    true: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: int, positions: int, heads: int, documents: int) -> Pass:
        q, kv = normal(batch, positions, heads, NOPE + ROPE), normal(batch, positions, heads, NOPE + VALUE, seed=1)
        k_rope, do = normal(batch, positions, ROPE, seed=2), normal(batch, positions, heads, VALUE, seed=3)
        start: Tensor | tuple[()] = ()
        if documents:
            begins = torch.rand(batch, positions, generator=torch.Generator().manual_seed(5)) < documents / positions
            begins[0, 63::256] = True  # one that begins with the last key of a group's
            start = torch.where(begins, torch.arange(positions), 0).cummax(1).values.to(torch.int32).cuda()
        tiles = attrs.evolve(ops.mla_tiles(torch.device("cuda"), NOPE, ROPE, VALUE), hopper=False)
        o, lse = mla.triton_forward(q, kv, k_rope, start, SCALE, tiles.forward)
        return cls(
            q=q, kv=kv, k_rope=k_rope, start=start, o=o, lse=lse, do=do, tiles=tiles,
            true=gradients(q.double(), kv.double(), k_rope.double(), start, do.double()),
        )  # fmt: skip

    def dq(self, *, hopper: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of queries, and what the other pass needs of each: top and delta."""
        tiles = attrs.evolve(self.tiles, hopper=hopper)
        return mla.dq_pass(self.q, self.kv, self.k_rope, self.start, self.o, self.lse, self.do, SCALE, tiles)

    def dkv(self, top: Tensor, delta: Tensor, *, hopper: bool) -> tuple[Tensor, Tensor]:
        tiles = attrs.evolve(self.tiles, hopper=hopper)
        return mla.dkv_pass(self.q, self.kv, self.k_rope, self.start, top, delta, self.do, SCALE, tiles)


def gradients(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], do: Tensor) -> tuple[Tensor, ...]:
    """By autograd, a matrix of probabilities a head."""
    leaves = [each.requires_grad_() for each in (q, kv, k_rope)]
    at = torch.arange(q.shape[1], device=q.device)
    seen = (at[:, None] >= at)[None, None]
    if isinstance(start, Tensor):
        seen = seen & (start[:, None, :, None] <= at)
    s = torch.einsum("bqhc,bkhc->bhqk", q[..., :NOPE], kv[..., :NOPE])
    s = (s + torch.einsum("bqhp,bkp->bhqk", q[..., NOPE:], k_rope)) * SCALE
    o = torch.einsum("bhqk,bkhu->bqhu", s.masked_fill(~seen, float("-inf")).softmax(-1), kv[..., NOPE:])
    return torch.autograd.grad(o, leaves, do)


def poison(*like: Tensor) -> None:
    """The memory that the next results are given holds NaN."""
    held = [torch.full_like(each, torch.nan) for each in like for _ in range(2)]
    torch.cuda.synchronize()
    del held


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries(shape: tuple[int, int, int, int]) -> None:
    """Their gradient's error is that of the kernel that runs everywhere, within a twentieth; its top and delta."""
    given = Pass.of(*shape)
    other = given.dq()
    poison(*other)
    found = given.dq(hopper=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = given.dq(hopper=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, again))
    own, plain, true = found[0].double(), other[0].double(), given.true[0]
    assert (own - true).norm() <= 1.05 * (plain - true).norm()
    assert (own - true).abs().max() <= 2 * (plain - true).abs().max()
    assert torch.equal(found[1], other[1])
    assert torch.allclose(found[2], other[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [0, 6])
def test_queries_again_and_again(documents: int) -> None:
    given = Pass.of(2, 2048, 8, documents)
    wanted = [each.clone() for each in given.dq(hopper=True)]
    assert [i for i in range(200) if not all(map(torch.equal, given.dq(hopper=True), wanted))] == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_and_values(shape: tuple[int, int, int, int]) -> None:
    """Errors of each gradient are those of the kernels that run everywhere, within a twentieth."""
    given = Pass.of(*shape)
    _, top, delta = given.dq()
    other = given.dkv(top, delta, hopper=False)
    poison(*other)
    found = given.dkv(top, delta, hopper=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = given.dkv(top, delta, hopper=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, again))
    _, true_kv, true_rope = given.true

    def parts(dkv: Tensor, dk_rope: Tensor) -> list[Tensor]:
        return [dkv[..., :NOPE].double(), dkv[..., NOPE:].double(), dk_rope.double()]

    for name, own, plain, true in zip(
        ("keys", "values", "rotated keys"), parts(*found), parts(*other), parts(true_kv, true_rope), strict=True
    ):
        assert (own - true).norm() <= 1.05 * (plain - true).norm(), name
        assert (own - true).abs().max() <= 2 * (plain - true).abs().max(), name


def test_hidden_scores_above_all_that_are_seen() -> None:
    """Their exponentials have no place in fp16, nor in fp32: what is hidden is so before it is rounded."""
    given = Pass.of(1, 512, 2, 4)
    growing = (torch.arange(512, device="cuda") / 4)[:, None, None].bfloat16()
    kv = torch.cat([given.kv[..., :NOPE] + growing, given.kv[..., NOPE:]], -1)
    o, lse = mla.triton_forward(given.q, kv, given.k_rope, given.start, SCALE, given.tiles.forward)
    hard = attrs.evolve(given, kv=kv, o=o, lse=lse)
    dq, top, delta = hard.dq()
    found = (hard.dq(hopper=True)[0], *hard.dkv(top, delta, hopper=True))
    for own, plain in zip(found, (dq, *hard.dkv(top, delta, hopper=False)), strict=True):
        assert own.isfinite().all()
        assert (own.double() - plain.double()).norm() <= 1e-2 * plain.double().norm()


@pytest.mark.parametrize("documents", [0, 6])
def test_keys_and_values_again_and_again(documents: int) -> None:
    given = Pass.of(2, 2048, 8, documents)
    _, top, delta = given.dq()
    wanted = [each.clone() for each in given.dkv(top, delta, hopper=True)]
    assert [i for i in range(200) if not all(map(torch.equal, given.dkv(top, delta, hopper=True), wanted))] == []


def test_operands_that_are_parts_of_others() -> None:
    """Rows that are not side by side are read where they are, or copied: the bits are those of whole ones."""
    given = Pass.of(2, 256, 3, 0)
    _, top, delta = given.dq()
    wanted = given.dkv(top, delta, hopper=True)
    wide = torch.cat([given.q, torch.full_like(given.q, torch.nan)], 2)[:, :, :3]
    do = given.do.transpose(1, 2).contiguous().transpose(1, 2)
    assert not wide.is_contiguous() and not do.is_contiguous()
    end = ends(given.start) if isinstance(given.start, Tensor) else None
    dkv, dk_rope = mla_dkv.gradients(wide, given.kv, given.k_rope, end, top, delta, do, SCALE)
    assert torch.equal(dkv, wanted[0]) and torch.equal(dk_rope.sum(1), wanted[1])
    o, lse = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (given.o, given.lse))
    found = mla_dq.gradient(wide, given.kv, given.k_rope, None, o, lse, do, SCALE)
    assert all(map(torch.equal, found, given.dq(hopper=True)))


@pytest.mark.parametrize("shape", [(2, 1024, 16, 0), (2, 1000, 3, 0), (1, 1024, 4, 7)], ids=str)
def test_a_whole_backward_pass(shape: tuple[int, int, int, int]) -> None:
    """With the tiles that ship; 1,000 positions are no whole blocks, and go to the other kernels."""
    given = Pass.of(*shape)
    tiles = ops.mla_tiles(torch.device("cuda"), NOPE, ROPE, VALUE)
    assert tiles.specialized(given.q, given.kv, given.k_rope) == (shape[1] % hopper.BLOCK == 0)
    leaves = [each.detach().requires_grad_() for each in (given.q, given.kv, given.k_rope)]

    def run(tiles: mla.Tiles) -> tuple[Tensor, ...]:
        q, kv, k_rope = leaves
        y = mla.mla_attention(q, kv, k_rope, given.start, scale=SCALE, tiles=tiles)
        return torch.autograd.grad(y, leaves, given.do)

    for own, plain, true in zip(run(tiles), run(given.tiles), given.true, strict=True):
        assert (own.double() - true).norm() <= 1.05 * (plain.double() - true).norm()
