"""Muon's products with the tiles that ship, compiled ahead of time: tensor cores, no spills, room for two programs."""

from __future__ import annotations

from typing import Any

import pytest

from nmoe.effects.kernels.optim.newton_schulz import PRODUCTS
from nmoe.effects.kernels.tables import GemmTile
from tests.kernels import aot
from tests.kernels.aot import Request
from tests.kernels.shipped import SAME, moved, scale

KERNEL = "nmoe.effects.kernels.optim.newton_schulz"
REGISTERS = 65_536
"""Of a multiprocessor, on both targets."""


def request(name: str, tile: GemmTile, types: dict[str, str], constants: dict[str, Any], sizes: str) -> Request:
    pointers = [key for key, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel=f"{KERNEL}:{name}_kernel",
        signature={**types, **dict.fromkeys(sizes.split(), "i32")},
        constants={"M": tile.block_m, "K": tile.block_k, **constants},
        aligned=[*pointers, *sizes.split()],
        warps=tile.num_warps,
        stages=tile.num_stages,
        same={key: value for key, value in SAME.get(f"optim.newton_schulz:{name}_kernel", {}).items() if key in types},
    )


def block(*sides: int) -> str:
    return f"tensordesc<bf16[1,{sides[0]},{sides[1]}]>"


def symmetric(tile: GemmTile, *, tall: bool = False, scaled: bool = False, added: bool = False) -> Request:
    """A Gram matrix, a product of two, or with `added` the polynomial of one."""
    sides = (tile.block_k, tile.block_m) if tall else (tile.block_m, tile.block_k)
    whole = block(tile.block_m, tile.block_m)
    types = {"left": block(*sides), "right": block(*sides), "out": whole}
    types |= {"scale": "*fp32"} if scaled else {}
    types |= {"added": whole} if added else {}
    absent = {name: None for name in ("scale", "added") if name not in types}
    numbers = (2.0315, -4.775, 3.4445) if added else (1.0, 0.0, 0.0)
    constants = {**dict(zip(("PRODUCT", "ADDED", "DIAGONAL"), numbers, strict=True)), **absent, "TALL": tall}
    return request("symmetric", tile, types, constants, "side inner")


def applied(tall: bool) -> Request:
    tile = PRODUCTS.apply
    m, n = (tile.block_n, tile.block_m) if tall else (tile.block_m, tile.block_n)
    types = {"left": block(m, tile.block_k), "right": block(tile.block_k, n), "out": block(m, n)}
    return request("apply", tile, types, {"M": m, "N": n}, "rows columns inner")


REQUESTS = {
    "gram": symmetric(PRODUCTS.gram),
    "gram, scaled": symmetric(PRODUCTS.gram, scaled=True),
    "gram, tall": symmetric(PRODUCTS.gram, tall=True),
    "gram, tall and scaled": symmetric(PRODUCTS.gram, tall=True, scaled=True),
    "polynomial": symmetric(PRODUCTS.square, added=True),
    "product": symmetric(PRODUCTS.square),
    "product, scaled": symmetric(PRODUCTS.square, scaled=True),
    "applied": applied(False),
    "applied, tall": applied(True),
    "scale": scale(),
    "value in fp32": moved("fp32"),
}


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_products_of_muon(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    found: list[str] = []
    compiled = aot.compile_all([*REQUESTS.values()], tmp_path_factory.mktemp("triton"), targets=[target])
    for (name, wanted), each in zip(REQUESTS.items(), compiled, strict=True):
        product = wanted.kernel.startswith(KERNEL)
        found += [f"{name}: {problem}" for problem in each.problems(tensor_cores=product)]
        if each.mma or each.atomics or each.scratch:
            found.append(f"{name}: {each.mma} old products, {each.atomics} atomics, {each.scratch} bytes of scratch")
        if "symmetric" in wanted.kernel and 2 * each.registers * 32 * wanted.warps > REGISTERS:
            found.append(f"{name}: {each.registers} registers a thread, no room for a second program beside it")
    assert found == []
