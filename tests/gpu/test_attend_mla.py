"""Attention and rotation on a GPU: every shipped tile against fp64, the same bits ten times, never waiting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import mla as kernel
from nmoe.effects.kernels.attention.rope import rotate_mla_
from nmoe.pure.model.attention import mla
from nmoe.pure.model.rope import Rope, table
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")

SCALE = 192**-0.5


def attend(*leaves: Tensor, **told: Any) -> Tensor:
    """Our kernels with the tiles that ship."""
    return kernel.mla_attention(*leaves, tiles=ops.mla_tiles(torch.device("cuda"), 128, 64, 128), **told)


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "triton": partial(attend, scale=SCALE, forward="triton"),
    "cudnn": partial(attend, scale=SCALE, forward="cudnn"),
    "cudnn, its backward": partial(kernel.mla_attention_cudnn, scale=SCALE),
}


def sample(batch: int, positions: int, heads: int, c: int = 192, u: int = 128, p: int = 64) -> tuple[Tensor, ...]:
    """q, kv, k_rope."""
    return (
        normal(batch, positions, heads, c),
        normal(batch, positions, heads, c - p + u, seed=1),
        normal(batch, positions, p, seed=2),
    )


def plain(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float = SCALE) -> Tensor:
    """A matrix of probabilities, in the format of its arguments."""
    nope, at = q.shape[-1] - k_rope.shape[-1], torch.arange(q.shape[1], device=q.device)
    s = torch.einsum("bqhc,bkhc->bhqk", q[..., :nope], kv[..., :nope])
    s = (s + torch.einsum("bqhp,bkp->bhqk", q[..., nope:], k_rope)) * scale
    seen = at[:, None] >= at
    if isinstance(start, Tensor):
        seen = seen & (start[:, None, :, None] <= at)
    p = s.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhu->bqhu", p, kv[..., nope:])


def documents(batch: int, positions: int, number: int) -> Tensor:
    """Starts of random documents, [B T] i32."""
    generator = torch.Generator().manual_seed(5)
    begins = torch.rand(batch, positions, generator=generator) < number / positions
    at = torch.arange(positions)
    return torch.where(begins, at, 0).cummax(1).values.to(torch.int32).cuda()


@pytest.mark.parametrize("shape", [(2, 1024, 16), (1, 1000, 3), (2, 2, 1), (1, 4096, 2)], ids=str)
@pytest.mark.parametrize("way", FORWARDS)
def test_near_the_truth(way: str, shape: tuple[int, int, int]) -> None:
    inputs, pulls = sample(*shape), [normal(*shape, 128, seed=3)]
    found = graded(FORWARDS[way], inputs, pulls)
    check(found, graded(plain, inputs, pulls), graded(plain, inputs, pulls, torch.float64))


@pytest.mark.parametrize("sizes", [(48, 32, 16), (96, 64, 32), (128, 96, 32)], ids=str)
def test_other_heads(sizes: tuple[int, int, int]) -> None:
    inputs, pulls = sample(2, 333, 3, *sizes), [normal(2, 333, 3, sizes[1], seed=3)]
    ours = partial(attend, scale=0.1, forward="triton")
    plainly = partial(plain, scale=0.1)
    check(graded(ours, inputs, pulls), graded(plainly, inputs, pulls), graded(plainly, inputs, pulls, torch.float64))


@pytest.mark.parametrize("number", [1, 8, 200])
def test_documents(number: int) -> None:
    shape, start = (2, 1000, 4), documents(2, 1000, number)
    inputs, pulls = sample(*shape), [normal(*shape, 128, seed=3)]

    def ours(*leaves: Tensor) -> Tensor:
        return FORWARDS["triton"](*leaves, start=start)

    def plainly(*leaves: Tensor) -> Tensor:
        return plain(*leaves, start=start)

    check(graded(ours, inputs, pulls), graded(plainly, inputs, pulls), graded(plainly, inputs, pulls, torch.float64))


@pytest.mark.parametrize("way", ["triton", "cudnn"])
def test_ten_times_the_same_and_never_waiting(way: str) -> None:
    inputs, pulls = sample(2, 1024, 16), [normal(2, 1024, 16, 128, seed=3)]
    first = graded(FORWARDS[way], inputs, pulls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(FORWARDS[way], inputs, pulls) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def test_rotation() -> None:
    """In place, within a step of bf16 of the reference, forward and backward."""
    rope = table(1024, 64, theta=1e4, yarn=None)
    rope = Rope(rope.cos.cuda(), rope.sin.cuda())
    q, _, k_rope = sample(2, 1000, 16)
    pulls = [normal(2, 1000, 16, 192, seed=4), normal(2, 1000, 64, seed=5)]

    def run(rotate: Callable[..., Any]) -> list[Tensor]:
        leaves = [q.clone().requires_grad_(), k_rope.clone().requires_grad_()]
        results = rotate(*leaves, rope)
        gradients = torch.autograd.grad(results, leaves, [each.clone() for each in pulls])
        return [each.detach() for each in (*results, *gradients)]

    for ours, reference in zip(run(rotate_mla_), run(mla.rotate_mla), strict=True):
        torch.testing.assert_close(ours, reference, rtol=2**-7, atol=2**-9)
