"""A grouped GEMM."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.ring import (
    COLUMNS,
    PIECE,
    ROWS,
    STAGES,
    STEP,
    SWIZZLED,
    claim,
    filled,
    free,
    ring,
    store,
    swizzle,
)


@gluon.jit
def _load_product(
    rows, w, tile_expert, tile_row, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty, TRANSPOSED: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, INNER, K):
            stage, ready = claim(full, empty, step, (M + N) * K * 2, STAGES)
            tma.async_copy_global_to_shared(rows, [first, k], ready, a_buf.index(stage))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(w, [expert * OUTER + column * N, k], ready, b_buf.index(stage))
            else:
                tma.async_copy_global_to_shared(w, [expert * INNER + k, column * N], ready, b_buf.index(stage))
            step += 1


@gluon.jit
def _multiply_product(
    out, tile_expert, tile_row, end, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty, TRANSPOSED: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        acc = gl.zeros((M, N), gl.float32, mma)
        for k in range(0, INNER, K):
            stage = filled(full, step, STAGES)
            b = b_buf.index(stage)
            acc = warpgroup_mma(a_buf.index(stage), b.permute((1, 0)) if TRANSPOSED else b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            free(empty, step, STAGES, k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        free(empty, step, STAGES)
        store(acc, out, first, last, column * N, OUTER, False, PIECE)


@gluon.jit
def grouped_gemm_kernel(
    rows, w, out, tile_expert, tile_row, num_needed, end, INNER, OUTER, TRANSPOSED: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], rows.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, K] if TRANSPOSED else [STAGES, K, N], w.layout)
    full, empty = ring(STAGES, 1)
    num_m = gl.load(num_needed)
    columns = gl.cdiv(OUTER, N)
    gl.warp_specialize(
        [
            (_multiply_product, (out, tile_expert, tile_row, end, num_m, columns, INNER, OUTER, a_buf, b_buf, full,
                                 empty, TRANSPOSED, M, N, K, GROUP, PROGRAMS, STAGES, PIECE)),
            (_load_product, (rows, w, tile_expert, tile_row, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty,
                             TRANSPOSED, M, N, K, GROUP, PROGRAMS, STAGES)),
        ],
        [1],
        [40],
    )  # fmt: skip


def grouped_gemm(
    rows: Tensor, weight: Tensor, end: Tensor, tiles: RowTiles, group: int, programs: int, *, transposed: bool
) -> Tensor:
    """`experts.grouped_gemm`.

    tiles     of `ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    """
    inner = rows.shape[1]
    outer = weight.shape[1] if transposed else weight.shape[2]
    out = torch.empty(rows.shape[0], outer, dtype=rows.dtype, device=rows.device)
    block = [COLUMNS, STEP] if transposed else [STEP, COLUMNS]
    started = min(programs, tiles.expert.shape[0] * triton.cdiv(outer, COLUMNS))
    grouped_gemm_kernel[(started,)](
        TensorDescriptor.from_tensor(rows, [ROWS, STEP], SWIZZLED),
        TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), block, SWIZZLED),
        out, tiles.expert, tiles.row, tiles.needed, end, inner, outer, transposed, ROWS, COLUMNS, STEP, group, started,
        STAGES, PIECE, num_warps=8,
    )  # fmt: skip
    return out
