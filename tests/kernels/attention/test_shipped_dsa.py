"""The kernels of sparse latent attention as they ship, compiled ahead of time: tensor cores, no atomics, no spills."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import dsa, dsa_kernels, lists
from nmoe.effects.kernels.attention.blocks import box
from nmoe.effects.kernels.tables import SparseTile
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request

CAPABILITIES = {90: (9, 0), 100: (10, 0)}

PRODUCTS: Mapping[str, int] = {
    **{
        "score": 1,
        "select": 0,
        "weights": 1,
        "output": 1,
        "mean": 0,
        "delta": 0,
        "pairs": 2,
        "dq": 2,
        "parts": 2,
        "gather": 0,
    },
    **{"index_loss": 1, "index_gradient": 2, "index_parts": 2, "index_gather": 0, "mark": 0, "rank": 0},
}
"""Products of two blocks in each kernel."""

ARGUMENTS: Mapping[str, str] = {
    "score": "q:h k:h w:h start:i scores:f | first_block row_blocks positions heads count",
    "select": "scores:f start:i chosen:i | first_block row_blocks positions count slots",
    "weights": "q:h kv:h chosen:i p:h top:f size:f | first_query positions heads slots",
    "output": "kv:h chosen:i p:h top:f size:f o:h lse:f | first_query positions heads slots blocks",
    "mean": "p:h top:f lse:f target:f | first_query positions heads slots blocks",
    "index_loss": "q:h k:h w:h chosen:i target:f top:f loss:f | positions heads slots",
    "delta": "o:h do:h delta:f | rows",
    "pairs": "q:h kv:h do:h chosen:i lse:f delta:f p:h ds:h | first_query positions heads slots",
    "dq": "kv:h chosen:i ds:h dq:h | first_query positions heads slots",
    "parts": "q:h do:h chosen:i p:h ds:h parts:h ranks:s begins:i | first_query positions slots",
    "gather": "parts:h begins:i total:f |",
    "index_gather": "parts:h begins:i total:f |",
    "mark": "chosen:i ranks:s | first_query positions slots",
    "rank": "ranks:s counts:i | number positions",
    "index_gradient": "q:h k:h w:h chosen:i target:f top:f dy:f dq:h dw:h | positions heads slots",
    "index_parts": "q:h k:h w:h chosen:i target:f top:f dy:f parts:h ranks:s begins:i | first_query positions heads "
    "slots",
}
"""Pointers with the letter of their type, and integers, of each kernel."""

SPILLS: Mapping[int, Mapping[str, int]] = {90: {"select": 2}, 100: {"pairs": 2}}
"""Triton 3.6 moves two values of the kernel of pairs out on sm_100, 3.7 two of the choice's with documents on sm_90."""

SMALL_SPILLS: Mapping[str, int] = {"dq": 9}
"""Of small models, on either chip: 9 of the gradients of 16 heads' queries on sm_90."""

COUNTING = SparseTile(block_n=lists.SLOTS, block_m=lists.KEYS, num_warps=lists.WARPS, num_stages=3)
"""How the kernels that count a key's parts are cut up, which no table says."""

TYPES = {"h": "*bf16", "i": "*i32", "f": "*fp32", "s": "*i16"}

ALIGNED = ("positions", "heads", "slots", "width", "rows")
"""Integers that are multiples of 16 at the published sizes."""


@attrs.frozen(kw_only=True)
class Sizes:
    """What a layer's kernels are compiled for; those of DeepSeek-V3.2."""

    heads: int = 128
    rank: int = 512
    rope: int = 64
    index_heads: int = 64
    index_channels: int = 128
    documents: bool = False


V32 = Sizes()
SMALL = (
    Sizes(heads=16, rank=256, rope=64, index_heads=16, index_channels=64),
    Sizes(heads=4, rank=32, rope=8, index_heads=2, index_channels=16, documents=True),
)
"""Fewer heads than a product on tensor cores of these generations has rows, and sizes that fill no block."""


