"""The mixture in the interpreter against `pure.experts.mixture`, on routing as the router makes it and at its worst."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.kernels.moe import combine, persistent
from nmoe.effects.kernels.moe import dispatch as sorting
from nmoe.effects.kernels.moe import experts as gemms
from nmoe.effects.kernels.moe import moe as mixture
from nmoe.effects.kernels.moe.moe import Tiles, moe_experts
from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.model import experts, route
from nmoe.pure.model.route import Routing
from tests.kernels.truth import check, graded, normal

SMALL = GemmTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
TILES = Tiles(
    up=SMALL, down=SMALL, activation=SMALL, down_gradient=SMALL, input=SMALL, up_gradient=SMALL, group=3, programs=5
)


def chosen(kind: str, tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Experts of each token [N K], no expert twice in a row."""
    score = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1))
    if kind == "all to one":
        score[:, 3] += 1
    elif kind == "some have none":
        score[:, ::2] -= 2
    elif kind == "ties":
        score[:] = 0.5
    # as the router leaves it: a slice of wider rows, not rows of its own
    return route.top_k(score, top_k)


ROUTED = [
    *(((50, 40, 24, 8, 3), kind) for kind in ("random", "all to one", "some have none", "ties")),
    *(((2, 32, 8, 4, 2), "random"), ((33, 40, 16, 5, 5), "random"), ((9, 40, 16, 70, 2), "ties")),
]
"""Tokens, hidden size, width, experts, chosen ones: few tokens, K = E, sizes that no tile divides, many experts."""


def operands(shape: tuple[int, ...]) -> list[Tensor]:
    """Tokens, weights of the choices, and both matrices of every expert."""
    tokens, hidden, width, num_experts, top_k = shape
    return [
        normal(tokens, hidden),
        normal(tokens, top_k, seed=1).abs(),
        normal(num_experts, hidden, 2, width, seed=2) / hidden**0.5,
        normal(num_experts, width, hidden, seed=3) / width**0.5,
    ]


