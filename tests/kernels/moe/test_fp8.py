"""fp8 kernels of the experts in the interpreter: codes bit for bit those of the pure form, products close to fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.moe import dispatch as places
from nmoe.effects.kernels.moe import experts as gemms
from nmoe.effects.kernels.moe import fp8, moe_fp8
from nmoe.effects.kernels.moe import moe as mixture
from nmoe.effects.kernels.moe.moe import Tiles
from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.core.key import Key
from nmoe.pure.formats import e4m3
from nmoe.pure.model.experts import mlp, moe_experts, swiglu
from nmoe.pure.model.low_precision import RECIPES, experts_low, shared_low
from nmoe.pure.model.route import Routing
from tests.pure.formats.vectors import inputs, uniform

N, D, F, E, K = 40, 256, 128, 5, 2
TILE = fp8.Tile(block_m=16, num_warps=4, num_stages=2)
LARGE = GemmTile(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2)
TILES = Tiles(
    up=LARGE, down=LARGE, activation=LARGE, down_gradient=LARGE, input=LARGE, up_gradient=LARGE, group=3, programs=5
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routed() -> tuple[places.Places, places.RowTiles]:
    """The last expert has no row, and one has more than a tile."""
    expert = torch.rand(N, E - 1, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :K]
    at = places.dispatch(expert, E)
    return at, places.tiles(at.count, N * K, TILE.block_m)


def row_experts(at: places.Places) -> Tensor:
    return torch.arange(E).repeat_interleave(at.count)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def same_codes(got: Tensor, wanted: Tensor) -> bool:
    """Equal bits, but for which NaN."""
    nan = wanted.float().isnan()
    return torch.equal(got.float().isnan(), nan) and torch.equal(
        got.view(torch.uint8)[~nan], wanted.view(torch.uint8)[~nan]
    )


@pytest.mark.parametrize("name", [*inputs(), "not finite"])
def test_codes_and_scales_of_rows_are_those_of_the_pure_form(name: str) -> None:
    x = inputs()["plain"][:5].clone() if name == "not finite" else inputs()[name][:33]
    if name == "not finite":
        x[0, 3], x[1, 200], x[2, 7] = torch.inf, -torch.inf, torch.nan
    codes, scale = fp8.quantise_rows(x)
    wanted, wanted_scale = e4m3.quantise(x)
    assert same_codes(codes, wanted)
    assert torch.equal(scale.nan_to_num(7), wanted_scale.nan_to_num(7))


def test_every_code_is_its_own_and_every_tie_goes_to_even() -> None:
    """With 448 in each block the factor is 1: codes are those of torch's own conversion."""
    code = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for value in (code, -code, (code[1:] + code[:-1]) / 2, (code[1:] + code[:-1]) / 2 * (1 + 2.0**-22)):
        x = torch.full((1, 128), 448.0)
        x[0, : len(value)] = value
        assert torch.equal(fp8.quantise_rows(x)[0].view(torch.uint8), x.type(torch.float8_e4m3fn).view(torch.uint8))


def test_a_weight_has_the_codes_of_the_pure_form_in_both_directions() -> None:
    w = torch.stack((uniform(256, 128), uniform(256, 128) ** 5 * 1e-3))
    codes, scale = fp8.quantise_weight(w, across=False)
    across, other = fp8.quantise_weight(w, across=True)
    wanted, wanted_scale = e4m3.quantise(w, rows=128)
    assert same_codes(codes, wanted) and same_codes(across, wanted.mT.contiguous())
    assert torch.equal(scale, wanted_scale) and torch.equal(other, wanted_scale)


@pytest.mark.parametrize("across", [False, True])
def test_grouped_products_are_those_of_the_codes(across: bool) -> None:
    at, tiles = routed()
    weight = draw(E, D, 2 * F)  # [in, out] where the copy goes across, [out, in] where not
    codes, scale = fp8.quantise_weight(weight, across=False)
    values = e4m3.dequantise(codes, scale, rows=128).double()
    inner = D if across else 2 * F
    x, x_scale = fp8.quantise_rows(draw(N * K, inner, seed=2))
    got = fp8.grouped_gemm(
        x,
        x_scale,
        fp8.quantise_weight(weight, across=across)[0],
        scale,
        at.end,
        tiles,
        TILE,
        2,
        torch.float32,
        across=across,
    )
    rows = e4m3.dequantise(x, x_scale).double()
    each = values if across else values.mT
    wanted = torch.einsum("pi,pio->po", rows, each[row_experts(at)])
    assert error(got, wanted) < 1e-6


