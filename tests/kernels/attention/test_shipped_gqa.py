"""The kernels of grouped-query attention as they ship, compiled ahead of time: tensor cores, bulk reads, no spills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import gqa
from nmoe.effects.kernels.tables import AttentionTile
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request

CAPABILITIES = {90: (9, 0), 100: (10, 0)}

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
"""Products of two blocks in a step of each kernel."""

NARROW = 18
"""Accesses below 16 bytes: numbers of a row and of its sink, outside of the loops."""


@attrs.frozen(kw_only=True)
class Layer:
    """What a layer's kernels are compiled for."""

    channels: int = 64
    group: int = 8
    window: int | None = None
    documents: bool = False
    sinks: bool = True


GPT_OSS = (Layer(window=128), Layer())
"""The two kinds of layer of gpt-oss."""

OTHERS = (
    Layer(window=1024),
    Layer(window=128, documents=True),
    Layer(documents=True),
    Layer(channels=128, group=4, sinks=False),
    Layer(channels=128, group=1, window=1024, documents=True),
)
"""Longer windows, documents, and wider heads."""


def tiles(layer: Layer, target: int) -> gqa.Tiles:
    window = () if layer.window is None else (layer.window,)
    return gqa.Tiles(**tuning.find(tuning.load(CAPABILITIES[target]), "gqa", layer.channels, *window).tiles)


def request(name: str, layer: Layer, tile: AttentionTile) -> Request:
    """One of the three kernels, in bf16."""
    m, n, c = tile.block_m, tile.block_n, layer.channels
    pack = min(layer.group & -layer.group, m)
    rows, keys = f"tensordesc<bf16[1,{m // pack},{pack},{c}]>", f"tensordesc<bf16[1,1,{n},{c}]>"
    masks = "end" if name == "dkv" else "start"
    constants: dict[str, Any] = {
        "block_m": m,
        "block_n": n,
        "side_by_side": tile.heads,
        "channels": c,
        "documents": layer.documents,
        "windowed": layer.window is not None,
        "split": layer.window is None or layer.window > gqa.SHORT * (m if name == "dkv" else n),
    }
    types = {"k": keys, "v": keys}
    if name == "dkv":
        one = f"tensordesc<bf16[1,1,{m},{c}]>"
        row = f"tensordesc<fp32[1,{m}]>"
        types |= {"q": one, "do": one, "dk": keys, "dv": keys, "lse": row, "delta": row}
        constants["group"] = layer.group
    else:
        types |= {"q": rows, "o": rows, "lse": "*fp32", "padded": "i32"}
        constants |= {"pack": pack, "sunk": layer.sinks}
        numbers = ["sinks", "dsinks"] if name == "dq" else ["sinks"]
        if layer.sinks:
            types |= dict.fromkeys(numbers, "*fp32")
        else:
            constants |= dict.fromkeys(numbers)
    if name == "dq":
        types |= {"do": rows, "dq": rows, "delta": "*fp32"}
    if layer.documents:
        types[masks] = "*i32"
    else:
        constants[masks] = None
    types |= dict.fromkeys(("positions", "heads", "kv_heads", "rows", "window"), "i32") | {"scale": "fp32"}
    return Request(
        kernel=f"nmoe.effects.kernels.attention.gqa_kernels:{name}_kernel",
        signature=types,
        constants=constants,
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def requests(layers: Sequence[Layer], target: int) -> list[Request]:
    """The three kernels of each layer."""
    return [request(name, layer, getattr(tiles(layer, target), name)) for layer in layers for name in PRODUCTS]


def problems(found: Sequence[Compiled]) -> list[str]:
    """What would make a kernel slow or its sums depend on chance."""
    said = [problem for each in found for problem in each.problems(tensor_cores=True)]
    for each in found:
        at = f"{each.kernel} on sm_{each.target}"
        products = PRODUCTS[each.kernel.split(":")[1].removesuffix("_kernel")]
        used = each.wgmma if each.target < 100 else each.tcgen05
        if used < products:
            said.append(f"{at}: {used} tensor-core instructions, {products} products")
        if each.mma or each.atomics or each.scratch:
            said.append(f"{at}: {each.mma} old products, {each.atomics} atomics, {each.scratch} bytes of scratch")
        if "cp.async.bulk.tensor" not in each.ptx:
            said.append(f"{at}: no bulk reads")
        if each.narrow > NARROW:
            said.append(f"{at}: {each.narrow} accesses below 16 bytes, limit {NARROW}")
    return said


def compiled(factory: pytest.TempPathFactory, layers: Sequence[Layer], target: int) -> list[Compiled]:
    return aot.compile_all(requests(layers, target), factory.mktemp("triton"), targets=[target])


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_layers_of_gpt_oss(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, GPT_OSS, target)) == []


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_others(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, OTHERS, target)) == []
