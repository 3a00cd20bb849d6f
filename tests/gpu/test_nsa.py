"""Native sparse attention on a GPU: the shipped tiles against fp64, the same bits ten times, bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import ops
from nmoe.effects.kernels.attention import nsa as kernel
from nmoe.pure.model.attention import nsa as pure
from nmoe.pure.model.attention.gqa import attend_gqa
from tests.gpu.test_gqa import documents
from tests.kernels import truth
from tests.kernels.truth import check, graded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

normal = partial(truth.normal, dtype=torch.bfloat16, device="cuda")

PAPER: dict[str, int] = {"block": 32, "stride": 16, "selected_block": 64, "num_selected": 16}


def shipped() -> kernel.Tiles:
    return ops.nsa_tiles(torch.device("cuda"), 192, 128)


def sample(batch: int, positions: int, heads: int, groups: int, width: int = 192, value: int = 128) -> list[Tensor]:
    """q, and k and v as slices of one product each, as the model has them."""
    keys, values = (
        normal(batch, positions, 2, groups, width, seed=1),
        normal(batch, positions, 2, groups, value, seed=2),
    )
    return [normal(batch, positions, heads, width), keys[:, :, 1], values[:, :, 1]]


def compare(ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Ours has at most a small factor of the error of the pure form in bf16: output and every gradient."""
    pulls = [normal(*inputs[0].shape[:3], inputs[2].shape[-1], seed=5)]
    runs = ((ours, None), (plain, None), (plain, torch.float64))
    # a query with one key has no gradient: o . do less v . do, two sums of 128 products in fp32
    check(*(graded(which, inputs, pulls, dtype) for which, dtype in runs), floor=1e-3)


