"""The gradient of SwiGLU as epilogue of the product before it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.ring import (
    NARROW,
    STAGES,
    STEP,
    SWIZZLED,
    claim,
    filled,
    free,
    halves,
    ring,
    swizzle,
)

ROWS, COLUMNS = 256, 128
"""Of a tile: the width of an expert is seldom a multiple of 256."""

THIN = gl.NVMMASharedLayout(swizzle_byte_width=2 * NARROW, element_bitwidth=16, rank=2)


@gluon.jit
def _load_activation(
    rows, w, h, tile_expert, tile_row, num_m, columns, F, D, a_buf, b_buf, h_buf, full, empty, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, D, K):
            stage, ready = claim(full, empty, step, (M + N) * K * 2, STAGES)
            tma.async_copy_global_to_shared(rows, [first, k], ready, a_buf.index(stage))
            tma.async_copy_global_to_shared(w, [expert * F + column * N, k], ready, b_buf.index(stage))
            step += 1
        # what the epilogue reads comes through the same stages, before it is asked for
        for n in range(column * N, column * N + N, PIECE):
            stage, ready = claim(full, empty, step, 2 * M * PIECE * 2, STAGES)
            tma.async_copy_global_to_shared(h, [first, n], ready, h_buf.index(stage * (K // PIECE)))
            tma.async_copy_global_to_shared(h, [first, F + n], ready, h_buf.index(stage * (K // PIECE) + 1))
            step += 1


@gluon.jit
def _store_activation(
    da, share, dh, a, h_buf, full, empty, first, last, column, F, step, AT: gl.constexpr, STAGES: gl.constexpr,
    PER_STAGE: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Epilogue: gradient of SwiGLU on columns `AT` and more of a tile; the gate's gradient summed over them."""
    M: gl.constexpr = da.shape[0]
    N: gl.constexpr = da.shape[1]
    if N > PIECE:
        left, right = halves(da)
        part = _store_activation(
            left, share, dh, a, h_buf, full, empty, first, last, column, F, step, AT, STAGES, PER_STAGE, PIECE
        )
        part += _store_activation(
            right, share, dh, a, h_buf, full, empty, first, last, column, F, step, AT + N // 2, STAGES, PER_STAGE, PIECE
        )
    else:
        own: gl.constexpr = da.type.layout
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [8, 1], [1, 0])
        stage = filled(full, step + AT // PIECE, STAGES)
        gate = h_buf.index(stage * PER_STAGE).load(own).to(gl.float32)
        value = h_buf.index(stage * PER_STAGE + 1).load(own).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
        # beyond the width stands something else of h
        real = column + AT + gl.arange(0, N, layout=gl.SliceLayout(0, own)) < F
        value = gl.where(real[None, :], value, 0.0)
        sigmoid = 1 / (1 + gl.exp(-gate))
        silu = gate * sigmoid
        activation = silu * value
        part = gl.convert_layout(gl.sum(da * activation, 1), share.type.layout)
        weigh = gl.convert_layout(share, gl.SliceLayout(1, own))[:, None]
        da = da * weigh
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        f = column + AT + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
        inside = (row < last)[:, None] & (f < F)[None, :]
        here = dh + row.to(gl.int64)[:, None] * (2 * F) + f[None, :]
        d_gate = (da * value * (sigmoid + silu * (1 - sigmoid))).to(gl.bfloat16)
        gl.store(here, gl.convert_layout(d_gate, layout), mask=inside)
        gl.store(here + F, gl.convert_layout((da * silu).to(gl.bfloat16), layout), mask=inside)
        at = a + row.to(gl.int64)[:, None] * F + f[None, :]
        gl.store(at, gl.convert_layout((activation * weigh).to(gl.bfloat16), layout), mask=inside)
    return part


@gluon.jit
def _multiply_activation(
    weight, slot, dh, a, gate_part, tile_expert, tile_row, end, num_m, columns, F, D, a_buf, b_buf, h_buf, full, empty,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, mma))
        share = gl.load(weight + gl.load(slot + row, mask=row < last, other=0), mask=row < last, other=0.0)
        da = gl.zeros((M, N), gl.float32, mma)
        for k in range(0, D, K):
            stage = filled(full, step, STAGES)
            da = warpgroup_mma(a_buf.index(stage), b_buf.index(stage).permute((1, 0)), da, is_async=True)
            da = warpgroup_mma_wait(1, deps=(da,))
            free(empty, step, STAGES, k > 0)
            step += 1
        da = warpgroup_mma_wait(0, deps=(da,))
        free(empty, step, STAGES)
        part = _store_activation(
            da, share, dh, a, h_buf, full, empty, first, last, column * N, F, step, 0, STAGES, K // PIECE, PIECE
        )
        step += N // PIECE
        gl.store(gate_part + row * columns + column, part, mask=row < last)


@gluon.jit
def swiglu_backward_gemm_kernel(
    rows, w, h, weight, slot, dh, a, gate_part, tile_expert, tile_row, num_needed, end, F, D, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], rows.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, K], w.layout)
    h_buf = a_buf._reinterpret(gl.bfloat16, [STAGES * (K // PIECE), M, PIECE], h.layout)
    full, empty = ring(STAGES, 1)
    num_m = gl.load(num_needed)
    columns = gl.cdiv(F, N)
    gl.warp_specialize(
        [
            (_multiply_activation, (weight, slot, dh, a, gate_part, tile_expert, tile_row, end, num_m, columns, F, D,
                                    a_buf, b_buf, h_buf, full, empty, M, N, K, GROUP, PROGRAMS, STAGES, PIECE)),
            (_load_activation, (rows, w, h, tile_expert, tile_row, num_m, columns, F, D, a_buf, b_buf, h_buf, full,
                                empty, M, N, K, GROUP, PROGRAMS, STAGES, PIECE)),
        ],
        [1],
        [40],
    )  # fmt: skip


def swiglu_backward_gemm(
    rows: Tensor,
    slot: Tensor,
    weight: Tensor,
    down: Tensor,
    h: Tensor,
    end: Tensor,
    tiles: RowTiles,
    group: int,
    programs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`experts.swiglu_backward_gemm` of a plain SwiGLU; the gate's gradient is summed in another order.

    tiles     of `ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    """
    experts, f, d = down.shape
    pairs = rows.shape[0]
    dh = torch.empty_like(h)
    a = torch.empty(pairs, f, dtype=h.dtype, device=h.device)
    columns = triton.cdiv(f, COLUMNS)
    part = torch.empty(pairs, columns, dtype=torch.float32, device=h.device)
    started = min(programs, tiles.expert.shape[0] * columns)
    swiglu_backward_gemm_kernel[(started,)](
        TensorDescriptor.from_tensor(rows, [ROWS, STEP], SWIZZLED),
        TensorDescriptor.from_tensor(down.view(experts * f, d), [COLUMNS, STEP], SWIZZLED),
        TensorDescriptor.from_tensor(h.view(pairs, 2 * f), [ROWS, NARROW], THIN),
        weight, slot, dh, a, part, tiles.expert, tiles.row, tiles.needed, end, f, d, ROWS, COLUMNS, STEP, group,
        started, STAGES, NARROW, num_warps=8,
    )  # fmt: skip
    return dh, a, part
