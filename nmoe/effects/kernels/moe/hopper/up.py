"""The up-projection, which gathers its tokens, with SwiGLU as epilogue."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.tiles import COLUMNS, ROWS, STAGES, STEP, swizzle
from nmoe.effects.kernels.ring import PIECE, SWIZZLED, claim, filled, free, halves, ring


@gluon.jit
def _load_up(
    x, source, w, tile_expert, tile_row, end, num_m, columns, F, a_buf, b_buf, full, empty, D: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    inner = gl.arange(0, K, layout=gl.SliceLayout(0, layout))
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        row = gl.load(tile_row + tile) + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        token = gl.load(source + row, mask=row < gl.load(end + expert), other=0).to(gl.int64)
        address = x + token[:, None] * D + inner[None, :]
        for k in range(0, D, K):
            stage, ready = claim(full, empty, step, 2 * K * N * 2, STAGES)
            # gate beside value, as the tensor cores take a tile of twice the width: 4 boxes of 64 columns in a row
            tma.async_copy_global_to_shared(w, [expert * D + k, column * N], ready, b_buf.index(2 * stage))
            tma.async_copy_global_to_shared(w, [expert * D + k, F + column * N], ready, b_buf.index(2 * stage + 1))
            if D % K == 0:
                async_copy.async_copy_global_to_shared(a_buf.index(stage), address + k)
            else:
                # beyond the last column of x the descriptor reads the next expert's weights, which meet zeros
                async_copy.async_copy_global_to_shared(a_buf.index(stage), address + k, mask=inner[None, :] < D - k)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _store_up(gate, value, h, a, first, last, column, F, PIECE: gl.constexpr):
    """Epilogue: gate and value, rounded, and SwiGLU of what was rounded."""
    M: gl.constexpr = gate.shape[0]
    N: gl.constexpr = gate.shape[1]
    if N > PIECE:
        gates, values = halves(gate), halves(value)
        _store_up(gates[0], values[0], h, a, first, last, column, F, PIECE)
        _store_up(gates[1], values[1], h, a, first, last, column + N // 2, F, PIECE)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [8, 1], [1, 0])
        gate = gl.convert_layout(gate.to(gl.bfloat16), layout)
        value = gl.convert_layout(value.to(gl.bfloat16), layout)
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        f = column + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
        inside = (row < last)[:, None] & (f < F)[None, :]
        here = h + row.to(gl.int64)[:, None] * (2 * F) + f[None, :]
        gl.store(here, gate, mask=inside)
        gl.store(here + F, value, mask=inside)
        gate, value = gate.to(gl.float32), value.to(gl.float32)
        activation = gate * (1 / (1 + gl.exp(-gate))) * value
        gl.store(a + row.to(gl.int64)[:, None] * F + f[None, :], activation.to(gl.bfloat16), mask=inside)


@gluon.jit
def _multiply_up(
    h, a, tile_expert, tile_row, end, num_m, columns, F, a_buf, b_buf, full, empty, D: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 2 * N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        acc = gl.zeros((M, 2 * N), gl.float32, mma)
        for k in range(0, D, K):
            stage = filled(full, step, STAGES)
            fence_async_shared()  # what single threads copied is seen by the tensor cores
            acc = warpgroup_mma(a_buf.index(stage), b_buf.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            free(empty, step, STAGES, k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        free(empty, step, STAGES)
        gate, value = halves(acc)
        _store_up(gate, value, h, a, first, last, column * N, F, PIECE)


@gluon.jit
def gather_gemm_swiglu_kernel(
    x, source, w, h, a, tile_expert, tile_row, num_needed, end, F, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], w.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, 2 * N], w.layout)
    sides = b_buf._reinterpret(gl.bfloat16, [2 * STAGES, K, N], w.layout)
    full, empty = ring(STAGES, 1 + 128)
    num_m = gl.load(num_needed)
    columns = gl.cdiv(F, N)
    gl.warp_specialize(
        [
            (_multiply_up, (h, a, tile_expert, tile_row, end, num_m, columns, F, a_buf, b_buf, full, empty, D,
                            M, N, K, GROUP, PROGRAMS, STAGES, PIECE)),
            (_load_up, (x, source, w, tile_expert, tile_row, end, num_m, columns, F, a_buf, sides, full, empty, D,
                        M, N, K, GROUP, PROGRAMS, STAGES)),
        ],
        [4],
        [56],
    )  # fmt: skip


def gather_gemm_swiglu(
    x: Tensor, source: Tensor, weight: Tensor, end: Tensor, tiles: RowTiles, group: int, programs: int
) -> tuple[Tensor, Tensor]:
    """`experts.gather_gemm_swiglu` of a plain SwiGLU: pre-activation [P 2 F] and activation [P F].

    tiles     of `ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    """
    experts, d, _, f = weight.shape
    h = torch.empty(source.shape[0], 2, f, dtype=x.dtype, device=x.device)
    a = torch.empty(source.shape[0], f, dtype=x.dtype, device=x.device)
    width = COLUMNS // 2
    started = min(programs, tiles.expert.shape[0] * triton.cdiv(f, width))
    gather_gemm_swiglu_kernel[(started,)](
        x, source, TensorDescriptor.from_tensor(weight.view(experts * d, 2 * f), [STEP, width], SWIZZLED), h, a,
        tiles.expert, tiles.row, tiles.needed, end, f, d, ROWS, width, STEP, group, started, STAGES, PIECE, num_warps=8,
    )  # fmt: skip
    return h, a