def lists(positions: int, groups: int, count: int, start: Any, block: int) -> Tensor:
    """Random lists of blocks for two rows, the forced ones among them, [2 T K S] i32."""
    first = start.cpu().long() if isinstance(start, Tensor) else torch.zeros(2, positions, dtype=torch.int64)
    own = (torch.arange(positions) - first) // block
    number = -(-positions // block)
    weight = torch.rand(2, positions, groups, number, generator=torch.Generator().manual_seed(7))
    candidate, own = torch.arange(number), own[..., None, None]
    weight = weight.masked_fill((candidate == 0) | (candidate == own) | (candidate == own - 1), torch.inf)
    return pure.best(weight.masked_fill(candidate > own, -torch.inf), count).cuda()


@pytest.mark.parametrize("number", [0, 7, 600])
@pytest.mark.parametrize(
    "shape", [(2, 1500, 32, 2), (2, 1, 16, 1), (2, 40, 16, 4), (2, 65, 16, 4), (2, 900, 6, 2)], ids=str
)
def test_near_the_truth(shape: tuple[int, int, int, int], number: int) -> None:
    """Window, compressed branch and selected branch, with documents and without."""
    inputs, (batch, positions, _, groups) = sample(*shape), shape
    start: Any = documents(batch, positions, number) if number else ()
    scale = 192**-0.5
    compare(
        lambda q, k, v: kernel.window(q, k, v, (), start, scale=scale, window=512, tiles=shipped()),
        lambda q, k, v: attend_gqa(q, k, v, (), start, scale=scale, window=512),
        inputs,
    )
    chosen = lists(positions, groups, 16, start, 64)
    compare(
        lambda q, k, v: kernel.selected(q, k, v, chosen, start, scale=scale, block=64, tiles=shipped()),
        lambda q, k, v: pure.attend_selected(q, k, v, chosen, start, scale=scale, block=64),
        inputs,
    )
    first = pure.first_tokens(positions, start, block=32, stride=16, device=inputs[0].device)
    paper: dict[str, Any] = {**PAPER, "tiles": shipped()}
    if first.shape[1]:
        pooled = [inputs[0], *(x[:, : first.shape[1]].contiguous() for x in inputs[1:])]
        compare(
            lambda q, k, v: kernel.compressed(q, k, v, first, start, scale=scale, **paper)[0],
            lambda q, k, v: pure.attend_compressed(q, k, v, first, start, scale=scale, **PAPER)[0],
            pooled,
        )


@pytest.mark.parametrize("begins", [(), (0, 1, 65, 200)], ids=str)
def test_selected_branch_is_that_of_fla(begins: tuple[int, ...]) -> None:
    """fla 0.6.0's naive form, another group's reading of the equations, in fp32: the pure form, and the kernel."""
    naive: Any = pytest.importorskip("fla.ops.nsa.naive", reason="fla-core is not installed").naive_nsa_selection
    near_naive(naive, begins, partial(kernel.selected, tiles=shipped()), "cuda")


def near_naive(naive: Callable[..., Tensor], begins: tuple[int, ...], ours: Callable[..., Tensor], device: str) -> None:
    """Output and every gradient of a row of 300 tokens, two groups of 16 heads, lists with empty places."""
    positions, groups, scale = 300, 2, 192**-0.5
    inputs = [each[:1].to(device) for each in sample(1, positions, 16 * groups, groups)]
    pulls = [normal(1, positions, 16 * groups, 128, seed=5).to(device)]
    ends = torch.tensor([*begins, positions])
    start: Any = torch.tensor(begins).repeat_interleave(ends.diff()).int()[None].to(device) if begins else ()
    chosen = lists(positions, groups, 4, start, 64)[:1].to(device)
    assert (chosen < 0).any() and (chosen >= 0).any()
    told: dict[str, Any] = {"scale": scale, "block": 64}

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends_told = ends.to(device) if begins else None
        return naive(q, k, v, chosen.long(), block_size=64, scale=scale, cu_seqlens=ends_told)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pure.attend_selected(q, k, v, chosen, start, **told)

    truth = graded(exact, inputs, pulls, torch.float64)
    for a, b in zip(graded(plain, inputs, pulls, torch.float64), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    own = graded(lambda q, k, v: ours(q, k, v, chosen, start, **told), inputs, pulls)
    check(own, graded(plain, inputs, pulls), truth, floor=1e-3)


def test_selection_of_what_is_far_apart() -> None:
    """Keys that make a few blocks much heavier: rounding cannot change the choice."""
    positions = 3000
    q, k, v = (torch.zeros(1, positions, heads, 64, device="cuda").bfloat16() for heads in (16, 1, 1))
    first = pure.first_tokens(positions, (), block=32, stride=16, device=q.device)
    q[..., 0] = 1
    pooled = k[:, : first.shape[1]].clone()
    pooled[0, ::12, 0, 0] = torch.arange(pooled[0, ::12].shape[0], device="cuda").bfloat16() / 2
    told: dict[str, Any] = {"scale": 1.0, **PAPER, "num_selected": 8}
    own: dict[str, Any] = {**told, "tiles": shipped()}
    _, found = kernel.compressed(q, pooled, v[:, : first.shape[1]], first, **own)
    _, right = pure.attend_compressed(q.double(), pooled.double(), v[:, : first.shape[1]].double(), first, **told)
    assert torch.equal(found, right)


@pytest.mark.parametrize("number", [0, 9])
def test_ten_times_the_same_and_never_waiting(number: int) -> None:
    inputs, pulls = sample(2, 2000, 32, 2), [normal(2, 2000, 32, 128, seed=5)] * 3
    start: Any = documents(2, 2000, number) if number else ()
    first = pure.first_tokens(2000, start, block=32, stride=16, device=inputs[0].device)
    told: dict[str, Any] = {"scale": 0.07, "tiles": shipped()}
    paper: dict[str, Any] = {**told, **PAPER}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        pooled = k[:, : first.shape[1]], v[:, : first.shape[1]]
        o, chosen = kernel.compressed(q, *pooled, first, start, **paper)
        selected = kernel.selected(q, k, v, chosen, start, block=64, **told)
        return o, selected, kernel.window(q, k, v, (), start, window=512, **told)

    one = graded(ours, inputs, pulls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [graded(ours, inputs, pulls) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(one, run, strict=True))
