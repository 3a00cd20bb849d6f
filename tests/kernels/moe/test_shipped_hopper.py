"""The mixture's kernels for Hopper, compiled ahead of time: wide products, registers where they are needed, no spills.

Triton's interpreter knows no Gluon: what they compute is compared with the other kernels by tests/gpu/test_hopper.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import ring
from nmoe.effects.kernels.moe.hopper import activation, tiles
from tests.kernels import aot
from tests.kernels.aot import Request

TILED = {"tile_expert": "*i32", "tile_row": "*i32", "num_needed": "*i32", "end": "*i32"}


def block(rows: int, columns: int) -> str:
    """A descriptor, with the layout that a block of it has in shared memory."""
    layout = f"NVMMASharedLayout(swizzle_byte_width={min(2 * columns, 128)}, element_bitwidth=16, rank=2)"
    return f"tensordesc<bf16[{rows}, {columns}],{layout}>"


def request(
    name: str, types: Mapping[str, str], constants: Mapping[str, Any], sizes: str, warps: int = 8, **tile: int
) -> Request:
    tile = {"M": tiles.ROWS, "N": tiles.COLUMNS, "K": tiles.STEP, "PIECE": ring.PIECE, "STAGES": tiles.STAGES} | tile
    return Request(
        kernel=f"nmoe.effects.kernels.moe.hopper.{name}_kernel",
        signature=types,
        constants={**tile, "GROUP": 8, "PROGRAMS": 132, **constants},
        aligned=[*(key for key, kind in types.items() if kind.startswith("*")), *sizes.split()],
        warps=warps,
    )


def requests() -> list[Request]:
    """Of sizes that are multiples of a step's columns, and of ones that are multiples of 8 alone."""
    k, n = tiles.STEP, tiles.COLUMNS
    return [
        *(
            request(
                "up:gather_gemm_swiglu",
                {"x": "*bf16", "source": "*i32", "w": block(k, n // 2), "h": "*bf16", "a": "*bf16", "F": "i32"} | TILED,
                {"D": hidden},
                "F" if hidden % 16 == 0 else "",
                N=n // 2,
            )
            for hidden in (2048, 2056)
        ),
        *(
            request(
                "gradient:grouped_weight_gradient",
                {"a": "*bf16", "b": block(k, n), "out": out, "end": "*i32", "count": "*i32"}
                | dict.fromkeys(("E", "B"), "i32")
                | ({"source": "*i32"} if gathers else {}),
                {"A": width, "ADD": add, **({} if gathers else {"source": None})},
                "B" if width % 16 == 0 else "",
                PIECE=ring.NARROW if add else ring.PIECE,
            )
            for gathers in (True, False)
            for width, out, add in (
                (2048, "*bf16", False),
                (2048, "*bf16", True),
                (2048, "*fp32", False),
                (2048, "*fp32", True),
                (2056, "*bf16", False),
            )
        ),
    ]


def of_the_activation() -> list[Request]:
    """Of widths that a tile divides, and not."""
    m, k, n = tiles.ROWS, tiles.STEP, activation.WIDTH
    return [
        request(
            "activation:swiglu_backward_gemm",
            {"rows": block(m, k), "w": block(n, k), "h": block(m, ring.NARROW), "weight": "*fp32", "slot": "*i32"}
            | {"dh": "*bf16", "a": "*bf16", "gate_part": "*fp32", "one": "fp32"}
            | TILED,
            {"D": hidden, "F": width, "GROUPS": activation.GROUPS, "SLOTS": activation.SLOTS},
            "",
            4,
            N=n,
            STAGES=activation.STAGES,
            PIECE=ring.NARROW,
        )
        for hidden, width in ((2048, 1408), (2056, 200), (7168, 2048))
    ]


def test_products_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three programs' registers are divided anew: those that multiply have more than 224 of a thread."""
    found = aot.compile_all(requests(), tmp_path_factory.mktemp("triton"), targets=[90])
    said = [problem for each in found for problem in each.problems(tensor_cores=True)]
    for each in found:
        own = max(int(number) for number in re.findall(r"setmaxnreg\.dec\.sync\.aligned\.u32\s+(\d+)", each.ptx))
        products = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", each.ptx))
        if each.mma or each.atomics or each.scratch or own < 224 or products != {"256"}:
            said.append(f"{each.kernel}: {each.mma} old products, {own} registers, products of {products} columns")
    assert said == []


def test_the_activation_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four groups' registers are divided anew: both groups of warps that multiply have 232 of a thread."""
    found = aot.compile_all(of_the_activation(), tmp_path_factory.mktemp("triton"), targets=[90])
    for each in found:
        assert each.problems(tensor_cores=True) == []
        assert (each.mma, each.atomics, each.scratch) == (0, 0, 0)
        assert each.registers <= 168, "three groups of 4 warps share a multiprocessor's registers at the launch"
        assert re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32\s+(\d+)", each.ptx).count("232") >= 1
        products = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", each.ptx))
        # two groups of warps, two blocks of 64 rows each, four products a step
        assert products == {"128"} and each.wgmma == 2 * 2 * 4


def test_what_threads_read_is_fenced_before_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activation's kernel as it was before a GPU found other bits."""
    source = Path(str(activation.__file__)).read_text()
    fence = "            fence_async_shared()\n"
    assert source.count(fence) == 1
    (tmp_path / "activation_before.py").write_text(source.replace(fence, ""))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    before = attrs.evolve(of_the_activation()[0], kernel="activation_before:swiglu_backward_gemm_kernel")
    (found,) = aot.compile_all([before], tmp_path / "triton", targets=[90])
    assert len(found.unfenced) == 4, "gate and value of each group of warps"
    assert "read by threads, given back to TMA without fence_async_shared" in found.problems()[0]
