"""The fp8 kernels of the experts with the tiles that ship, compiled ahead of time: fp8 tensor cores, no spills."""

from __future__ import annotations

from typing import Any

import pytest

from nmoe.effects.kernels.moe import fp8, moe_fp8
from tests.kernels import aot
from tests.kernels.aot import Request
from tests.kernels.moe.test_shipped_moe import AWAY, HERE

TILED = {"tile_expert": "*i32", "tile_row": "*i32", "end": "*i32", "NUM_M": "i32"}
BLOCK = f"tensordesc<fp8e4nv[{fp8.BLOCK},{fp8.BLOCK}]>"


def request(
    name: str, types: dict[str, str], constants: dict[str, Any], sizes: str, warps: int, stages: int
) -> Request:
    pointers = [key for key, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel=f"nmoe.effects.kernels.moe.fp8:{name}_kernel",
        signature=types,
        constants=constants,
        aligned=[*pointers, *sizes.split()],
        warps=warps,
        stages=stages,
    )


def product(name: str, tile: fp8.Tile, types: dict[str, str], sizes: str, **constants: Any) -> Request:
    constants = {"M": tile.block_m, "GROUP": 8, **constants}
    return request(f"{name}_fp8", types | TILED, constants, sizes, tile.num_warps, tile.num_stages)


def products() -> list[Request]:
    operands = {"source": "*i32", "w": BLOCK, "w_scale": "*fp32", "h": "*bf16"}
    return [
        product(
            "gather_gemm_swiglu",
            moe_fp8.UP,
            {"x": "*fp8e4nv", "x_scale": "*fp32", **operands, "a_codes": "*u8", "a_scale": "*fp32"}
            | {"CODES": "i32", "SCALES": "i32", "F": "i32", "D": "i32"},
            "CODES SCALES F D",
        ),
        *(
            product(
                "grouped_gemm",
                tile,
                {"rows": f"tensordesc<fp8e4nv[{tile.block_m},{fp8.BLOCK}]>", "row_scale": "*fp32", "w": BLOCK}
                | {
                    "w_scale": "*fp32",
                    "out": "*bf16",
                    **leaving,
                    "INNER": "i32",
                    "OUTER": "i32",
                    "STEP_IN": "i32",
                    "STEP_OUT": "i32",
                },
                "INNER OUTER OFFSET" if "to" in leaving else "INNER OUTER",
                **({} if "to" in leaving else HERE),
            )
            for leaving in ({"OFFSET": "i32"}, AWAY)
            for tile in (moe_fp8.DOWN, moe_fp8.BACKWARD)
        ),
    ]


def passes() -> list[Request]:
    codes = {"codes": "*u8", "scale": "*fp32"}
    weight = {"w": "*bf16", **codes, "R": "i32", "C": "i32"}
    return [
        request(
            "gather_rows",
            {**codes, "source": "*i32", "total": "*i32", "out": "*u8", "out_scale": "*fp32", "D": "i32"},
            {"M": fp8.GATHERED, "N": 4 * fp8.BLOCK},
            "D",
            4,
            3,
        ),
        request(
            "swiglu_backward",
            {"da": "*bf16", "h": "*bf16", "weight": "*fp32", "slot": "*i32", "total": "*i32", "dh": "*bf16"}
            | {**codes, "gate_part": "*fp32", "F": "i32"},
            {"M": fp8.ACTIVATED},
            "F",
            4,
            3,
        ),
        *(
            request(
                "quantise_rows",
                {"x": "*bf16", **codes, **limit, "rows": "i32", "WIDTH": "i32", "CODES": "i32", "SCALES": "i32"},
                {"M": fp8.ROWS, **({} if limit else {"limit": None})},
                "WIDTH CODES SCALES",
                4,
                3,
            )
            for limit in ({}, {"limit": "*i32"})
        ),
        *(request("quantise_weight", weight, {"ACROSS": across}, "R C", 8, 3) for across in (False, True)),
    ]


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_products_are_on_the_fp8_tensor_cores(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    """wgmma of e4m3 by e4m3 on sm_90, and none that was widened to fp16; tcgen05 of 8 bits on sm_100."""
    for made in aot.compile_all(products(), tmp_path_factory.mktemp("triton"), targets=[target]):
        assert made.problems(tensor_cores=True) == []
        assert (made.mma, made.atomics, made.scratch) == (0, 0, 0)
        instructions = [line for line in made.ptx.splitlines() if "wgmma.mma_async" in line or "tcgen05.mma" in line]
        kind = "f32.e4m3.e4m3" if target == 90 else "kind::f8f6f4"
        assert instructions and all(kind in line for line in instructions), instructions[:2]


@pytest.mark.parametrize("target", [90, pytest.param(100, marks=pytest.mark.long)])
def test_passes_move_whole_words_and_spill_nothing(tmp_path_factory: pytest.TempPathFactory, target: int) -> None:
    for made in aot.compile_all(passes(), tmp_path_factory.mktemp("triton"), targets=[target]):
        assert made.problems() == [] and made.atomics == 0
        narrow = {"gather_rows": 8, "swiglu_backward": 6}.get(made.kernel.partition(":")[2].removesuffix("_kernel"), 2)
        assert made.wide >= 2 and made.narrow <= narrow, "all but scales and gates is read and written by 16 bytes"
