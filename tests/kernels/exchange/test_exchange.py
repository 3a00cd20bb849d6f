"""The exchange among virtual ranks, its kernels interpreted: the same bits as one rank, whatever the router chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmoe.bench import exchange as bench_exchange
from nmoe.effects.kernels.exchange import plan as plans
from nmoe.effects.kernels.moe import dispatch as sorting
from nmoe.effects.kernels.moe import experts as gemms
from nmoe.effects.kernels.moe.moe import Tiles
from nmoe.effects.kernels.tables import GemmTile
from nmoe.effects.parallel import exchange
from nmoe.effects.parallel.exchange import arena, device
from nmoe.effects.parallel.exchange.opening import virtual
from nmoe.errors import InputError
from nmoe.pure.model.route import Routing
from nmoe.pure.parallel import exchange_plan as reference
from tests.kernels.exchange.ranks import Case, case, open_ranks, shared, single_rank

SMALL = GemmTile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
TILES = Tiles(
    up=SMALL, down=SMALL, activation=SMALL, down_gradient=SMALL, input=SMALL, up_gradient=SMALL, group=3, programs=5
)
LARGE = GemmTile(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2)
WIDE = Tiles(
    up=LARGE, down=LARGE, activation=LARGE, down_gradient=LARGE, input=LARGE, up_gradient=LARGE, group=3, programs=5
)
NAMES = ("y", "dx", "d_weight", "d_up", "d_down", "d_bias")


def differing(found: list[Tensor], wanted: list[Tensor]) -> list[str]:
    """Names of what is not bitwise the same."""
    names = NAMES[: len(wanted)]  # in fp8 there is no bias
    return [name for name, a, b in zip(names, found, wanted, strict=True) if not torch.equal(a, b)]


@pytest.fixture(scope="module")
def plain() -> tuple[Case, list[Tensor]]:
    """A case of 24 tokens, and what one rank makes of it."""
    c = case("random", 24, 16, 16, 8, 3)
    return c, single_rank(c, TILES)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("ranks", "dedup"),
    [
        *((2, True), (8, False)),
        *(pytest.param(*each, marks=LONG) for each in ((1, True), (4, True), (8, True), (1, False), (2, False))),
    ],
)
def test_the_same_bits_on_any_number_of_ranks(plain: tuple[Case, list[Tensor]], ranks: int, dedup: bool) -> None:
    """Twice over the same arenas: what an exchange leaves behind changes nothing."""
    c, wanted = plain
    parts = [24 // ranks] * ranks
    exchanges = open_ranks(c, parts, dedup=dedup)
    for _ in range(2 if ranks == 2 else 1):
        assert differing(shared(c, exchanges, parts, TILES), wanted) == []
    assert [int(e.needed) for e in exchanges] == [0] * ranks


@pytest.mark.parametrize(
    ("kind", "parts", "dedup"),
    [
        ("all to one", (6, 6), True),
        ("none to the first half", (6, 6), False),
        ("ties", (9, 0, 2, 1), True),
        pytest.param("none to the first half", (6, 6), True, marks=LONG),
        pytest.param("all to one", (0, 12), False, marks=LONG),
    ],
)
def test_at_the_worst(kind: str, parts: tuple[int, ...], dedup: bool) -> None:
    """Ranks without tokens, ranks without rows, and all rows at one."""
    c = case(kind, sum(parts), 16, 16, 4, 2)
    assert differing(shared(c, open_ranks(c, parts, dedup=dedup), parts, TILES), single_rank(c, TILES)) == []


def test_what_lies_beyond_the_last_row_changes_nothing(plain: tuple[Case, list[Tensor]]) -> None:
    """More capacity than rows: arenas and fresh memory are poisoned, as everywhere here."""
    c, wanted = plain
    for dedup in (False, True):
        exchanges = open_ranks(c, [12, 12], dedup=dedup, capacity=70)
        assert differing(shared(c, exchanges, [12, 12], TILES), wanted) == []


@pytest.mark.parametrize("dedup", [False, pytest.param(True, marks=LONG)])
def test_too_many_rows(plain: tuple[Case, list[Tensor]], dedup: bool) -> None:
    """Every rank knows, and how many it takes; no rank's rows are written, within bounds or beyond."""
    c, _ = plain
    parts = [12, 12]
    enough = open_ranks(c, parts, dedup=dedup)[0].sizes.capacity
    exchanges = open_ranks(c, parts, dedup=dedup, capacity=enough - 1)
    kept = ("land", "land_gradient", "back", "source", "gate", "gate_gradient")
    for e in exchanges:
        for name in kept:
            arena.view(e.raw, getattr(e.fields, name)).fill_(7)
    shared(c, exchanges, parts, TILES)
    assert [int(e.needed) for e in exchanges] == [enough] * 2
    for e in exchanges:
        for name in kept:
            if name != "land" or dedup:  # without dedup the tail of the landing buffer is this rank's to clear
                assert (arena.view(e.raw, getattr(e.fields, name)) == 7).all(), name
        with pytest.raises(InputError, match=rf"capacity: expected at most {enough - 1} rows .* got {enough} on"):
            exchange.check(e)


