"""`nmoe bench kernels` in the interpreter: its errors are of the kernels, and its table says what was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.bench import kernels as kernel_bench
from nmoe.bench.kernels import attention, dsa, gqa, kda, loss, meter, moe, nsa
from nmoe.bench.kernels.meter import Meter, Taken, Variant
from nmoe.effects.kernels.attention import mla
from nmoe.effects.kernels.attention.dsa import Tiles as SparseTiles
from nmoe.effects.kernels.attention.dsa_dense import Tiles as DenseTiles
from nmoe.effects.kernels.attention.gqa import Tiles as GroupedTiles
from nmoe.effects.kernels.attention.kda import Tiles as DeltaTiles
from nmoe.effects.kernels.attention.mla import Tiles as AttentionTiles
from nmoe.effects.kernels.attention.nsa import Tiles as NativeTiles
from nmoe.effects.kernels.tables import AttentionTile, DeltaTile, SparseTile
from nmoe.effects.terminal import table
from tests.kernels.moe.test_moe import TILES

CPU = torch.device("cpu")
SMALL = moe.Case(tokens=96, hidden=32, width=16, experts=8, top_k=2, routing="natural")
SPARSE = SparseTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
BLOCK = AttentionTile(block_m=16, block_n=16, heads=2, num_warps=4, num_stages=2)


def ours(case: moe.Case) -> Variant:
    return next(moe.variants(case, moe.Operands.of(case, CPU), TILES))


def attend() -> Variant:
    case = attention.Case(batch=1, length=40, heads=2, nope=16, rope=8, value=16)
    variants = attention.variants(case, CPU, AttentionTiles(forward=BLOCK, dq=BLOCK, dkv=BLOCK))
    return next(variant for variant in variants if variant.name == "deterministic, own forward")


def grouped(window: int) -> Variant:
    case = gqa.Case(batch=1, length=40, heads=4, kv_heads=2, head_dim=64, window=window)
    return next(gqa.variants(case, CPU, GroupedTiles(forward=BLOCK, dq=BLOCK, dkv=BLOCK)))


def delta() -> Variant:
    case = kda.Case(batch=1, length=65, heads=1, head_dim=64)
    tile = DeltaTile(values=64, num_warps=4, num_stages=1)
    return next(kda.variants(case, CPU, DeltaTiles(**dict.fromkeys(attrs.fields_dict(DeltaTiles), tile))))


def sparse(name: str) -> Variant:
    sizes = {"heads": 2, "rank": 16, "rope": 8, "index_heads": 2, "index_channels": 16}
    case = dsa.Case(batch=1, length=12, top_k=5, **sizes)
    own = SparseTiles(**dict.fromkeys((field.name for field in attrs.fields(SparseTiles)), SPARSE))
    stage = DenseTiles(**dict.fromkeys((field.name for field in attrs.fields(DenseTiles)), SPARSE))
    variants = dsa.variants(case, CPU, own, stage, AttentionTiles(forward=BLOCK, dq=BLOCK, dkv=BLOCK))
    return next(variant for variant in variants if variant.name == name)


def native() -> Variant:
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 16, "value": 16}
    blocks = {"block": 4, "stride": 2, "selected_block": 4, "selected": 3, "window": 5}
    case = nsa.Case(batch=1, length=13, **sizes, **blocks)
    own = NativeTiles(**dict.fromkeys((field.name for field in attrs.fields(NativeTiles)), SPARSE))
    variants = nsa.variants(case, CPU, own, AttentionTiles(forward=BLOCK, dq=BLOCK, dkv=BLOCK))
    return next(variant for variant in variants if variant.name == "selected")


def cross_entropy() -> Variant:
    return next(loss.variants(loss.Case(tokens=70, hidden=16, vocabulary=50, chunk=32), CPU))


@pytest.fixture
def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our forward pass of latent attention in the place of cuDNN's, which needs a GPU."""

    def own(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return mla.triton_forward(q, kv, k_rope, (), scale, BLOCK)

    monkeypatch.setattr(mla, "cudnn_forward", own)


@pytest.mark.usefixtures("own_forward")
@pytest.mark.parametrize(
    "variant",
    [
        *(lambda: ours(SMALL), attend, lambda: grouped(9), lambda: grouped(0), delta),
        *(lambda: sparse("ours"), lambda: sparse("dense stage"), native, cross_entropy),
    ],
    ids=["moe", "mla", "gqa in a window", "gqa", "kda", "dsa", "dsa's dense stage", "nsa", "loss"],
)
def test_a_right_kernel_has_a_small_error(variant: Callable[[], Variant]) -> None:
    error = variant().error
    assert error is not None and 0 < error() < 1e-5


def test_a_wrong_kernel_has_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.moe_experts
    monkeypatch.setattr(moe, "moe_experts", lambda *given, **told: tuple(each * 1.01 for each in right(*given, **told)))
    error = ours(SMALL).error
    assert error is not None and error() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(("routing", "low", "high"), [("balanced", 1, 1), ("natural", 1.2, 4), ("skewed", 1.9, 2.1)])
def test_loads_are_as_they_are_called(routing: str, low: float, high: float) -> None:
    case = moe.Case(tokens=4096, hidden=8, width=8, experts=8, top_k=2, routing=routing)
    chosen = moe.route(case, CPU)
    assert low <= moe.busiest(case, chosen.expert) <= high
    assert not chosen.expert.is_contiguous(), "the router leaves slices of wider rows"
    assert all(len(set(row)) == 2 for row in chosen.expert.tolist())
    torch.testing.assert_close(chosen.weight.sum(-1), torch.ones(4096))


def test_the_crossover_is_measured_at_the_sizes_of_its_table() -> None:
    """docs/precision.md has a line for hidden, expert, E and K, and a column for each number of tokens."""
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    found = re.search(r"^\| hidden, expert, E, K.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    head, *lines = found[0].splitlines()
    tokens = [int(each.replace(",", "")) for each in re.findall(r"\d+,\d{3}", head)]
    sizes = [tuple(int(each) for each in line.split("|")[1].split(",")) for line in lines[1:]]
    measured = [(case.hidden, case.width, case.experts, case.top_k, case.tokens) for case in moe.CROSSOVER]
    assert len(tokens) == 4 and measured == [(*size, n) for size in sizes for n in tokens]


def test_fp8_is_measured_beside_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    case = moe.Case(tokens=4, hidden=128, width=128, experts=2, top_k=1, routing="natural")
    monkeypatch.setattr(moe, "CROSSOVER", (case,))
    monkeypatch.setattr(kernel_bench.ops, "mixture_tiles", lambda device, hidden, width: TILES)

    taken = {"ours": 0.002, "ours, fp8": 0.004}

    def measure(variant: Variant, meter: Meter) -> Taken:
        return Taken(forward_s=None, both_s=taken[variant.name], extra_bytes=0, error=None, repeats=None)

    monkeypatch.setattr(kernel_bench, "measure", measure)
    fake = Meter(device=CPU, seconds=lambda call, replayed: 0, extra_bytes=lambda call: 0, flops=1e15, bandwidth=1e12)
    ((title, rows),) = kernel_bench.cases("precision", fake)
    assert title.startswith("precision  tokens 4  hidden 128")
    assert [(row.variant, row.ratio, row.beside) for row in rows] == [
        ("ours", None, None),
        ("ours, fp8", 0.5, "ours"),
    ]


def test_a_table_has_rates_shares_and_ratios() -> None:
    times = {"a": 0.002, "b": 0.004}
    named: dict[Any, float] = {}

    def variant(name: str, forward: bool, error: float | None) -> Variant:
        def both() -> str:
            return name

        named[both] = times[name]
        given = None if error is None else (lambda: error)
        return Variant(name=name, forward=both if forward else None, both=both, error=given)

    fake = Meter(
        device=CPU,
        seconds=lambda call, replayed: named[call],
        extra_bytes=lambda call: 5 * 10**8,
        flops=1e15,
        bandwidth=1e12,
    )
    rows = kernel_bench.rows("moe", SMALL, iter([variant("a", True, 3e-3), variant("b", False, None)]), "b", fake)
    first, second = rows
    assert first.ratio == 2.0 and first.beside == "b" and second.ratio is None and second.beside is None
    assert first.share == SMALL.flop() / 1e15 / 0.002
    assert SMALL.flop() == 3 * 2 * 96 * 2 * (32 * 2 * 16 + 16 * 32), "two products forward, twice as much backward"
    told = table(kernel_bench.HEAD, [kernel_bench.cells(row) for row in rows], left=1)
    assert "2.000 ms" in told and "3.0e-03" in told and "2.00 x" in told and " 0.50 GB" in told
    assert all(len(line) <= 120 for line in told.splitlines())
    assert math.isclose(
        meter.relative_error([torch.tensor([1.0, 2.2])], [torch.tensor([1.0, 2.0]).double()]),
        0.2 / 5**0.5,
        rel_tol=1e-6,
    )


def test_a_call_that_differs_from_the_last_is_seen() -> None:
    calls = iter(range(3))
    assert meter.repeats(lambda: (torch.ones(3), "text"))
    assert not meter.repeats(lambda: (torch.ones(3), torch.tensor(next(calls))))


def test_what_the_loss_must_multiply_is_measured_too() -> None:
    variants = loss.variants(loss.Case(tokens=70, hidden=16, vocabulary=50, chunk=32), CPU)
    assert [variant.both() for variant in variants if variant.name == loss.PEER] == [None]
