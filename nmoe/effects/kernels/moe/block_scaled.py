"""Grouped GEMM of MXFP8 and NVFP4 on the block-scaled tensor cores of sm_100.

Letters: P rows sorted by expert, E experts, I the axis summed over, O the axis of the result. Codes and scales are
those of `pure.formats.mxfp8` and `nvfp4`, both operands with I last. No other generation has such products: on sm_90
Triton widens MXFP8 to bf16, and compiles NVFP4 to wrong numbers or not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.moe.experts import _swizzle


@triton.jit
def grouped_gemm_scaled_kernel(
    rows, row_scale, row_factor, w, w_scale, w_factor, out, tile_expert, tile_row, end, NUM_M, INNER, OUTER,
    FORMAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # values a byte, and values a scale
    PACKED: tl.constexpr = tl.constexpr(2 if FORMAT == "e2m1" else 1)
    SHARED: tl.constexpr = tl.constexpr(16 if FORMAT == "e2m1" else 32)
    tile, column = _swizzle(tl.program_id(0), tl.cdiv(OUTER, N), NUM_M, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        first = tl.load(tile_row + tile)
        row = first + tl.arange(0, M)
        real = row < tl.load(end + expert)
        scales = INNER // SHARED
        inner = tl.arange(0, K // SHARED)
        row_at = row_scale + row.to(tl.int64)[:, None] * scales + inner[None, :]
        o = expert.to(tl.int64) * OUTER + column * N + tl.arange(0, N)
        w_at = w_scale + o[:, None] * scales + inner[None, :]
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, INNER // K):
            a = rows.load([first, k * (K // PACKED)])
            b = w.load([expert * OUTER + column * N, k * (K // PACKED)])
            a_scale = tl.load(row_at, mask=real[:, None], other=0.0)
            acc = tl.dot_scaled(a, a_scale, FORMAT, b.T, tl.load(w_at), FORMAT, acc)
            row_at += K // SHARED
            w_at += K // SHARED
        if FORMAT == "e2m1":
            acc = acc * (tl.load(row_factor) * tl.load(w_factor + expert))
        at = row.to(tl.int64)[:, None] * OUTER + (column * N + tl.arange(0, N))[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=real[:, None])
