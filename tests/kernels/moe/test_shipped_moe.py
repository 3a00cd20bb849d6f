"""The mixture's kernels with the tiles that ship, compiled ahead of time: tensor cores, no spills, no atomics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from nmoe.effects.kernels import tables as tuning
from nmoe.effects.kernels.tables import GemmTile
from tests.kernels import aot
from tests.kernels.aot import Compiled, Request
from tests.kernels.shipped import SAME

CAPABILITY = {90: (9, 0), 100: (10, 0)}

TILED = {"NUM_M": "i32", "tile_expert": "*i32", "tile_row": "*i32", "end": "*i32"}
"""What every kernel over tiles of rows takes."""


HERE = {"to": None, "at": None, "addresses": None}
"""Of a grouped GEMM whose rows stay with this rank."""

AWAY = {"to": "*i32", "at": "*i32", "addresses": "*i64", "OFFSET": "i64"}
"""Of one whose rows go to others."""


def block(rows: int, columns: int) -> str:
    return f"tensordesc<bf16[{rows},{columns}]>"


def requests(target: int, hidden: int = 2048, width: int = 1408) -> list[Request]:
    """The five kernels: rows that stay and that leave, gradients into arenas of both formats."""
    entry = tuning.find(tuning.load(CAPABILITY[target]), "moe", hidden, width)

    def request(
        name: str,
        tile: GemmTile,
        types: dict[str, str],
        constants: dict[str, Any],
        aligned: str,
        same: Mapping[str, str] | None = None,
    ) -> Request:
        sizes = {"M": tile.block_m, "N": tile.block_n, "K": tile.block_k, "GROUP": entry.group, **constants}
        pointers = [key for key, kind in types.items() if kind.startswith("*")]
        return Request(
            kernel=f"nmoe.effects.kernels.moe.experts:{name}_kernel",
            signature=types,
            constants=sizes,
            aligned=[*pointers, *aligned.split()],
            warps=tile.num_warps,
            stages=tile.num_stages,
            same=same or {},
        )

    up, down, back = entry.tiles["up"], entry.tiles["down"], entry.tiles["activation"]
    dx, dup = entry.tiles["input"], entry.tiles["up_gradient"]
    return [
        request(
            "gather_gemm_swiglu",
            up,
            {
                "x": "*bf16",
                "source": "*i32",
                "w": block(up.block_k, up.block_n),
                "h": "*bf16",
                "a": "*bf16",
                **TILED,
                "F": "i32",
            },
            {"D": hidden, "bias": None, "LIMIT": None, "ALPHA": 1.0},
            "F",
        ),
        *(
            request(
                "grouped_gemm",
                tile,
                {"rows": block(tile.block_m, tile.block_k), "w": block(*sides), **TILED, **leaving}
                | {"INNER": "i32", "OUTER": "i32"},
                {"TRANSPOSED": transposed, **(HERE if "out" in leaving else {"out": None})},
                "INNER OUTER" if "out" in leaving else "INNER OUTER OFFSET",
            )
            for leaving in ({"out": "*bf16", "OFFSET": "i32"}, AWAY)
            for tile, sides, transposed in (
                (down, (down.block_k, down.block_n), False),
                (dx, (dx.block_n, dx.block_k), True),
            )
        ),
        request(
            "swiglu_backward_gemm",
            back,
            {
                "rows": block(back.block_m, back.block_k),
                "w": block(back.block_n, back.block_k),
                "h": "*bf16",
                "weight": "*fp32",
            }
            | {
                "slot": "*i32",
                "dh": "*bf16",
                "a": "*bf16",
                "gate_part": "*fp32",
                "tile_expert": "*i32",
                "tile_row": "*i32",
            }
            | {"num_needed": "*i32", "end": "*i32", "F": "i32", "D": "i32"},
            {"PROGRAMS": 132, "LIMIT": None, "ALPHA": 1.0},
            "F D",
        ),
        *(
            request(
                "grouped_weight_gradient",
                tile,
                {"a": block(tile.block_k, tile.block_m), "b": block(tile.block_k, tile.block_n), "b_rows": "*bf16"}
                | {"out": out, "end": "*i32", "count": "*i32", "A": "i32", "B": "i32"}
                | ({} if tile is dup else {"a": "*bf16", "source": "*i32"}),
                {"ADD": add, **({"source": None} if tile is dup else {})},
                "A B",
                SAME["moe.experts:grouped_weight_gradient_kernel"],
            )
            for tile in (dup, *([entry.tiles["gathered"]] if "gathered" in entry.tiles else []))
            for out, add in (("*bf16", False), ("*bf16", True), ("*fp32", False), ("*fp32", True))
        ),
        *(
            attrs.evolve(
                request(
                    "persistent_gemm",
                    tile,
                    {
                        "rows": block(tile.block_m, tile.block_k),
                        "w": block(*sides),
                        "out": "*bf16",
                        "num_needed": "*i32",
                    }
                    | {key: kind for key, kind in TILED.items() if key != "NUM_M"}
                    | {"INNER": "i32", "OUTER": "i32"},
                    {"TRANSPOSED": transposed, "PROGRAMS": 132},
                    "INNER OUTER",
                ),
                kernel="nmoe.effects.kernels.moe.persistent:persistent_gemm_kernel",
            )
            for tile, sides, transposed in (
                (down, (down.block_k, down.block_n), False),
                (dx, (dx.block_n, dx.block_k), True),
            )
        ),
    ]


def problems(found: Sequence[Compiled], *, spills: int = 0) -> list[str]:
    """What would make a kernel slow or its sums depend on chance."""
    said = [problem for each in found for problem in each.problems(spills=spills, tensor_cores=True)]
    for each in found:
        if each.mma or each.atomics or each.scratch:
            at = f"{each.kernel} on sm_{each.target}"
            said.append(f"{at}: {each.mma} old products, {each.atomics} atomics, {each.scratch} bytes of scratch")
    return said


def clamped(target: int) -> list[Request]:
    """The two of these kernels that know of biases and a clamp, with both."""
    changed = {"gather_gemm_swiglu_kernel": {"bias": "*bf16"}, "swiglu_backward_gemm_kernel": {}}
    return [
        attrs.evolve(
            each,
            signature={**each.signature, **changed[name]},
            constants={key: value for key, value in each.constants.items() if key != "bias"}
            | {"LIMIT": 7.0, "ALPHA": 1.702},
            aligned=[*(each.aligned or ()), *changed[name]],
        )
        for each in requests(target)
        if (name := each.kernel.partition(":")[2]) in changed
    ]


def test_biases_and_a_clamp(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On sm_90: the gradient has 12 spills with Triton 3.6, none with 3.7; its 64 on sm_100 are open."""
    wanted = clamped(90)
    assert len(wanted) == 2
    assert problems(aot.compile_all(wanted, tmp_path_factory.mktemp("triton"), targets=[90]), spills=12) == []


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (90, (2048, 1408)),
        (90, (768, 384)),
        pytest.param(100, (2048, 1408), marks=pytest.mark.long),
        pytest.param(100, (768, 384), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_products_of_the_experts(tmp_path_factory: pytest.TempPathFactory, target: int, size: tuple[int, int]) -> None:
    compiled = aot.compile_all(requests(target, *size), tmp_path_factory.mktemp("triton"), targets=[target])
    assert problems(compiled) == []
