"""A grouped GEMM of codes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.fp8_ring import CODES, ROWS, STAGES, multiply, tile_at
from nmoe.effects.kernels.moe.hopper.tiles import swizzle
from nmoe.effects.kernels.ring import claim, filled, ring, store

COLUMNS = 256
"""Of a tile: two blocks, a product of 64 x 128 each for either group of warps."""


@gluon.jit
def _load_rows(
    rows, w, tile_expert, tile_row, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty, GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, INNER, 128):
            stage, ready = claim(full, empty, step, (128 + 256) * 128, STAGES)
            tma.async_copy_global_to_shared(rows, [first, k], ready, a_buf.index(stage))
            tma.async_copy_global_to_shared(w, [expert * OUTER + column * 256, k], ready, b_buf.index(stage))
            step += 1


@gluon.jit
def _first_scales(
    row_scale, w_scale, expert, first, column, ROWS, steps, blocks, STEP_OUT, mma: gl.constexpr,
):  # fmt: skip
    """Of a tile's first step: of 64 rows, the next expert's too, whose results are not stored, and of both blocks."""
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    base = w_scale + expert.to(gl.int64) * blocks * steps
    share = gl.load(row_scale + row * steps, mask=row < ROWS, other=0.0)
    right = gl.minimum(column * 2 + 1, blocks - 1)  # beyond an odd number of blocks there is none
    return share, gl.load(base + column * 2 * STEP_OUT), gl.load(base + right * STEP_OUT)


@gluon.jit
def _multiply_rows(
    row_scale, w_scale, out, tile_expert, tile_row, end, num_m, columns, ROWS, INNER, OUTER, STEP_IN, STEP_OUT,
    a_part, b_part, full, empty, PART: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """a_part [2 STAGES, 64 128], b_part [2 STAGES, 128 128]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    steps = INNER // 128
    blocks = OUTER // 128
    step = 0
    expert, first, column = tile_at(gl.program_id(0), tile_expert, tile_row, num_m, columns, GROUP)
    last = gl.load(end + expert)
    share, of_left, of_right = _first_scales(
        row_scale, w_scale, expert, first + PART * 64, column, ROWS, steps, blocks, STEP_OUT, mma
    )
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        next_expert, next_first, next_column = tile_at(pid + PROGRAMS, tile_expert, tile_row, num_m, columns, GROUP)
        row = first + PART * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        real = row < ROWS
        share_at = row * steps
        base = w_scale + expert.to(gl.int64) * blocks * steps
        left_at = base + column * 2 * STEP_OUT
        right_at = base + gl.minimum(column * 2 + 1, blocks - 1) * STEP_OUT
        left = gl.zeros((64, 128), gl.float32, mma)
        right = gl.zeros((64, 128), gl.float32, mma)
        for k in range(0, steps):
            stage = filled(full, step, STAGES)
            a = a_part.index(stage * 2 + PART)
            part = multiply(a, b_part.index(stage * 2))
            # scales a step ahead, while the tensor cores work
            then = gl.minimum(k + 1, steps - 1)
            next_share = gl.load(row_scale + (share_at + then), mask=real, other=0.0)
            next_left = gl.load(left_at + then * STEP_IN)
            next_right = gl.load(right_at + then * STEP_IN)
            part = warpgroup_mma_wait(0, deps=(part,))
            # Always true, which ptxas does not know: it would begin the next product before this one's sums are added,
            # and then has no registers left (80 to 480 spill instructions).
            if then < INNER:
                left += part * (share * of_left)[:, None]
            part = multiply(a, b_part.index(stage * 2 + 1))
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            if then < INNER:
                right += part * (share * of_right)[:, None]
            share, of_left, of_right = next_share, next_left, next_right
            step += 1
        next_last = gl.load(end + next_expert)
        share, of_left, of_right = _first_scales(
            row_scale, w_scale, next_expert, next_first + PART * 64, next_column, ROWS, steps, blocks, STEP_OUT, mma
        )
        store(left, out, first + PART * 64, last, column * 256, OUTER, False, 128)
        store(right, out, first + PART * 64, last, column * 256 + 128, OUTER, False, 128)
        expert, first, column, last = next_expert, next_first, next_column, next_last


@gluon.jit(do_not_specialize=["ROWS", "STEP_IN", "STEP_OUT"])
def grouped_gemm_fp8_kernel(
    rows, row_scale, w, w_scale, out, tile_expert, tile_row, num_needed, end, ROWS, INNER, OUTER, STEP_IN, STEP_OUT,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], rows.layout)
    b_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 256, 128], w.layout)
    a_part = a_buf._reinterpret(gl.float8e4nv, [STAGES * 2, 64, 128], rows.layout)
    b_part = b_buf._reinterpret(gl.float8e4nv, [STAGES * 2, 128, 128], w.layout)
    full, empty = ring(STAGES, 1, READERS=2)
    num_m = gl.load(num_needed)
    columns = gl.cdiv(OUTER, 256)
    gl.warp_specialize(
        [
            (_multiply_rows, (row_scale, w_scale, out, tile_expert, tile_row, end, num_m, columns, ROWS, INNER, OUTER,
                              STEP_IN, STEP_OUT, a_part, b_part, full, empty, 0, GROUP, PROGRAMS, STAGES)),
            (_multiply_rows, (row_scale, w_scale, out, tile_expert, tile_row, end, num_m, columns, ROWS, INNER, OUTER,
                              STEP_IN, STEP_OUT, a_part, b_part, full, empty, 1, GROUP, PROGRAMS, STAGES)),
            (_load_rows, (rows, w, tile_expert, tile_row, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty,
                          GROUP, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def grouped_gemm(
    rows: Tensor, row_scale: Tensor, w: Tensor, w_scale: Tensor, end: Tensor, tiles: RowTiles, group: int,
    programs: int, dtype: torch.dtype, *, across: bool,
) -> Tensor:  # fmt: skip
    """`fp8.grouped_gemm`, the same bits: out[p] = rows[p] @ w[expert of p].T.

    rows     [P I] e4m3, row_scale [P I/128] f32
    w        [E O I] e4m3
    w_scale  [E O/128 I/128] f32, or [E I/128 O/128] if `across`
    tiles    of `fp8_ring.ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    returns  [P O] in `dtype`
    """
    experts, outer, inner = w.shape
    out = torch.empty(rows.shape[0], outer, dtype=dtype, device=rows.device)
    step_in, step_out = (outer // 128, 1) if across else (1, inner // 128)
    started = min(programs, tiles.expert.shape[0] * triton.cdiv(outer, COLUMNS))
    grouped_gemm_fp8_kernel[(started,)](
        TensorDescriptor.from_tensor(rows, [ROWS, 128], CODES), row_scale,
        TensorDescriptor.from_tensor(w.view(experts * outer, inner), [COLUMNS, 128], CODES), w_scale,
        out, tiles.expert, tiles.row, tiles.needed, end, rows.shape[0], inner, outer, step_in, step_out,
        group, started, STAGES, num_warps=4,
    )  # fmt: skip
    return out
