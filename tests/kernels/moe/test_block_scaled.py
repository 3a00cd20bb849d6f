"""The block-scaled grouped GEMM: native products on sm_100, and in the interpreter those of the codes.

The interpreter has no `tl.dot_scaled`; one written with the pure formats stands in for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.moe import block_scaled
from nmoe.effects.kernels.moe import dispatch as places
from nmoe.pure.formats import mxfp8, nvfp4
from tests.kernels import aot
from tests.kernels.aot import Request

E, N, K, INNER, OUTER = 4, 30, 2, 256, 96
INSTRUCTION = {"e4m3": "kind::mxf8f6f4.block_scale", "e2m1": "kind::mxf4nvf4.block_scale"}


def of(codes: Any, scale: Any, kind: str) -> Tensor:
    """Values of a block that a kernel loaded: codes [R C] and their scales."""
    data, scales = torch.from_numpy(codes.handle.data.copy()), torch.from_numpy(scale.handle.data.copy())
    if kind == "e4m3":
        return mxfp8.dequantise(data.view(torch.float8_e4m3fn), scales)
    return nvfp4.dequantise(data, scales.view(torch.float8_e4m3fn), torch.ones(()))


def dot_scaled(a: Any, a_scale: Any, a_kind: str, b: Any, b_scale: Any, b_kind: str, acc: Any) -> Any:
    rows, columns = of(a, a_scale, a_kind), of(tl.trans(b), b_scale, b_kind)
    product = acc.handle.data + (rows @ columns.T).numpy().astype(np.float32)
    return tl.tensor(TensorHandle(product, tl.float32), acc.type)


@pytest.mark.parametrize("kind", INSTRUCTION)
def test_products_are_those_of_the_codes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "dot_scaled", dot_scaled)
    generator = torch.Generator().manual_seed(0)
    expert = torch.rand(N, E - 1, generator=generator).argsort(-1)[:, :K]  # the last expert has no row
    at = places.dispatch(expert, E)
    m, n, k = 16, 32, 128
    tiles = places.tiles(at.count, N * K, m)
    x, w = torch.randn(N * K, INNER, generator=generator), torch.randn(E, OUTER, INNER, generator=generator)
    if kind == "e4m3":
        (codes, scale), (w_codes, w_scale) = mxfp8.quantise(x), mxfp8.quantise(w)
        factor, w_factor = torch.ones(()), torch.ones(E)
        rows, weights = mxfp8.dequantise(codes, scale), mxfp8.dequantise(w_codes, w_scale)
    else:
        (codes, scale, factor), (w_codes, w_scale, w_factor) = nvfp4.quantise(x), nvfp4.quantise(w, rows=1)
        rows, weights = nvfp4.dequantise(codes, scale, factor), nvfp4.dequantise(w_codes, w_scale, w_factor)
        scale, w_scale = scale.view(torch.uint8), w_scale.view(torch.uint8)
    out = torch.empty(N * K, OUTER)
    width = k if kind == "e4m3" else k // 2
    launch: Any = block_scaled.grouped_gemm_scaled_kernel
    launch[(tiles.expert.shape[0] * triton.cdiv(OUTER, n),)](
        TensorDescriptor.from_tensor(codes.view(torch.uint8), [m, width]), scale, factor.view(-1),
        TensorDescriptor.from_tensor(w_codes.view(torch.uint8).view(E * OUTER, -1), [n, width]), w_scale, w_factor,
        out, tiles.expert, tiles.row, at.end, tiles.expert.shape[0], INNER, OUTER, kind, m, n, k, 2,
    )  # fmt: skip
    owner = torch.arange(E).repeat_interleave(at.count)
    wanted = torch.einsum("pi,poi->po", rows.double(), weights.double()[owner])
    assert ((out - wanted).norm() / wanted.norm()).item() < 1e-6


def test_nothing_that_runs_multiplies_so() -> None:
    """On sm_90 Triton compiles NVFP4's products to wrong numbers: who calls this kernel has to ask for sm_100 first."""
    package = Path(block_scaled.__file__).parents[3]
    sources = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in sources.items() if "dot_scaled" in text] == ["block_scaled.py"]
    assert not [
        name for name, text in sources.items() if "import block_scaled" in text or "block_scaled import" in text
    ]


def request(kind: str) -> Request:
    """The product as sm_100 gets it."""
    four = kind == "e2m1"
    element, scale, width = ("u8", "*fp8e4nv", 64) if four else ("fp8e4nv", "*u8", 128)
    block = f"tensordesc<{element}[128,{width}]>"
    types = {"rows": block, "row_scale": scale, "w": block, "w_scale": scale, "out": "*bf16", "tile_expert": "*i32"}
    types |= {"tile_row": "*i32", "end": "*i32", "NUM_M": "i32", "INNER": "i32", "OUTER": "i32"}
    constants: dict[str, Any] = {"FORMAT": kind, "M": 128, "N": 128, "K": 128, "GROUP": 8}
    factors = ("row_factor", "w_factor")
    types |= dict.fromkeys(factors, "*fp32") if four else {}
    constants |= {} if four else dict.fromkeys(factors)
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return Request(
        kernel="nmoe.effects.kernels.moe.block_scaled:grouped_gemm_scaled_kernel",
        signature=types,
        constants=constants,
        aligned=[*pointers, "INNER", "OUTER"],
        warps=4,
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", INSTRUCTION)
def test_sm_100_multiplies_it_natively(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    (made,) = aot.compile_all([request(kind)], tmp_path_factory.mktemp("triton"), targets=[100])
    assert made.problems(tensor_cores=True) == [] and made.mma == 0
    products = [line for line in made.ptx.splitlines() if "tcgen05.mma" in line]
    assert products and all(INSTRUCTION[kind] in line for line in products)
