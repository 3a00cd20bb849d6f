"""The attention kernels as they ship, compiled ahead of time: tensor cores, bulk reads, no spills, no atomics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.attention import hopper, mla, rope
from nmoe.effects.kernels.attention.hopper import mla_dkv, mla_dq
from nmoe.effects.kernels.tables import AttentionTile
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.shipped import SAME

SIZES = {"nope": 128, "rope": 64, "value": 128}
"""Channels of every large preset's heads."""

SHIPPED = {
    target: mla.Tiles(**tuning.find(tuning.load(capability), "mla", 128, 64, 128).tiles)
    for target, capability in {90: (9, 0), 100: (10, 0)}.items()
}

PRODUCTS = {"forward": 3, "dq": 5, "dkv": 6}
"""Products of two blocks in a step of each kernel."""

NARROW = 12
"""Accesses below 16 bytes: numbers of a row, outside of the loops."""


def block(rows: int, part: str) -> str:
    return f"tensordesc<bf16[1,1,{rows},{SIZES[part]}]>"


def request(name: str, tile: AttentionTile, documents: bool) -> Request:
    """One of the three kernels, in bf16."""
    m, n = tile.block_m, tile.block_n
    types = {"q": block(m, "nope"), "q_rope": block(m, "rope")}
    types |= {"k": block(n, "nope"), "k_rope": block(n, "rope"), "v": block(n, "value")}
    if name == "dkv":
        row = f"tensordesc<fp32[1,{m}]>"
        types |= {"do": block(m, "value"), "dk": block(n, "nope"), "dk_rope": block(n, "rope"), "dv": block(n, "value")}
        types |= {"top": row, "delta": row}
    else:
        types |= {"o": block(m, "value"), "lse": "*fp32"}
    if name == "dq":
        types |= {"do": block(m, "value"), "dq": block(m, "nope"), "dq_rope": block(m, "rope")}
        types |= {"top": "*fp32", "delta": "*fp32", "padded": "i32"}
    constants: dict[str, Any] = {
        "block_m": m,
        "block_n": n,
        "heads_per_group": tile.heads,
        "documents": documents,
        **SIZES,
    }
    masks = "end" if name == "dkv" else "start"
    if documents:
        types[masks] = "*i32"
    else:
        constants[masks] = None
    types |= {"positions": "i32", "heads": "i32", "rows": "i32", "scale": "fp32"}
    return Request(
        kernel=f"nmoe.effects.kernels.attention.mla_kernels:{name}_kernel",
        signature=types,
        constants=constants,
        warps=tile.num_warps,
        stages=tile.num_stages,
    )


def compiled(factory: pytest.TempPathFactory, target: int, documents: bool) -> list[Compiled]:
    tiles = SHIPPED[target]
    requests = [request(name, getattr(tiles, name), documents) for name in PRODUCTS]
    return aot.compile_all(requests, factory.mktemp("triton"), targets=[target])


