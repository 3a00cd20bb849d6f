"""The kernels of grouped-query attention as they ship, compiled ahead of time: tensor cores, bulk reads, no spills."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import gqa
from nmoe.effects.kernels.attention.blocks import box
from nmoe.effects.kernels.tables import AttentionTile
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request

CAPABILITIES = {90: (9, 0), 100: (10, 0)}

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
"""Products of two blocks in a step of each kernel."""

SPILLS = {90: 0, 100: 5}
"""Triton 3.6 moves five values of the keys' kernel out of its 72 registers at a window of 1,024 on sm_100."""

STRIDES = ("q_by_batch", "q_by_position", "q_by_head")

ALIGNED = (*STRIDES, "parts")
"""Integers that are multiples of 16 at the published sizes."""

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


def request(name: str, layer: Layer, tile: AttentionTile, *, value: int = 0, compressed: bool = False) -> Request:
    """One of the three kernels, in bf16, with values of so many channels, those of a key if 0."""
    m, n, width = tile.block_m, tile.block_n, layer.channels
    pack, value, near = min(layer.group & -layer.group, m), value or width, 1 << (width.bit_length() - 1)
    far = width - near
    values: dict[str, Any] = {
        "block_m": m,
        "block_n": n,
        "side_by_side": tile.heads,
        "width": width,
        "near": box(near),
        "far": box(far) if far else 0,
        "value_width": value,
        "value": box(value),
        "group": layer.group,
        "pack": pack,
        "sunk": layer.sinks,
        "compressed": compressed,
        "documents": layer.documents,
        "windowed": layer.window is not None,
        "split": layer.window is None or layer.window > gqa.SHORT * (m if name == "dkv" else n),
    }
    if far and name == "dkv":
        values["split"] = layer.window is None
    own, shares = name == "dkv", "fp32" if compressed else "bf16"
    masks = {"start": layer.documents, "end": layer.documents, "begins": compressed}
    masks |= dict.fromkeys(("sinks", "sink_parts", "dsinks"), layer.sinks)
    masks |= dict.fromkeys(("k_far", "q_far", "dq_far", "dk_far"), far > 0)

    def keys(channels: int, kind: str = "bf16") -> str:
        return f"tensordesc<{kind}[1,1,{n},{box(channels)}]>"

    def rows(channels: int) -> str:
        return f"tensordesc<bf16[1,{m // pack},{pack},{box(channels)}]>"

    def queries(channels: int) -> str:
        return f"tensordesc<bf16[1,1,{m},{box(channels)}]>"

    one = f"tensordesc<fp32[1,{m}]>"
    types = {
        **{"k": keys(near), "k_far": keys(far), "v": keys(value)},
        **{"q": queries(near) if own else "*bf16", "q_far": queries(far)},
        **{"do": queries(value) if own else "*bf16", "o": "*bf16" if name == "dq" else rows(value)},
        **{"dq": rows(near), "dq_far": rows(far)},
        **{"dk": keys(near, shares), "dk_far": keys(far, shares), "dv": keys(value, shares)},
        **{"lse": one if own else "*fp32", "delta": one if own else "*fp32"},
        **dict.fromkeys(("sinks", "sink_parts", "dsinks"), "*fp32"),
        **dict.fromkeys(("start", "end", "begins"), "*i32"),
        "scale": "fp32",
    }
    kernel = f"nmoe.effects.kernels.attention.gqa_kernels:{name}_kernel"
    module, function = kernel.split(":")
    names = getattr(importlib.import_module(module), function).arg_names
    constants = {key: values[key] for key in names if key in values}
    constants |= {key: None for key in names if masks.get(key) is False}
    told = {key: types.get(key, "i32") for key in names if key not in constants}
    return Request(
        kernel=kernel,
        signature=told,
        constants=constants,
        aligned=[*(each for each, kind in told.items() if kind.startswith("*")), *(set(ALIGNED) & set(told))],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def requests(layers: Sequence[Layer], target: int) -> list[Request]:
    """The three kernels of each layer."""
    return [request(name, layer, getattr(tiles(layer, target), name)) for layer in layers for name in PRODUCTS]


def problems(found: Sequence[Compiled]) -> list[str]:
    """What would make a kernel slow or its sums depend on chance."""
    said = [problem for each in found for problem in each.problems(spills=SPILLS[each.target], tensor_cores=True)]
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