def request(name: str, sizes: Sizes, tile: Any, block: int) -> Request:
    """One of the kernels, in bf16; `block` slots have their highest score together."""
    pointers, integers = (part.split() for part in ARGUMENTS[name].split("|"))
    types = {key: TYPES[kind] for key, kind in (each.split(":") for each in pointers)}
    types |= dict.fromkeys(integers, "i32")
    indexes = name in ("score", "select", "index_loss", "index_gradient", "index_parts")
    width = sizes.index_channels if name == "index_gather" else sizes.rank + sizes.rope
    across = dsa.blocks_of_heads(tile, sizes.heads)
    values: dict[str, Any] = {
        "block_m": tile.block_m if name in ("score", "select", "delta") else across,
        "block_n": min(tile.block_n, block) if name in ("output", "mean") else tile.block_n,
        "block": block if name in ("output", "mean") else tile.block_m,
        "block_k": tile.block_k,
        "rank": sizes.rank,
        "rope": sizes.rope,
        "rank_box": box(sizes.rank),
        "rope_box": box(sizes.rope),
        "heads": sizes.heads,
        "width": width,
        "width_box": box(width),
        "channels": sizes.index_channels,
        "channels_box": box(sizes.index_channels),
        "heads_box": box(sizes.index_heads),
        "documents": sizes.documents,
    }
    if name == "select":
        values["block_m"] = 8  # queries of a block of scores
    name = "gather" if name == "index_gather" else name
    module = "lists" if name in ("gather", "mark", "rank") else "dsa_index_kernels" if indexes else "dsa_kernels"
    kernel = f"nmoe.effects.kernels.attention.{module}:{name}_kernel"
    if "scale" in arguments(kernel):
        types["scale"] = "fp32"
    constants = {key: value for key, value in values.items() if key in arguments(kernel) and key not in types}
    if "start" in types and not sizes.documents:
        del types["start"]
        constants["start"] = None
    full = sizes.heads % 16 == 0 and sizes.index_heads % 16 == 0
    aligned = set(ALIGNED) - set(dsa_kernels.GENERAL if module == "dsa_kernels" else ())
    return Request(
        kernel=kernel,
        signature=types,
        constants=constants,
        aligned=[*(key for key, kind in types.items() if kind[0] == "*"), *(aligned & set(types) if full else ())],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def arguments(kernel: str) -> Sequence[str]:
    """Names of a kernel's arguments."""
    module, name = kernel.split(":")
    return getattr(importlib.import_module(module), name).arg_names


def requests(sizes: Sizes, target: int) -> list[Request]:
    """Every kernel at these sizes."""
    tiles = tuning.find(tuning.load(CAPABILITIES[target]), "dsa", sizes.heads).tiles
    return [request(name, sizes, tiles.get(name, COUNTING), tiles["weights"].block_n) for name in PRODUCTS]


def problems(found: Sequence[Compiled], *, small: bool = False) -> list[str]:
    """What would make a kernel slow or its sums depend on chance; small blocks are products of the old kind."""
    said: list[str] = []
    for each in found:
        at = f"{each.kernel} on sm_{each.target}"
        name = each.kernel.split(":")[1].removesuffix("_kernel")
        products = 0 if small else PRODUCTS[name]
        spills = (SMALL_SPILLS if small else SPILLS[each.target]).get(name, 0)
        said += each.problems(spills=spills, tensor_cores=products > 0)
        used = each.wgmma if each.target < 100 else each.tcgen05
        if used < products:
            said.append(f"{at}: {used} tensor-core instructions, {products} products")
        if each.atomics or each.scratch:
            said.append(f"{at}: {each.atomics} atomics, {each.scratch} bytes of scratch")
    return said


def compiled(factory: pytest.TempPathFactory, layers: Sequence[Sizes], target: int) -> list[Compiled]:
    made = [request for sizes in layers for request in requests(sizes, target)]
    return aot.compile_all(made, factory.mktemp("triton"), targets=[target])


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_published_sizes(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, [V32], target)) == []


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_documents_and_small_models(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, [attrs.evolve(V32, documents=True)], target)) == []
    assert problems(compiled(tmp_path_factory, SMALL, target), small=True) == []