@settings(max_examples=25)
@given(data=st.data())
def test_the_plan_is_the_reference(data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 3, 8]))
    local = data.draw(st.integers(1, 5))
    width = ranks * local + ranks
    entries = st.lists(st.integers(0, 9), min_size=ranks * width, max_size=ranks * width)
    counts = torch.tensor(data.draw(entries), dtype=torch.int32).view(ranks, width)
    most = int(counts[:, :-ranks].sum(0).unflatten(0, (ranks, local)).sum(1).max())
    capacity = most - data.draw(st.integers(0, 1))
    rank = data.draw(st.integers(0, ranks - 1))
    needed = torch.zeros(1, dtype=torch.int32)
    found = plans.plan_(counts, needed, rank, capacity)
    wanted = reference.plan(counts, rank=rank, capacity=capacity)
    for field in attrs.fields(plans.Plan):
        assert torch.equal(getattr(found, field.name).long(), getattr(wanted, field.name)), field.name
    assert int(needed) == int(wanted.needed) == (most if most > capacity else 0)
    plans.plan_(torch.zeros_like(counts), needed, rank, capacity)
    assert int(needed) == int(wanted.needed), "what was once too much is forgotten"
    origin, rows = plans.origins(found, max(most, 1)), int(found.valid[2])
    to, at = reference.origins(wanted, rows)
    assert torch.equal(origin.to[:rows].long(), to) and torch.equal(origin.at[:rows].long(), at)


