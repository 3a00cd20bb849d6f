"""The mixture's fp8 kernels for Hopper on one: the bits of those that run everywhere, twice, never waiting."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import fp8, moe_fp8
from nmoe.effects.kernels.moe.hopper import fp8_gemm, fp8_ring, fp8_up
from tests.gpu import test_hopper
from tests.gpu.test_hopper import chosen, layer, normal, repeated

pytestmark = test_hopper.pytestmark

SHAPES = [
    (1500, 512, 384, 16, 4),
    (700, 256, 640, 7, 2),  # blocks of columns that no tile divides
    (3, 128, 128, 8, 2),  # one step, one block
    (900, 2048, 1408, 8, 2),
]
"""Tokens, hidden size, width, experts, chosen ones."""

GROUP, PROGRAMS = 8, 132


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a GPU of compute capability 9.0 is needed")


@attrs.frozen(kw_only=True)
class Case:
    """Rows of tokens, sorted by expert, and codes of what is multiplied."""

    at: places.Places
    pairs: int
    x: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]  # along D, for the forward pass
    up_back: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]

    def cut(self, m: int) -> places.RowTiles:
        return places.tiles(self.at.count, self.pairs, m)


def case(shape: tuple[int, ...]) -> Case:
    tokens, hidden, width, num_experts, top_k = shape
    x = normal(tokens, hidden)
    x[::7] *= 150  # gates whose sigmoids are denormal numbers, zeros, and ones
    x[1::7] = 0
    up = (normal(num_experts, hidden, 2, width, seed=2) / hidden**0.5).flatten(2)
    down = normal(num_experts, width, hidden, seed=3) / width**0.5
    return Case(
        at=places.dispatch(chosen(tokens, num_experts, top_k), num_experts),
        pairs=tokens * top_k,
        x=fp8.quantise_rows(x),
        up=fp8.quantise_weight(up, across=True),
        up_back=fp8.quantise_weight(up, across=False),
        down=fp8.quantise_weight(down, across=True),
    )


def as_bits(results: Sequence[Tensor]) -> list[Tensor]:
    return [result.view(torch.uint8) for result in results]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], *names: str) -> None:
    for name, a, b in zip(names, as_bits(found), as_bits(wanted), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_up_projection(shape: tuple[int, ...]) -> None:
    c = case(shape)
    given = (*c.x, c.at.source, *c.up, c.at.end)
    found = repeated(lambda: as_bits(fp8_up.gather_gemm_swiglu(*given, c.cut(fp8_ring.ROWS), GROUP, PROGRAMS)))
    wanted = fp8.gather_gemm_swiglu(*given, c.cut(moe_fp8.UP.block_m), moe_fp8.UP, GROUP, torch.bfloat16)
    same(found, wanted, "h", "codes", "scales")
    assert (wanted[0][:, 0] < -90).any() or shape[0] < 100, "gates whose sigmoids are zeros"


@pytest.mark.parametrize("across", [True, False], ids=["down", "input"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_products(shape: tuple[int, ...], across: bool) -> None:
    _, hidden, width, *_ = shape
    c = case(shape)
    rows = fp8.quantise_rows(normal(c.pairs, width if across else 2 * width, seed=4))
    given = (*rows, *(c.down if across else c.up_back), c.at.end)
    (found,) = repeated(
        lambda: [fp8_gemm.grouped_gemm(*given, c.cut(fp8_ring.ROWS), GROUP, PROGRAMS, torch.bfloat16, across=across)]
    )
    tile = moe_fp8.DOWN if across else moe_fp8.BACKWARD
    wanted = fp8.grouped_gemm(*given, c.cut(tile.block_m), tile, GROUP, torch.bfloat16, across=across)
    assert found.shape == (c.pairs, hidden)
    same([found], [wanted], "out")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer(shape: tuple[int, ...]) -> None:
    run = layer(shape, moe_fp8.moe_experts_fp8)
    same(repeated(lambda: run(True)), run(False), "y", "dx", "dweight", "dup", "ddown")