def test_the_first_product_gathers_and_quantises_its_activation() -> None:
    at, tiles = routed()
    up = draw(E, D, 2, F) * D**-0.5
    x, x_scale = fp8.quantise_rows(draw(N, D, seed=2))
    codes, scale = fp8.quantise_weight(up.flatten(2), across=False)
    across, _ = fp8.quantise_weight(up.flatten(2), across=True)
    h, a, a_scale = fp8.gather_gemm_swiglu(x, x_scale, at.source, across, scale, at.end, tiles, TILE, 2, torch.float32)
    rows = e4m3.dequantise(x, x_scale).double()[at.source.long()]
    values = e4m3.dequantise(codes, scale, rows=128).double()
    wanted = torch.einsum("pi,pio->po", rows, values[row_experts(at)]).unflatten(-1, (2, F))
    assert error(h, wanted) < 1e-6
    gate, value = h.unbind(-2)
    pure, pure_scale = e4m3.quantise(gate * torch.sigmoid(gate) * value)
    # sigmoid may differ in its last bit: so may a code beside a tie, and a scale
    torch.testing.assert_close(a_scale, pure_scale, rtol=3e-7, atol=0)
    assert (a.view(torch.uint8) != pure.view(torch.uint8)).float().mean() < 1e-3


def test_the_gradient_goes_through_swiglu_and_is_quantised() -> None:
    at, tiles = routed()
    down, h = draw(E, F, D) * F**-0.5, draw(N * K, 2, F, seed=3)
    weight = torch.rand(N, K, generator=torch.Generator().manual_seed(4))
    dy, dy_scale = fp8.quantise_rows(draw(N, D, seed=2))
    codes, scale = fp8.quantise_weight(down, across=False)
    a = fp8.grouped_gemm(
        *fp8.gather_rows(dy, dy_scale, at.source, at.end),
        codes,
        scale,
        at.end,
        tiles,
        TILE,
        2,
        torch.float32,
        across=False,
    )
    dh, dh_codes, dh_scale, part = fp8.swiglu_backward_(a, h, weight, at.slot, at.end)
    rows = e4m3.dequantise(dy, dy_scale).double()[at.source.long()]
    values = e4m3.dequantise(codes, scale, rows=128).double()
    share = weight.flatten()[at.slot.long()].double()
    da = torch.einsum("pd,pfd->pf", rows, values[row_experts(at)])
    leaf = h.double().requires_grad_()
    gate, value = leaf.unbind(-2)
    activation = torch.nn.functional.silu(gate) * value
    (wanted,) = torch.autograd.grad(activation, leaf, da * share[:, None])
    assert error(dh, wanted) < 1e-6 and error(a, activation.detach() * share[:, None]) < 1e-6
    assert error(part.sum(-1), (activation.detach() * da).sum(-1)) < 1e-5
    pure, pure_scale = e4m3.quantise(dh.flatten(1))
    assert same_codes(dh_codes, pure) and torch.equal(dh_scale, pure_scale)


