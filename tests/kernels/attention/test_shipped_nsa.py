"""The kernels of native sparse attention as they ship, compiled ahead of time: tensor cores, no atomics, no spills."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import nsa, nsa_kernels
from nmoe.effects.kernels.attention.blocks import box
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.attention.test_shipped_dsa import CAPABILITIES

PRODUCTS: Mapping[str, int] = {"forward": 2, "dq": 3, "dkv": 4, "join": 0, "weight": 1, "total": 0, "select": 0}
"""Products of two blocks in each kernel."""

POINTERS: Mapping[str, str] = {
    **dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*bf16"),
    **dict.fromkeys(("lse", "delta", "weight", "total", "part", "part_v"), "*fp32"),
    **dict.fromkeys(("start", "end", "begins", "chosen", "more", "base", "owner_of", "chunk_of"), "*i32"),
    **dict.fromkeys(("order", "bounds"), "*i64"),
}

ALIGNED = ("positions", "heads", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
"""Integers that are multiples of 16 at the paper's sizes."""

LISTS = ("list_forward", "list_dq", "list_dkv")
MODES = {"window": nsa_kernels.WINDOW.value, "compressed": nsa_kernels.COMPRESSED.value}


@attrs.frozen(kw_only=True)
class Sizes:
    """What a layer's kernels are compiled for; those of the paper."""

    width: int = 192
    value: int = 128
    group: int = 16
    span: int = 64
    documents: bool = False


PAPER = Sizes()
SMALL = Sizes(width=32, value=24, group=2, span=8, documents=True)


def request(name: str, mode: int, sizes: Sizes, tile: Any) -> Request:
    """One kernel, in one mode, in bf16."""
    kernel = f"nmoe.effects.kernels.attention.nsa_kernels:{name}_kernel"
    module, function = kernel.split(":")
    names = getattr(importlib.import_module(module), function).arg_names
    listed = mode == nsa_kernels.SELECTED.value
    values: dict[str, Any] = {
        **nsa.rows(tile, sizes.group, listed=listed and name != "dkv"),
        "block_n": box(sizes.span) if name in ("dkv", "join") and listed else tile.block_n,
        "block_k": tile.block_k,
        "width": sizes.width,
        "width_box": box(sizes.width),
        "value": sizes.value,
        "value_box": box(sizes.value),
        "span": sizes.span if listed or name in ("total", "select") else 1,
        "mode": mode,
        "documents": sizes.documents,
    }
    if name == "weight":
        values["pack"] = max(16, values["pack"])
    missing = {"start": sizes.documents, "end": sizes.documents, "chosen": listed or name == "select"}
    missing |= {"begins": mode == nsa_kernels.COMPRESSED.value, "order": listed, "bounds": listed}
    missing |= dict.fromkeys(("more", "base", "owner_of", "chunk_of", "part", "part_v"), mode != MODES["window"])
    constants = {key: values[key] for key in names if key in values}
    constants |= {key: None for key in names if missing.get(key) is False}
    types = {key: POINTERS.get(key, "fp32" if key == "scale" else "i32") for key in names if key not in constants}
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
    tiles = tuning.find(tuning.load(CAPABILITIES[target]), "nsa", sizes.width, sizes.value).tiles
    ranges = [request(name, mode, sizes, tiles[name]) for mode in MODES.values() for name in ("forward", "dq", "dkv")]
    lists = [request(name[5:], nsa_kernels.SELECTED.value, sizes, tiles[name]) for name in LISTS]
    ranges += [request("join", mode, sizes, attrs.evolve(tiles["dkv"], num_warps=4)) for mode in (1, 2)]
    weights = request("weight", MODES["compressed"], sizes, tiles["weight"])
    choice = [request(name, MODES["compressed"], sizes, tiles["select"]) for name in ("total", "select")]
    return [*ranges, *lists, weights, *choice]


def problems(found: Sequence[Compiled], *, small: bool = False) -> list[str]:
    """What would make a kernel slow or its sums depend on chance; small blocks are products of the old kind."""
    said: list[str] = []
    for each in found:
        at = f"{each.kernel} on sm_{each.target}"
        products = 0 if small else PRODUCTS[each.kernel.split(":")[1].removesuffix("_kernel")]
        said += each.problems(tensor_cores=products > 0)
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


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_documents_and_small_models(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, attrs.evolve(PAPER, documents=True), target)) == []
    assert problems(compiled(tmp_path_factory, SMALL, target), small=True) == []