@pytest.mark.parametrize(("shape", "kind"), ROUTED, ids=str)
def test_near_the_truth(shape: tuple[int, ...], kind: str) -> None:
    tokens, hidden, _, num_experts, top_k = shape
    expert = chosen(kind, tokens, num_experts, top_k)
    inputs = operands(shape)

    def by(which: Any) -> Any:
        def apply(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return which(x, Routing(expert, weight), up, down)[0]

        return apply

    pulls = [normal(tokens, hidden, seed=4)]
    ours, plain = by(partial(moe_experts, tiles=TILES)), by(experts.moe_experts)
    truth = graded(plain, inputs, pulls, torch.float64)
    check(graded(ours, inputs, pulls), graded(plain, inputs, pulls), truth, factor=2.0)
    _, count = moe_experts(inputs[0], Routing(expert, inputs[1]), *inputs[2:], tiles=TILES)
    assert torch.equal(count, route.load(expert, num_experts))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_added_is_added_before_rounding(number: int) -> None:
    """With its gradient, which is the output's; a slice of wider rows, too."""
    shape = (50, 40, 24, 8, 3)
    expert, inputs = chosen("random", 50, 8, 3), operands(shape)
    inputs += [normal(50, 96, seed=6 + place)[:, 32 : 32 + 40] for place in range(number)]

    def by(which: Any) -> Any:
        return lambda x, weight, up, down, *added: which(x, Routing(expert, weight), up, down, added=added)[0]

    pulls = [normal(50, 40, seed=4)]
    ours, plain = by(partial(moe_experts, tiles=TILES)), by(experts.moe_experts)
    truth = graded(plain, inputs, pulls, torch.float64)
    found = graded(ours, inputs, pulls)
    check(found, graded(plain, inputs, pulls), truth, factor=2.0)
    assert all(torch.equal(gradient, pulls[0]) for gradient in found[-number:])
    rows, one = torch.full((4, 8), 2048.0).half(), torch.ones(4, 8).half()
    y = combine.combine(rows, torch.arange(4, dtype=torch.int32)[:, None], None, (one, one.clone()))
    assert y.unique().tolist() == [2050.0], "2048 + 1 is 2048 in fp16"


@pytest.mark.parametrize(("shape", "kind"), ROUTED[:5], ids=str)
@pytest.mark.parametrize("form", ({"limit": 0.7, "alpha": 1.702}, {}), ids=("clamped", "SwiGLU"))
def test_biases_and_a_clamp_near_the_truth(form: dict[str, float], shape: tuple[int, ...], kind: str) -> None:
    """An expert without rows has a gradient of zeros; a tenth of the gates and values lies beyond the clamp."""
    tokens, hidden, width, num_experts, top_k = shape
    expert = chosen(kind, tokens, num_experts, top_k)
    inputs = [*operands(shape), normal(num_experts, 2, width, seed=5)]

    def by(which: Any) -> Any:
        return lambda x, weight, *rest: which(x, Routing(expert, weight), *rest, **form)[0]

    pulls = [normal(tokens, hidden, seed=4)]
    ours, plain = by(partial(moe_experts, tiles=TILES)), by(experts.moe_experts)
    truth = graded(plain, inputs, pulls, torch.float64)
    check(graded(ours, inputs, pulls), graded(plain, inputs, pulls), truth, factor=2.0)


def test_weight_gradients_go_into_their_buffers() -> None:
    """Stored by the first microbatch, whatever was there, and added by the second: the bits that autograd sums."""
    tokens, hidden, width, num_experts, top_k = 33, 40, 24, 6, 2
    up = (normal(num_experts, hidden, 2, width, seed=2) / hidden**0.5).requires_grad_()
    down = (normal(num_experts, width, hidden, seed=3) / width**0.5).requires_grad_()
    buffers = {leaf.data_ptr(): torch.full_like(leaf, torch.nan) for leaf in (up, down)}
    complete: list[int] = []
    accumulator = Accumulator(buffers=buffers, added=lambda leaf: complete.append(leaf.data_ptr()))
    for index in range(2):
        routing = Routing(chosen("some have none", tokens, num_experts, top_k), normal(tokens, top_k, seed=1).abs())
        x, pulls = normal(tokens, hidden, seed=10 + index), normal(tokens, hidden, seed=20 + index)
        accumulator.first = index == 0
        moe_experts(x, routing, up, down, tiles=TILES, accumulator=accumulator)[0].backward(pulls)
        assert up.grad is None and down.grad is None and len(complete) == 2 * (index + 1)
    for index in range(2):
        routing = Routing(chosen("some have none", tokens, num_experts, top_k), normal(tokens, top_k, seed=1).abs())
        x, pulls = normal(tokens, hidden, seed=10 + index), normal(tokens, hidden, seed=20 + index)
        moe_experts(x, routing, up, down, tiles=TILES)[0].backward(pulls)
    for leaf in (up, down):
        assert leaf.grad is not None and torch.equal(buffers[leaf.data_ptr()], leaf.grad)
    assert complete[:2] == [down.data_ptr(), up.data_ptr()] and accumulator.stored == set(buffers)


@pytest.mark.parametrize("kind", ["random", "all to one", "ties"])
def test_rows_are_sorted_as_the_reference_sorts_them(kind: str) -> None:
    expert = chosen(kind, 700, 9, 4)
    at = sorting.dispatch(expert, 9)
    rows = experts.dispatch(torch.zeros(700, 1), Routing(expert, torch.ones(700, 4)), num_experts=9)
    assert torch.equal(at.slot.long(), rows.slot) and torch.equal(at.source.long(), rows.source)
    assert torch.equal(at.count.long(), rows.count) and torch.equal(at.end.long(), rows.count.cumsum(0))
    assert torch.equal(at.place.flatten().long()[rows.slot], torch.arange(2800))


def test_tiles_cover_every_row_once_and_no_two_experts() -> None:
    count = torch.tensor([0, 5, 16, 0, 33, 1, 0], dtype=torch.int32)
    cut = sorting.tiles(count, 55, 16)
    expert, row = cut.expert, cut.row
    assert cut.needed.tolist() == [int((expert >= 0).sum())]
    assert len(expert) == 4 + 7
    ends = count.cumsum(0)
    covered: list[int] = []
    for e, first in zip(expert.tolist(), row.tolist(), strict=True):
        if e >= 0:
            covered += range(first, min(first + 16, int(ends[e])))
            assert int(ends[e] - count[e]) <= first < int(ends[e])
    assert covered == list(range(55))


def test_products_with_tiles_of_other_rows_read_their_own() -> None:
    """Tiles are described once for each number of rows, and every product reads those of its own."""
    shape, large = (50, 40, 24, 8, 3), attrs.evolve(SMALL, block_m=32)
    expert, inputs = chosen("random", 50, 8, 3), operands(shape)

    def run(tiles: Tiles) -> list[Tensor]:
        def apply(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return moe_experts(x, Routing(expert, weight), up, down, tiles=tiles)[0]

        return graded(apply, inputs, [normal(50, 40, seed=4)])

    for name in ("up", "down", "activation", "input"):
        for found, wanted in zip(run(attrs.evolve(TILES, **{name: large})), run(TILES), strict=True):
            torch.testing.assert_close(found, wanted)


def test_twice_is_bitwise_the_same() -> None:
    expert = chosen("random", 30, 6, 2)
    inputs = [normal(30, 32), normal(30, 2, seed=1).abs(), normal(6, 32, 2, 16, seed=2), normal(6, 16, 32, seed=3)]

    def apply(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return moe_experts(x, Routing(expert, weight), up, down, tiles=TILES)[0]

    one, two = (graded(apply, inputs, [normal(30, 32, seed=4)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_rows_beyond_32_bits() -> None:
    """Rows that lie more than 2^31 elements into a buffer. The memory before them is not touched and costs nothing."""
    hidden, width, rows = 64, 32, 16
    far = 2**31 // hidden + 8
    x = normal(rows, hidden, dtype=torch.float16)
    place = far + torch.arange(rows, dtype=torch.int32)[:, None]
    spread = torch.empty(far + rows, hidden, dtype=torch.float16)
    kernel: Any = sorting.spread_kernel
    kernel[(rows, 1)](x, place, spread, hidden, 1, 64)
    assert torch.equal(spread[far:], x)
    assert torch.equal(combine.combine(spread, place, torch.ones(rows, 1)), x)

    up = normal(1, hidden, 2, width, seed=1, dtype=torch.float16)
    end = torch.tensor([far + rows], dtype=torch.int32)
    tile = sorting.RowTiles(
        expert=torch.zeros(1, dtype=torch.int32),
        row=torch.tensor([far], dtype=torch.int32),
        needed=torch.ones(1, dtype=torch.int32),
    )
    y = gemms.grouped_gemm(spread, up.flatten(2), end, tile, SMALL, 1, transposed=False)
    torch.testing.assert_close(y[far:], x @ up[0].flatten(1))
    source = torch.zeros(far + rows, dtype=torch.int32)
    source[far:] = torch.arange(rows)
    h, a = gemms.gather_gemm_swiglu(x, source, up, end, tile, SMALL, 1)
    assert torch.equal(h[far:].flatten(1), y[far:])
    torch.testing.assert_close(a[far:], experts.swiglu(h[far:]))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", ["random", "all to one", "some have none"])
def test_a_gradient_that_gathers_has_the_bits_of_one_of_rows(kind: str, add: bool) -> None:
    expert = chosen(kind, 50, 6, 2)
    at = sorting.dispatch(expert, 6)
    x, dh = normal(50, 24), normal(100, 40, seed=1)
    by_rows, gathered = normal(6, 24, 40, seed=3), normal(6, 24, 40, seed=3)
    how: dict[str, Any] = {"end": at.end, "count": at.count, "tile": SMALL, "group": 2, "add": add}
    gemms.grouped_weight_gradient_(by_rows, sorting.spread(x, at.place), dh, **how)
    gemms.grouped_weight_gradient_(gathered, x, dh, **how, source=at.source)
    assert torch.equal(by_rows, gathered)


def test_a_layer_that_gathers_has_the_bits_of_one_of_rows() -> None:
    shape = (50, 40, 24, 8, 3)
    inputs, pulls = operands(shape), [normal(50, 40, seed=4)]

    def run(tiles: Tiles) -> list[Tensor]:
        expert = chosen("random", *shape[:1], *shape[3:])
        return graded(
            lambda x, weight, up, down: moe_experts(x, Routing(expert, weight), up, down, tiles=tiles)[0], inputs, pulls
        )

    gathering = run(attrs.evolve(TILES, gathered=SMALL))
    assert all(torch.equal(a, b) for a, b in zip(gathering, run(TILES), strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["random", "all to one", "some have none"])
def test_programs_that_take_several_tiles_have_the_bits_of_one_each(kind: str, transposed: bool) -> None:
    at = sorting.dispatch(chosen(kind, 50, 6, 2), 6)
    for inner in (40, 776):
        rows, weight = normal(100, inner), normal(6, 24, inner, seed=1) if transposed else normal(6, inner, 24, seed=1)
        given = (rows, weight, at.end, sorting.tiles(at.count, 100, SMALL.block_m), SMALL, 2)
        found = persistent.grouped_gemm(*given, 5, transposed=transposed)
        assert torch.equal(found, gemms.grouped_gemm(*given, transposed=transposed))


@pytest.mark.parametrize("gathered", [None, SMALL], ids=["rows", "gathered"])
@pytest.mark.parametrize("many", [True, False], ids=["many rows", "few rows"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_a_layer_on_hopper(
    monkeypatch: pytest.MonkeyPatch, long: bool, biased: bool, many: bool, gathered: GemmTile | None
) -> None:
    """Which kernels it calls, with what: others of the same meaning stand in for those that no interpreter runs."""
    called: list[str] = []

    def up(x: Tensor, source: Tensor, weight: Tensor, end: Tensor, cut: Any, group: int, programs: int) -> Any:
        called.append("up")
        return gemms.gather_gemm_swiglu(x, source, weight, end, cut, SMALL, group)

    def gradient_(
        out: Tensor, a: Tensor, b: Tensor, *, programs: int, source: Tensor | None = None, **how: Any
    ) -> None:
        called.append("gradient" if source is None else "gradient that gathers")
        gemms.grouped_weight_gradient_(out, a, b, tile=SMALL, source=source, **how)

    def activation(
        rows: Tensor,
        slot: Tensor,
        weight: Tensor,
        down: Tensor,
        h: Tensor,
        end: Tensor,
        cut: Any,
        group: int,
        programs: int,
    ) -> Any:
        called.append("activation")
        return gemms.swiglu_backward_gemm(rows, slot, weight, down, h, end, cut, SMALL, group, programs)

    monkeypatch.setattr(mixture, "ROWS", SMALL.block_m)
    monkeypatch.setattr(mixture, "LONG", 40 + (0 if long else 1))
    monkeypatch.setattr(mixture.activation, "swiglu_backward_gemm", activation)
    monkeypatch.setattr(mixture.up_projection, "gather_gemm_swiglu", up)
    monkeypatch.setattr(mixture.gradient, "grouped_weight_gradient_", gradient_)
    shape = (40, 40, 24, 4, 2)
    monkeypatch.setattr(mixture, "MANY", 40 * 2 // 4 + (0 if many else 1))
    inputs, pulls = operands(shape), [normal(40, 40, seed=4)]
    if biased:
        inputs.append(normal(4, 2, 24, seed=5))

    def run(tiles: Tiles) -> list[Tensor]:
        expert = chosen("random", *shape[:1], *shape[3:])
        return graded(
            lambda x, weight, *rest: moe_experts(x, Routing(expert, weight), *rest, tiles=tiles)[0], inputs, pulls
        )

    wanted = run(attrs.evolve(TILES, gathered=gathered))
    assert called == []
    found = run(attrs.evolve(TILES, gathered=gathered, hopper=True))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    expected = [] if biased else ["up", *(["activation"] if long else [])]
    expected += [] if many else ["gradient"]
    assert called == [*expected, *(["gradient that gathers"] if gathered is None or not many else [])]