def problems(found: Sequence[Compiled]) -> list[str]:
    """What would make a kernel slow or its sums depend on chance."""
    said = [problem for each in found for problem in each.problems(tensor_cores=True)]
    for each, products in zip(found, PRODUCTS.values(), strict=True):
        at = f"{each.kernel} on sm_{each.target}"
        used = each.wgmma if each.target < 100 else each.tcgen05
        if used < 2 * products:
            said.append(f"{at}: {used} tensor-core instructions in two loops of {products} products")
        if each.mma or each.atomics or each.scratch:
            said.append(f"{at}: {each.mma} old products, {each.atomics} atomics, {each.scratch} bytes of scratch")
        if "cp.async.bulk.tensor" not in each.ptx:
            said.append(f"{at}: no bulk reads")
        if each.narrow > NARROW:
            said.append(f"{at}: {each.narrow} accesses below 16 bytes, limit {NARROW}")
    return said


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_attention(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, target, documents=False)) == []


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
def test_attention_of_documents(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    assert problems(compiled(tmp_path_factory, target, documents=True)) == []


HOPPER = {False: 16, True: 44}
"""Spill instructions of Hopper's gradients of keys and values, without documents and with, few in loops."""


def box(columns: int) -> str:
    """64 positions, as the kernels for Hopper read them."""
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    return f"tensordesc<bf16[64, {columns}],{layout}>"


def gradients_of_keys(documents: bool) -> Request:
    """For Hopper; and of values."""
    nope, rope, value = hopper.SIZES
    types = {"q": box(nope), "q_rope": box(rope), "kv": box(nope), "k_rope": box(rope), "do": box(value)}
    types |= {"dkv": box(nope), "dk_rope": box(rope), "top": "*fp32", "delta": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("positions", "padded", "heads", "rows"), "i32") | ({"end": "*i32"} if documents else {})
    constants: dict[str, Any] = {"NOPE": nope, "ROPE": rope, "VALUE": value}
    constants |= {"HEADS": mla_dkv.HEADS, "STAGES": mla_dkv.STAGES} | ({} if documents else {"end": None})
    return Request(
        kernel="nmoe.effects.kernels.attention.hopper.mla_dkv:mla_dkv_kernel",
        signature=types,
        constants=constants,
        aligned=[*(name for name, kind in types.items() if kind.startswith("*")), "positions", "padded"],
    )


@pytest.mark.parametrize("documents", HOPPER)
def test_gradients_of_keys_and_values_for_hopper(tmp_path_factory: pytest.TempPathFactory, documents: bool) -> None:
    """No product waits for another; both groups of warps that multiply have 240 registers of a thread."""
    own = gradients_of_keys(documents)
    (found,) = aot.compile_all([own], tmp_path_factory.mktemp("triton"), targets=[90])
    assert found.problems(tensor_cores=True, spills=HOPPER[documents]) == []
    assert (found.mma, found.atomics, found.scratch) == (0, 0, 0)
    assert found.registers <= 168, "three groups of 4 warps share a multiprocessor's registers at the launch"
    assert re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32\s+(\d+)", found.ptx).count("240") >= 1
    # of 16 channels or queries: scores 8 + 4, dp 8, dv 4, dk 4 + 4; on the diagonal, in the loop, masked by documents
    assert found.wgmma == 2 * 32 * (3 if documents else 2)


QUERIES = {False: 0, True: 0}
"""Spill instructions of Hopper's gradient of queries, without documents and with, none in its loop."""


def gradient_of_queries(documents: bool) -> Request:
    """For Hopper."""
    nope, rope, value = hopper.SIZES
    types = {"q": box(nope), "q_rope": box(rope), "kv": box(nope), "k_rope": box(rope), "do": box(value)}
    types |= {"o": "*bf16", "dq": "*bf16", "lse": "*fp32", "top": "*fp32", "delta": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("positions", "heads", "rows"), "i32") | ({"start": "*i32"} if documents else {})
    constants: dict[str, Any] = {"NOPE": nope, "ROPE": rope, "VALUE": value, "PIECE": mla_dq.PIECE}
    constants |= {"HEADS": mla_dq.HEADS, "STAGES": mla_dq.STAGES}
    return Request(
        kernel="nmoe.effects.kernels.attention.hopper.mla_dq:mla_dq_kernel",
        signature=types,
        constants=constants | ({} if documents else {"start": None}),
        aligned=[*(name for name, kind in types.items() if kind.startswith("*")), "positions"],
    )


def test_gradient_of_queries_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No product waits for another; both groups of warps that multiply have 240 registers of a thread."""
    requests = [gradient_of_queries(documents) for documents in QUERIES]
    compiled = aot.compile_all(requests, tmp_path_factory.mktemp("triton"), targets=[90])
    for found, spills in zip(compiled, QUERIES.values(), strict=True):
        assert found.problems(tensor_cores=True, spills=spills) == []
        assert (found.mma, found.atomics, found.scratch) == (0, 0, 0)
        assert found.registers <= 168, "three groups of 4 warps share a multiprocessor's registers at the launch"
        assert re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32\s+(\d+)", found.ptx).count("240") >= 1
        # of a group: scores 8 + 4, gradient of probabilities 8, of queries 4 + 4; first block, loop, last sum
        assert found.wgmma == 2 * (20 + 28 + 8)


@pytest.mark.long
def test_what_is_too_large_is_seen(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tile of sm_90 has no place in the shared memory that sm_100 leaves; 64 queries a step spill on sm_90."""
    large = request("dq", SHIPPED[90].dq, documents=False)
    assert aot.compile_all([large], tmp_path_factory.mktemp("triton"), targets=[100])[0].problems()
    spilling = request(
        "dkv", AttentionTile(block_m=64, block_n=64, heads=8, num_warps=4, num_stages=2), documents=False
    )
    assert aot.compile_all([spilling], tmp_path_factory.mktemp("triton"), targets=[90])[0].problems()


def rotation(inverse: bool) -> Request:
    """In place, as both passes rotate q; strides are multiples of 16."""
    axes = ("batch", "position", "head")
    strides = [f"{side}_{axis}" for side in "yx" for axis in axes]
    types = {"y": "*bf16", "x": "*bf16", "cos": "*fp32", "sin": "*fp32", "tokens": "i32", "length": "i32"}
    types |= {stride: "i32" for stride in strides}
    constants = {
        "channels": 64,
        "width": 64,
        "block_m": rope.TILE.block_m,
        "inverse": inverse,
        "placed": False,
        "positions": None,
    }
    return Request(
        kernel="nmoe.effects.kernels.attention.rope:rotate_kernel",
        signature=types,
        constants=constants,
        aligned=["y", "x", "cos", "sin", *strides],
        warps=rope.TILE.num_warps,
        stages=rope.TILE.num_stages,
        same={**SAME["attention.rope:rotate_kernel"], **{f"y_{axis}": f"x_{axis}" for axis in axes}},
    )


def test_rotation(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Channels move 16 bytes at a time when every stride is a multiple of 16."""
    for each in aot.compile_all([rotation(inverse=True)], tmp_path_factory.mktemp("triton")):
        assert each.problems() == []
        assert each.narrow == 0
        assert each.wide > 0
