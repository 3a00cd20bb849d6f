"""The kernels of native sparse attention as they ship, compiled ahead of time: tensor cores, no atomics, no spills."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import nsa
from nmoe.effects.kernels.attention.blocks import box
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.attention import test_shipped_gqa
from tests.kernels.attention.test_shipped_dsa import CAPABILITIES

PRODUCTS: Mapping[str, int] = {"forward": 2, "dq": 3, "dkv": 4, "join": 0, "weight": 1, "total": 0, "select": 0}
"""Products of two blocks in each kernel."""

SPILLS: Mapping[int, Mapping[str, int]] = {90: {}, 100: {"forward": 5}}
"""The forward pass over ranges moves five values out of its registers on sm_100."""

DOCUMENT_SPILLS: Mapping[int, Mapping[str, int]] = {90: {"dkv": 6}, 100: {"forward": 8}}
"""Where there are documents: on sm_90 the gradients of listed keys, of four readers at once."""

TYPES: Mapping[str, str] = {
    **dict.fromkeys(("q", "o", "do", "dq", "dk", "dv"), "*bf16"),
    **dict.fromkeys(("lse", "delta", "weight", "total", "part", "part_v"), "*fp32"),
    **dict.fromkeys(("start", "begins", "chosen", "readers", "more", "base", "owner_of", "chunk_of"), "*i32"),
    **{"bounds": "*i64", "scale": "fp32"},
}

ALIGNED = ("positions", "heads", "padded")
"""Integers that are multiples of 16 at the paper's sizes."""

LISTS = ("list_forward", "list_dq", "list_dkv")
RANGES = {"forward": 2, "dq": 3, "dkv": 4}


@attrs.frozen(kw_only=True)
class Sizes:
    """What a layer's kernels are compiled for; those of the paper."""

    width: int = 192
    value: int = 128
    group: int = 16
    span: int = 64
    slots: int = 16
    documents: bool = False


PAPER = Sizes()
SMALL = Sizes(width=32, value=24, group=2, span=8, documents=True)


def request(name: str, sizes: Sizes, tile: Any) -> Request:
    """One kernel of the selected branch or the selection, in bf16."""
    kernel = f"nmoe.effects.kernels.attention.nsa_kernels:{name}_kernel"
    module, function = kernel.split(":")
    names = getattr(importlib.import_module(module), function).arg_names
    pack, block_n = box(sizes.group), tile.block_n if name in ("weight", "total", "select") else box(sizes.span)
    near = 1 << (sizes.width.bit_length() - 1)
    far = sizes.width - near
    values: dict[str, Any] = {
        "size": max(1, tile.block_m // pack),
        "pack": pack,
        "block_n": block_n,
        "width": sizes.width,
        "width_box": box(sizes.width),
        "near": box(near),
        "far": box(far) if far else 0,
        "value_width": sizes.value,
        "value": box(sizes.value),
        "slots_box": sizes.slots,
        "span": sizes.span,
        "documents": sizes.documents,
    }
    missing = {"start": sizes.documents, "k_far": far > 0}
    constants = {key: values[key] for key in names if key in values}
    constants |= {key: None for key in names if missing.get(key) is False}
    parts = {"k": near, "k_far": far, "v": sizes.value}
    rows = {key: f"tensordesc<bf16[1,1,{block_n},{box(channels)}]>" for key, channels in parts.items()}
    types = {key: {**TYPES, **rows}.get(key, "i32") for key in names if key not in constants}
    return Request(
        kernel=kernel,
        signature=types,
        constants=constants,
        aligned=[key for key, kind in types.items() if kind[0] == "*" or (key in ALIGNED and sizes.width % 64 == 0)],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def requests(sizes: Sizes, target: int) -> list[Request]:
    """Every kernel in every mode at these sizes."""
    tiles = nsa.Tiles(**tuning.find(tuning.load(CAPABILITIES[target]), "nsa", sizes.width, sizes.value).tiles)
    layer = test_shipped_gqa.Layer(
        channels=sizes.width, group=sizes.group, sinks=False, documents=sizes.documents, window=512
    )
    blocks, cut = attrs.evolve(layer, window=None), tiles.of_ranges()
    ranges = [
        test_shipped_gqa.request(name, each, getattr(cut, name), value=sizes.value, compressed=each is blocks)
        for each in (layer, blocks)
        for name in RANGES
    ]
    lists = [request(name[5:], sizes, getattr(tiles, name)) for name in LISTS]
    rest = {"join": tiles.join, "weight": tiles.weight, "total": tiles.select, "select": tiles.select}
    return [*ranges, *lists, *(request(name, sizes, tile) for name, tile in rest.items())]


def problems(
    found: Sequence[Compiled], *, small: bool = False, spills: Mapping[int, Mapping[str, int]] = SPILLS
) -> list[str]:
    """What would make a kernel slow or its sums depend on chance; small blocks are products of the old kind."""
    said: list[str] = []
    for each in found:
        at = f"{each.kernel} on sm_{each.target}"
        name = each.kernel.split(":")[1].removesuffix("_kernel")
        products = 0 if small else PRODUCTS[name]
        said += each.problems(spills=spills[each.target].get(name, 0), tensor_cores=products > 0)
        used = each.wgmma if each.target < 100 else each.tcgen05
        if used < products:
            said.append(f"{at}: {used} tensor-core instructions, {products} products")
        if each.atomics or each.scratch:
            said.append(f"{at}: {each.atomics} atomics, {each.scratch} bytes of scratch")
    return said


def compiled(factory: pytest.TempPathFactory, sizes: Sizes, target: int) -> list[Compiled]:
    return aot.compile_all(requests(sizes, target), factory.mktemp("triton"), targets=[target])


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_paper_sizes(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, PAPER, target)) == []


def of_one_token(request: Request) -> Request:
    """The kernel as a launch with one token specialises it: integers that are 1 become constants."""
    module, function = request.kernel.split(":")
    general = getattr(importlib.import_module(module), function).kwargs.get("do_not_specialize") or ()
    ones = {name for name in ("positions", "num_keys") if name in request.signature and name not in general}
    return attrs.evolve(
        request,
        signature={name: kind for name, kind in request.signature.items() if name not in ones},
        constants={**request.constants, **dict.fromkeys(ones, 1)},
        aligned=[name for name in request.aligned or () if name not in ("positions", "num_keys")],
    )


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_a_sequence_of_one_token(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    """It compiles: ptxas crashed on the constant."""
    wanted = [of_one_token(each) for each in requests(PAPER, target)]
    found = aot.compile_all(wanted, tmp_path_factory.mktemp("triton"), targets=[target])
    assert [problem for each in found for problem in each.races] == []


WAITS = "nmoe.effects.kernels.attention.gqa_kernels:dkv_kernel on sm_90: products wait for one another"
"""Compressed blocks with documents: slower for it, by how much no GPU has said."""


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_documents_and_small_models(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    large = compiled(tmp_path_factory, attrs.evolve(PAPER, documents=True), target)
    for said in (
        problems(large, spills=DOCUMENT_SPILLS),
        problems(compiled(tmp_path_factory, SMALL, target), small=True),
    ):
        assert [each for each in said if not each.startswith(WAITS)] == []
        assert sum(each.startswith(WAITS) for each in said) == (1 if target == 90 else 0)
