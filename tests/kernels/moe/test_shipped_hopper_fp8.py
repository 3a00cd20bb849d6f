"""The fp8 products for Hopper, compiled ahead of time: fp8 tensor cores, enough registers, and no spills."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from nmoe.effects.kernels.moe.hopper import fp8_gemm, fp8_ring
from tests.kernels import aot
from tests.kernels.aot import Request


def block(rows: int) -> str:
    """A descriptor of codes, with the layout that a block of it has in shared memory: rows of 128 bytes."""
    return f"tensordesc<fp8e4nv[{rows}, 128],NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)>"


def request(kernel: str, types: Mapping[str, str], sizes: str, **constants: int) -> Request:
    types = {**types, "tile_expert": "*i32", "tile_row": "*i32", "num_needed": "*i32", "end": "*i32", "ROWS": "i32"}
    return Request(
        kernel=f"nmoe.effects.kernels.moe.hopper.{kernel}_fp8_kernel",
        signature=types,
        constants={"GROUP": 8, "PROGRAMS": 132, "STAGES": fp8_ring.STAGES, **constants},
        aligned=[*(key for key, kind in types.items() if kind.startswith("*")), *sizes.split()],
        warps=4,
    )


def requests() -> list[Request]:
    weight = {"w": block(128), "w_scale": "*fp32"}
    return [
        request(
            "fp8_gemm:grouped_gemm",
            {"rows": block(fp8_ring.ROWS), "row_scale": "*fp32"}
            | {"w": block(fp8_gemm.COLUMNS), "w_scale": "*fp32", "out": "*bf16"}
            | dict.fromkeys(("INNER", "OUTER", "STEP_IN", "STEP_OUT"), "i32"),
            "INNER OUTER",
        ),
        request(
            "fp8_up:gather_gemm_swiglu",
            {"x": "*fp8e4nv", "x_scale": "*fp32", "source": "*i32", **weight, "h": "*bf16"}
            | {"a_codes": "*fp8e4nv", "a_scale": "*fp32"}
            | dict.fromkeys(("ROW", "SCALES", "F", "D"), "i32"),
            "ROW F D",
        ),
    ]


def loops(sass: str) -> list[str]:
    """The text of each innermost loop that multiplies, up to the jump that begins it anew if there is a step left."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?;)", sass, re.MULTILINE)]
    found: list[tuple[int, int]] = []
    for at, text in lines:
        jump = re.search(r"^@\S+ BRA(?:\.\w+)*\s+(?:!?U?P\w+, )?0x([0-9a-f]+)", text)
        if jump and (to := int(jump[1], 16)) < at:
            found.append((to, at))
    inside = {pair: "\n".join(text for at, text in lines if pair[0] <= at <= pair[1]) for pair in found}
    multiply = {pair: text for pair, text in inside.items() if "GMMA" in text}
    return [
        text
        for (start, stop), text in multiply.items()
        if not any((a, b) != (start, stop) and start <= a and b <= stop for a, b in multiply)
    ]


def test_fp8_products_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Registers are divided anew: both groups of warps that multiply have 232 of a thread."""
    found = aot.compile_all(requests(), tmp_path_factory.mktemp("triton"), targets=[90])
    for each in found:
        name = each.kernel.partition(":")[2].removesuffix("_fp8_kernel")
        assert each.problems(tensor_cores=True) == []
        assert (each.mma, each.atomics, each.scratch) == (0, 0, 0), name
        assert each.registers <= 168, "three groups of 4 warps share a multiprocessor's registers at the launch"
        assert re.findall(r"setmaxnreg\.inc\.sync\.aligned\.u32\s+(\d+)", each.ptx).count("232") >= 1, name
        products = [line for line in each.ptx.splitlines() if "wgmma.mma_async" in line]
        assert products and all("m64n128k32.f32.e4m3.e4m3" in line for line in products), name
        # two groups of warps, two blocks each, four products a block
        assert each.wgmma == 2 * 2 * 4, name
        inner = loops(each.sass)
        assert len(inner) == 2 and not any(re.search(r"\b(LDL|STL)\b", text) for text in inner), name
