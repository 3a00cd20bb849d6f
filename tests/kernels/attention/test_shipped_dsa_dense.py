"""The kernels of the dense stage as they ship, compiled ahead of time: tensor cores, no atomics, no spills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention.blocks import box
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.attention.test_shipped_dsa import CAPABILITIES, SMALL, TYPES, V32, Sizes, arguments

PRODUCTS: Mapping[str, int] = {"sums": 0, "target": 2, "query": 2, "key": 2}
"""Products of two blocks in each kernel."""

ARGUMENTS: Mapping[str, str] = {
    "sums": "scores:f start:i top:f | first_block row_blocks positions",
    "target": "lse:f start:i top:f scores:f parts:f | first_block row_blocks key_blocks positions heads",
    "query": "q:h k:h w:h start:i slopes:f dq:h dw:h | first_block row_blocks positions heads",
    "key": "q:h k:h w:h start:i slopes:f total:f | first_block row_blocks number positions heads",
}
"""Pointers with the letter of their type, and integers, of each kernel."""

SPILLS = 50
"""Of a model of four heads, whose numbers are no multiples of 16: addresses take the registers, 50 of the kernel that
owns queries on sm_90 with Triton 3.6. Larger models have none."""

NOPE = {128: 128, 16: 64, 4: 24}
"""Channels of a head without position, by the number of heads."""


def request(name: str, sizes: Sizes, target: int) -> Request:
    """One of the kernels, in bf16."""
    tiles = tuning.find(tuning.load(CAPABILITIES[target]), "dsa_dense").tiles
    tile, queries = tiles[name], tiles["score"].block_m
    pointers, integers = (part.split() for part in ARGUMENTS[name].split("|"))
    types = {key: TYPES[kind] for key, kind in (pointer.split(":") for pointer in pointers)}
    types |= dict.fromkeys(integers, "i32")
    nope, rope = box(NOPE[sizes.heads]), box(sizes.rope)
    if name == "target":
        blocks = {"q": (queries, nope), "q_rope": (queries, rope), "k": (tile.block_n, nope)}
        blocks["k_rope"] = (tile.block_n, rope)
        types |= {key: f"tensordesc<bf16[1,1,{rows},{width}]>" for key, (rows, width) in blocks.items()}
        types["scale"] = "fp32"
    values: dict[str, Any] = {
        "block_m": queries,
        "block_n": tile.block_n,
        "nope": nope,
        "rope": rope,
        "channels": sizes.index_channels,
        "channels_box": box(sizes.index_channels),
        "documents": sizes.documents,
    }
    kernel = f"nmoe.effects.kernels.attention.dsa_dense_kernels:{name}_kernel"
    constants = {key: value for key, value in values.items() if key in arguments(kernel)}
    if not sizes.documents:
        del types["start"]
        constants["start"] = None
    full = ("positions", "heads") if sizes.heads % 16 == 0 and sizes.index_heads % 16 == 0 else ()
    return Request(
        kernel=kernel,
        signature=types,
        constants=constants,
        aligned=[*(key for key, kind in types.items() if kind[0] == "*"), *(set(full) & set(types))],
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def requests(sizes: Sizes, target: int) -> list[Request]:
    """Every kernel at these sizes."""
    return [request(name, sizes, target) for name in PRODUCTS]


def problems(compiled: Sequence[Compiled], *, small: bool = False) -> list[str]:
    """What would make a kernel slow or its sums depend on chance; small blocks are products of the old kind."""
    found: list[str] = []
    for kernel in compiled:
        at = f"{kernel.kernel} on sm_{kernel.target}"
        products = 0 if small else PRODUCTS[kernel.kernel.split(":")[1].removesuffix("_kernel")]
        found += kernel.problems(spills=SPILLS if small else 0, tensor_cores=products > 0)
        used = kernel.wgmma if kernel.target < 100 else kernel.tcgen05
        if used < products:
            found.append(f"{at}: {used} tensor-core instructions, {products} products")
        if kernel.atomics or kernel.scratch:
            found.append(f"{at}: {kernel.atomics} atomics, {kernel.scratch} bytes of scratch")
    return found


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_published_sizes(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    folder = tmp_path_factory.mktemp("triton")
    assert problems(aot.compile_all(requests(V32, target), folder, targets=[target])) == []


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_documents_and_small_models(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    folder = tmp_path_factory.mktemp("triton")
    larger = [request for sizes in (attrs.evolve(V32, documents=True), SMALL[0]) for request in requests(sizes, target)]
    assert problems(aot.compile_all(larger, folder, targets=[target])) == []
    assert problems(aot.compile_all(requests(SMALL[1], target), folder, targets=[target]), small=True) == []


@pytest.mark.parametrize("documents", [False, pytest.param(True, marks=pytest.mark.long)])
def test_rows_of_one_block(tmp_path_factory: pytest.TempPathFactory, documents: bool) -> None:
    """Integers of 1, which Triton makes constants: one head, block, or position, and the second sequence of those."""

    def ones(made: Request) -> Request:
        integers = [name for name, kind in made.signature.items() if kind == "i32"]
        return attrs.evolve(
            made,
            signature={name: kind for name, kind in made.signature.items() if kind != "i32"},
            constants={**made.constants, **dict.fromkeys(integers, 1)},
            aligned=[name for name in made.aligned or () if name not in integers],
        )

    made = [ones(request) for request in requests(attrs.evolve(V32, documents=documents), 90)]
    compiled = aot.compile_all(made, tmp_path_factory.mktemp("triton"), targets=[90])
    assert [problem for kernel in compiled for problem in kernel.problems()] == []