@given(tokens=st.integers(0, 40), top_k=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_a_token_goes_once_to_each_rank_that_needs_it(tokens: int, top_k: int, seed: int) -> None:
    score = torch.rand(tokens, 12, generator=torch.Generator().manual_seed(seed))
    expert = score.argsort(-1)[:, :top_k].contiguous()
    found = plans.owners(expert, 4, 12)
    assert torch.equal(found.long(), reference.owners(expert, ranks=4, experts=12))
    for owners, experts in zip(found.tolist(), expert.tolist(), strict=True):
        assert sorted(each for each in owners if each < 4) == sorted({each // 3 for each in experts})


def test_bytes_on_the_wire_are_counted_and_rows_lie_as_in_the_whole_batch() -> None:
    """Bytes against rows counted by hand: to other ranks only, and with dedup once."""
    c = case("random", 24, 16, 16, 8, 3)
    whole = sorting.dispatch(c.expert, 8)
    owner = c.expert // 4
    source = torch.arange(24)[:, None].expand(-1, 3) // 12
    for dedup in (False, True):
        exchanges = open_ranks(c, [12, 12], dedup=dedup)
        shared(c, exchanges, [12, 12], TILES)
        for rank, e in enumerate(exchanges):
            away = (owner != rank) & (source == rank)
            came = (owner == rank) & (source != rank)
            pairs, tokens, back = int(away.sum()), int(away.any(1).sum()), int(came.sum())
            rows = 3 * (tokens if dedup else pairs) + 2 * back
            words = pairs * (2 if dedup else 1) + back
            counts = 10  # entries of a row of the matrix
            assert int(e.sent) == rows * 16 * 4 + words * 4 + counts * 4, (rank, dedup)
            first, held = (int(part.sum()) for part in (whole.count[: 4 * rank], whole.count[4 * rank :][:4]))
            here = c.x[whole.source[first : first + held].long()]
            assert dedup or torch.equal(arena.view(e.raw, e.fields.land)[:held], here)


def test_the_part_of_the_exchange_has_every_barrier_and_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in a pass: rows out, rows back."""
    c = case("random", 8, 16, 16, 4, 2)
    seen: list[str] = []

    @contextmanager
    def within(name: str) -> Iterator[None]:
        seen.append(f"{name} begins")
        yield
        seen.append(f"{name} ends")

    def noting(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        seen.append(name)
        return call(*arguments, **named)

    for name in ("gather_gemm_swiglu", "swiglu_backward_gemm", "grouped_gemm_push_", "weight_gradient"):
        monkeypatch.setattr(gemms, name, partial(noting, "product", getattr(gemms, name)))
    monkeypatch.setattr(device, "barrier_", partial(noting, "barrier", device.barrier_))
    shared(c, [attrs.evolve(e, within=within) for e in open_ranks(c, [8], dedup=True)], [8], TILES)
    once, twice = (
        ["exchange begins", "barrier", "exchange ends"],
        ["exchange begins", *["barrier"] * 2, "exchange ends"],
    )
    forward = [*twice, "product", "product", *once]
    assert seen == [*forward, *once, *["product"] * 3, *once, "product"]


@pytest.fixture(scope="module")
def narrow() -> tuple[Case, list[Tensor]]:
    """A case in fp8, of several blocks a row, and what one rank makes of it."""
    c = case("random", 24, 256, 128, 8, 3)
    return c, single_rank(c, WIDE, fp8=True)


@pytest.mark.parametrize(
    ("ranks", "dedup"), [(2, True), (4, False), *(pytest.param(*each, marks=LONG) for each in ((2, False), (8, True)))]
)
def test_fp8_has_the_bits_of_one_rank(narrow: tuple[Case, list[Tensor]], ranks: int, dedup: bool) -> None:
    """Twice over the same arenas, with more room than rows; the codes are those of fp8 as it is defined."""
    c, wanted = narrow
    parts = [24 // ranks] * ranks
    exchanges = open_ranks(c, parts, dedup=dedup, capacity=72, fp8=True)
    for _ in range(2 if ranks == 2 else 1):
        assert differing(shared(c, exchanges, parts, WIDE), wanted) == []


@pytest.mark.parametrize(
    ("kind", "parts", "dedup"),
    [
        ("all to one", (6, 6), True),
        ("ties", (9, 0, 2, 1), False),
        pytest.param("none to the first half", (6, 6), True, marks=LONG),
        pytest.param("all to one", (0, 12), False, marks=LONG),
    ],
)
def test_fp8_at_the_worst(kind: str, parts: tuple[int, ...], dedup: bool) -> None:
    c = case(kind, sum(parts), 128, 128, 4, 2)
    exchanges = open_ranks(c, parts, dedup=dedup, fp8=True)
    assert differing(shared(c, exchanges, parts, WIDE), single_rank(c, WIDE, fp8=True)) == []


def test_what_has_no_place_in_the_arena_is_refused(plain: tuple[Case, list[Tensor]]) -> None:
    c, _ = plain
    e = open_ranks(c, [12, 12], dedup=True)[0]
    with pytest.raises(ValueError, match="at most 12 tokens, got 24; expected 4 experts on this rank, got 8; open"):
        device.mixture(c.x, Routing(c.expert, c.weight), c.up, c.down, exchange=e, tiles=TILES)


@LONG
def test_the_bench_measures_every_line() -> None:
    """In small, with a clock that calls once."""

    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    shape = bench_exchange.Shape(tokens=4, hidden=16, width=16, experts=4, top_k=2)
    bench = bench_exchange.Bench(
        device=torch.device("cpu"),
        dtype=torch.float32,
        ranks=2,
        here=(0, 1),
        open=lambda sizes: virtual(sizes, torch.device("cpu")),
        seconds=once,
        tiles=TILES,
    )
    cases = bench_exchange.Cases(pushes=((8, 16),), programs=(2,), round_trip=shape, layer=shape)
    told = [row.split("  ")[0] for row in bench_exchange.rows(bench, cases)]
    assert told == [
        *("push 8 rows x 16, 2 programs", "push 8 rows x 16 and barrier", "barrier"),
        *("dispatch and combine 4 x 16, top 2, plain", "dispatch and combine 4 x 16, top 2, dedup"),
        *("mixture of one GPU, 4 x 16, forward and backward", "mixture over 2 ranks, plain"),
        "mixture over 2 ranks, dedup",
    ]