def whole(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of small integers beside one 448 a block: codes that are their values, with scales of 1."""
    x = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., ::128] = 448
    codes, scale = fp8.quantise_rows(x.flatten(0, -2))
    assert torch.equal(scale, torch.ones_like(scale)) and torch.equal(codes.float(), x.flatten(0, -2))
    return codes.view(shape), scale


@pytest.mark.parametrize("gate", [-87.5, -87.2], ids=str)
def test_a_sigmoid_that_would_be_denormal_is_zero(gate: float) -> None:
    """1.0e-38 is less than the smallest normal number, 1.4e-38 is not."""
    at, tiles = routed()
    x, x_scale = whole(N, 128, seed=2)
    up = torch.zeros(E, 2, F, 128)
    # a token's first number is 448, and a weight's others are zeros: values are 1e30
    up[:, :, :, 0] = 1
    share = (torch.tensor([gate, 1e30]) / 448).view(1, 1, 2).repeat(E, 1, 1)
    codes = up.flatten(1, 2).to(torch.float8_e4m3fn)
    _, a, _ = fp8.gather_gemm_swiglu(x, x_scale, at.source, codes, share, at.end, tiles, TILE, 2, torch.float32)
    assert ((a.float() == 0) == (gate < -87.3)).all()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels of the same meaning in the place of Hopper's, with tiles of 16 rows; returns which are called."""
    called: list[str] = []
    elsewhere: Any = fp8  # arguments are handed on

    def tile(source: Tensor, end: Tensor, cut: places.RowTiles) -> fp8.Tile:
        assert len(cut.expert) == -(-len(source) // 16) + len(end)
        return fp8.Tile(block_m=16, num_warps=4, num_stages=2)

    def up(*given: Any) -> Any:
        called.append("up")
        *operands, group, programs = given
        assert programs == TILES.programs
        _, _, source, _, _, end, cut = operands
        return elsewhere.gather_gemm_swiglu(*operands, tile(source, end, cut), group, torch.float32)

    def gemm(*given: Any, across: bool) -> Tensor:
        called.append("down" if across else "backward")
        *operands, group, programs, dtype = given
        assert programs == TILES.programs
        rows, _, _, _, end, cut = operands
        return elsewhere.grouped_gemm(*operands, tile(rows, end, cut), group, dtype, across=across)

    monkeypatch.setattr(moe_fp8.fp8_ring, "ROWS", 16)
    monkeypatch.setattr(moe_fp8.fp8_up, "gather_gemm_swiglu", up)
    monkeypatch.setattr(moe_fp8.fp8_gemm, "grouped_gemm", gemm)
    return called


@pytest.mark.parametrize("many", [True, False], ids=["many rows", "few rows"])
def test_a_layer_on_hopper(monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    """Which kernels it calls, with tiles of how many rows: others of the same meaning stand in for them."""
    called = stand_in(monkeypatch)

    def gradient_(
        out: Tensor, a: Tensor, b: Tensor, *, programs: int, source: Tensor | None = None, **how: Any
    ) -> None:
        called.append("gradient" if source is None else "gradient that gathers")
        gemms.grouped_weight_gradient_(out, a, b, tile=LARGE, source=source, **how)

    monkeypatch.setattr(mixture.gradient, "grouped_weight_gradient_", gradient_)
    monkeypatch.setattr(mixture, "MANY", N * K // E + (0 if many else 1))
    leaves = (draw(N, D), draw(E, D, 2, F, seed=5) * D**-0.5, draw(E, F, D, seed=6) * F**-0.5)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    weight = torch.rand(N, K, generator=torch.Generator().manual_seed(7)).requires_grad_()
    # more rows than a tile has, and experts without any
    expert = torch.tensor([[3, 1]]).repeat(N, 1)

    def run(tiles: Tiles) -> list[Tensor]:
        y, _ = moe_fp8.moe_experts_fp8(leaves[0], Routing(expert, weight), *leaves[1:], tiles=tiles)
        return [y.detach(), *torch.autograd.grad(y, (*leaves, weight), draw(N, D, seed=8))]

    wanted = run(TILES)
    assert called == []
    found = run(attrs.evolve(TILES, hopper=True))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    gradients = [*([] if many else ["gradient"]), "gradient that gathers"]
    assert called == ["up", "down", "backward", *gradients, "backward"]


def test_the_mixture_is_that_of_the_recipe_with_its_gradients() -> None:
    """Output, and gradients of tokens, gates and weights."""
    x = draw(N, D).requires_grad_()
    up, down = (draw(E, D, 2, F, seed=5) * D**-0.5).requires_grad_(), (draw(E, F, D, seed=6) * F**-0.5).requires_grad_()
    expert = torch.rand(N, E - 1, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :K]
    weight = torch.rand(N, K, generator=torch.Generator().manual_seed(7)).requires_grad_()
    dy = draw(N, D, seed=8)
    leaves = (x, weight, up, down)

    def run(which: Any) -> tuple[Tensor, ...]:
        y, count = which(x, Routing(expert, weight), up, down)
        assert count.tolist() == expert.flatten().bincount(minlength=E).tolist()
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    recipe = partial(experts_low, recipe=RECIPES["fp8"], key=Key(0))
    mine = run(partial(moe_fp8.moe_experts_fp8, tiles=TILES))
    pure = run(partial(moe_experts, experts=recipe))
    other = draw(N, D, seed=9).requires_grad_()
    y, _ = moe_fp8.moe_experts_fp8(x, Routing(expert, weight), up, down, tiles=TILES, added=(other,))
    assert error(y - other, mine[0]) < 1e-6 and torch.equal(torch.autograd.grad(y, other, dy)[0], dy)
    exact = run(moe_experts)
    for name, got, wanted, truth in zip(("y", "x", "weight", "up", "down"), mine, pure, exact, strict=True):
        # the gradient is quantised before its gate is applied, in the pure form after: codes beside a tie differ
        # a gate's gradient is <activation, its gradient> here, <row, its gradient> there: both are rounded once
        assert error(got, wanted) < (0.05 if name == "weight" else 1e-5), name
        assert error(got, truth) < 1.1 * error(wanted, truth), name


def shared(which: Any) -> tuple[Tensor, ...]:
    """Output of the shared experts, more rows than a tile has, and gradients of tokens and weights."""
    leaves = draw(N, D), draw(D, 2, 2 * F, seed=5) * D**-0.5, draw(2 * F, D, seed=6) * F**-0.5
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    y = which(*leaves, swiglu)
    return y.detach(), *torch.autograd.grad(y, leaves, draw(N, D, seed=8))


def test_shared_experts_are_those_of_the_recipe_with_their_gradients() -> None:
    mine = shared(partial(moe_fp8.shared_experts_fp8, tiles=TILES))
    pure = shared(partial(shared_low, recipe=RECIPES["fp8"], key=Key(0)))
    for name, got, wanted, truth in zip(("y", "x", "up", "down"), mine, pure, shared(mlp), strict=True):
        assert error(got, wanted) < 1e-5, name
        assert 0.01 < error(got, truth) < 1.1 * error(wanted, truth), name


def test_shared_experts_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    called = stand_in(monkeypatch)
    wanted = shared(partial(moe_fp8.shared_experts_fp8, tiles=TILES))
    assert called == []
    found = shared(partial(moe_fp8.shared_experts_fp8, tiles=attrs.evolve(TILES, hopper=True)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert called == ["up", "down", "backward", "backward"]
