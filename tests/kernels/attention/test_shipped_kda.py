"""The kernels of Kimi delta attention as they ship, compiled ahead of time: tensor cores, no atomics, few spills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import convolve, gated_norm, kda
from nmoe.pure.model.attention.kda import CHUNK
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request

CAPABILITIES = {90: (9, 0), 100: (10, 0)}

PRODUCTS = {"sum": 0, "sum_backward": 3, "prepare": 6, "scan": 2, "output": 2, "scan_backward": 4, "backward": 12}
"""Products of two blocks in each kernel."""

SPILLS = {"prepare": {90: 16, 100: 16}, "scan_backward": {100: 8}, "backward": {90: 64, 100: 8}}
"""Moves out of the registers that are known; of all other kernels none."""

NARROW = 28
"""Accesses below 16 bytes: numbers of a row, and starts of documents, outside of the loops."""

TILES = {"sum": "sums", "sum_backward": "sums"}
"""Kernels whose tile has another name."""


@attrs.frozen(kw_only=True)
class Layer:
    """What a layer's kernels are compiled for."""

    channels: int = 128
    documents: bool = False
    memory: bool = False  # whether a row goes on from another, and what it leaves has a gradient; gates are bounded


def tiles(layer: Layer, target: int) -> kda.Tiles:
    return kda.Tiles(**tuning.find(tuning.load(CAPABILITIES[target]), "kda", layer.channels).tiles)


def typed(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def request(name: str, layer: Layer, target: int) -> Request:
    """One of the kernels, in bf16."""
    tile = getattr(tiles(layer, target), TILES.get(name, name))
    constants: dict[str, Any] = {"length": CHUNK, "channels": layer.channels, "values": tile.values}
    types = {
        "sum": typed("*bf16", "x") | typed("*fp32", "bias log_rate total"),
        "sum_backward": typed("*bf16", "x dx") | typed("*fp32", "bias log_rate dtotal dbias drate"),
        "prepare": typed("*bf16", "q k v entered left correction value weight inverse") | typed("*fp32", "carried"),
        "scan": typed("*bf16", "correction value left states fresh") | typed("*fp32", "carried after"),
        "output": typed("*bf16", "entered states weight fresh o"),
        "scan_backward": typed("*bf16", "entered correction left weight do dstates dfresh") | typed("*fp32", "carried"),
        "backward": typed("*bf16", "q k v inverse states fresh o do dstates dfresh dq dk dv")
        | typed("*fp32", "dtotal dstep"),
    }[name]
    optional: list[str] = []
    if name in ("prepare", "backward"):
        types |= typed("*fp32", "total step") | typed("i32", "by_batch by_position") | typed("fp32", "scale eps")
        constants |= {"levels": CHUNK.bit_length() - 1, "documents": layer.documents}
        types |= {"start": "*i32"} if layer.documents else {}
        constants |= {} if layer.documents else {"start": None}
    if name in ("scan", "scan_backward"):
        optional = ["before"] if name == "scan" else ["dafter", "dbefore"]
        constants |= {"goes_on": layer.memory} | ({} if name == "scan" else {"has_dafter": layer.memory})
    if name.startswith("sum"):
        types["limit"] = "fp32"
        constants["bounded"] = layer.memory
    types |= typed("*fp32", " ".join(optional)) if layer.memory else {}
    constants |= {} if layer.memory else dict.fromkeys(optional)
    types |= typed("i32", "heads chunks" if name == "scan" else "positions heads chunks")
    strides = {"by_batch", "by_position"} & set(types)
    return Request(
        kernel=f"nmoe.effects.kernels.attention.kda_kernels:{name}_kernel",
        signature=types,
        constants=constants,
        aligned=[*(each for each, kind in types.items() if kind.startswith("*")), *strides],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def convolution(name: str, layer: Layer) -> Request:
    """One of the kernels of the short convolutions over four tokens."""
    tile = convolve.TILE
    types = {
        "forward": typed("*bf16", "x y"),
        "backward": typed("*bf16", "x dq dk dv dtotal") | typed("*fp32", "dtaps") | typed("i32", "heads"),
        "input": typed("*bf16", "dtotal dx"),
    }[name]
    types |= typed("*fp32", "taps") | typed("i32", "positions width")
    types |= typed("*i32", "start") if layer.documents else {}
    constants = {"count": 4, "tokens": tile.tokens, "channels": layer.channels, "documents": layer.documents}
    return Request(
        kernel=f"nmoe.effects.kernels.attention.convolve:{name}_kernel",
        signature=types,
        constants=constants | ({} if layer.documents else {"start": None}),
        aligned=[*(each for each, kind in types.items() if kind.startswith("*")), "width"],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def norm(name: str, layer: Layer) -> Request:
    """One of the kernels of the head norm."""
    tile = gated_norm.TILE
    types = typed("*bf16", "x gate y" if name == "forward" else "x gate dy dx dgate") | typed("*fp32", "gain")
    types |= {} if name == "forward" else {"dgain": "*fp32"}
    return Request(
        kernel=f"nmoe.effects.kernels.attention.gated_norm:{name}_kernel",
        signature=types | {"number": "i32", "eps": "fp32"},
        constants={"rows": tile.rows, "channels": layer.channels},
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def requests(layer: Layer, target: int) -> list[Request]:
    norms = [norm(name, layer) for name in ("forward", "backward")]
    convolutions = [convolution(name, layer) for name in ("forward", "backward", "input")]
    return [*(request(name, layer, target) for name in PRODUCTS), *convolutions, *norms]


KIMI = Layer()
"""A layer of Kimi Linear."""

OTHERS = (Layer(documents=True, memory=True), Layer(channels=64, documents=True))
"""Documents, rows that go on from others, and narrower heads."""


def problems(found: Sequence[Compiled]) -> list[str]:
    """What would make a kernel slow or its sums depend on chance."""
    said: list[str] = []
    for each in found:
        name, at = each.kernel.split(":")[1].removesuffix("_kernel"), f"{each.kernel} on sm_{each.target}"
        products = PRODUCTS[name] if "kda_kernels" in each.kernel else 0
        spills = SPILLS.get(name, {}).get(each.target, 0) if products else 0
        said += each.problems(spills=spills, tensor_cores=products > 0)
        used = each.wgmma if each.target < 100 else each.tcgen05
        if used < products:
            said.append(f"{at}: {used} tensor-core instructions, {products} products")
        if each.mma or each.atomics or each.scratch:
            said.append(f"{at}: {each.mma} old products, {each.atomics} atomics, {each.scratch} bytes of scratch")
        if each.narrow > NARROW:
            said.append(f"{at}: {each.narrow} accesses below 16 bytes, limit {NARROW}")
    return said


def compiled(factory: pytest.TempPathFactory, layer: Layer, target: int) -> list[Compiled]:
    return aot.compile_all(requests(layer, target), factory.mktemp("triton"), targets=[target])


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_a_layer_of_kimi_linear(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, KIMI, target)) == []


@pytest.mark.long
@pytest.mark.parametrize("layer", OTHERS, ids=str)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_others(tmp_path_factory: pytest.TempPathFactory, layer: Layer, target: int) -> None:
    assert problems(compiled(tmp_path_factory, layer, target)) == []
