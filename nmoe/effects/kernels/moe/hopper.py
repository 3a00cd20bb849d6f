"""The products of the routed experts for Hopper, in bf16: some warps load, others multiply and store.

Programs stay and take one tile after another, so that the next tiles' operands are fetched while one is stored; a ring
of stages in shared memory stands between the warps. Written in Gluon: Triton has no such kernels for sm_90, where rows
cannot be gathered through descriptors either. Letters, shapes and bits are those of `experts`; docs/log.md, 2026-11-30.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles

ROWS, COLUMNS, STEP = 128, 256, 64
"""Of a tile: rows and columns of the output, and the summed axis a step."""

TALL = 256
"""Rows of a tile of the activation's backward, by 128 columns."""

STAGES = 4
"""Steps under way: 192 KB of shared memory."""

PIECE, NARROW = 64, 16
"""Columns that are stored at once, and where an epilogue computes with more than the accumulator."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Its names in Triton 3.7 and 3.6."""

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SWIZZLED_NARROW = gl.NVMMASharedLayout(swizzle_byte_width=2 * NARROW, element_bitwidth=16, rank=2)


@gluon.jit
def _swizzle(pid, num_n, num_m, GROUP: gl.constexpr):
    """`experts._swizzle`."""
    group = pid // (GROUP * num_n)
    first = group * GROUP
    size = gl.minimum(num_m - first, GROUP)
    inside = pid % (GROUP * num_n)
    return first + inside % size, inside // size


@gluon.jit
def _ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers of the stages: filled, after so many arrivals, and free again."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def _claim(full, empty, step, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """The stage of a step, once it is free, and its barrier, which so many bytes will fill."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    return stage, full.index(stage)


@gluon.jit
def _filled(full, step, STAGES: gl.constexpr):
    """The stage of a step, once it is filled."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return stage


@gluon.jit
def _free(empty, step, STAGES: gl.constexpr, pred=True):
    """Give back the stage of the step before."""
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=pred)


@gluon.jit
def _halves(x):
    """Left and right half of the columns; no value moves to another thread."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return x.reshape((M, 2, N // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _store(acc, to, first, last, column, WIDTH, ADD: gl.constexpr, PIECE: gl.constexpr):
    """Epilogue: a tile, piece by piece, from row `first` on and up to `last`; or added to what is there."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    if N > PIECE:
        left, right = _halves(acc)
        _store(left, to, first, last, column, WIDTH, ADD, PIECE)
        _store(right, to, first, last, column + N // 2, WIDTH, ADD, PIECE)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [8, 1], [1, 0])
        dtype: gl.constexpr = to.dtype.element_ty
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        at = column + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
        there = to + row.to(gl.int64)[:, None] * WIDTH + at[None, :]
        inside = (row < last)[:, None] & (at < WIDTH)[None, :]
        if ADD:
            value = gl.convert_layout(acc, layout)
            value = (gl.load(there, mask=inside, other=0.0).to(gl.float32) + value).to(dtype)
        else:
            value = gl.convert_layout(acc.to(dtype), layout)
        gl.store(there, value, mask=inside)
        if ADD:
            barrier()  # what is read next is other columns, but no compiler or check of races has to know


@gluon.jit
def _load_up(
    x, source, w, tile_expert, tile_row, end, num_m, columns, F, a_buf, b_buf, full, empty, D: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    inner = gl.arange(0, K, layout=gl.SliceLayout(0, layout))
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        row = gl.load(tile_row + tile) + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        token = gl.load(source + row, mask=row < gl.load(end + expert), other=0).to(gl.int64)
        address = x + token[:, None] * D + inner[None, :]
        for k in range(0, D, K):
            stage, filled = _claim(full, empty, step, 2 * K * N * 2, STAGES)
            # gate beside value, as the tensor cores take a tile of twice the width: 4 boxes of 64 columns in a row
            tma.async_copy_global_to_shared(w, [expert * D + k, column * N], filled, b_buf.index(2 * stage))
            tma.async_copy_global_to_shared(w, [expert * D + k, F + column * N], filled, b_buf.index(2 * stage + 1))
            if D % K == 0:
                async_copy.async_copy_global_to_shared(a_buf.index(stage), address + k)
            else:
                # beyond the last column of x the descriptor reads the next expert's weights, which meet zeros
                async_copy.async_copy_global_to_shared(a_buf.index(stage), address + k, mask=inner[None, :] < D - k)
            async_copy.mbarrier_arrive(filled, increment_count=False)
            step += 1


@gluon.jit
def _store_up(gate, value, h, a, first, last, column, F, PIECE: gl.constexpr):
    """Epilogue: gate and value, rounded, and SwiGLU of what was rounded."""
    M: gl.constexpr = gate.shape[0]
    N: gl.constexpr = gate.shape[1]
    if N > PIECE:
        gates, values = _halves(gate), _halves(value)
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
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 2 * N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        acc = gl.zeros((M, 2 * N), gl.float32, mma)
        for k in range(0, D, K):
            stage = _filled(full, step, STAGES)
            fence_async_shared()  # what single threads copied is seen by the tensor cores
            acc = warpgroup_mma(a_buf.index(stage), b_buf.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _free(empty, step, STAGES, k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(empty, step, STAGES)
        gate, value = _halves(acc)
        _store_up(gate, value, h, a, first, last, column * N, F, PIECE)


@gluon.jit
def gather_gemm_swiglu_kernel(
    x, source, w, h, a, tile_expert, tile_row, num_needed, end, F, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], w.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, 2 * N], w.layout)
    sides = b_buf._reinterpret(gl.bfloat16, [2 * STAGES, K, N], w.layout)
    full, empty = _ring(STAGES, 1 + 128)
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


@gluon.jit
def _load_product(
    rows, w, tile_expert, tile_row, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty, TRANSPOSED: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, INNER, K):
            stage, filled = _claim(full, empty, step, (M + N) * K * 2, STAGES)
            tma.async_copy_global_to_shared(rows, [first, k], filled, a_buf.index(stage))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(w, [expert * OUTER + column * N, k], filled, b_buf.index(stage))
            else:
                tma.async_copy_global_to_shared(w, [expert * INNER + k, column * N], filled, b_buf.index(stage))
            step += 1


@gluon.jit
def _multiply_product(
    out, tile_expert, tile_row, end, num_m, columns, INNER, OUTER, a_buf, b_buf, full, empty, TRANSPOSED: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        acc = gl.zeros((M, N), gl.float32, mma)
        for k in range(0, INNER, K):
            stage = _filled(full, step, STAGES)
            b = b_buf.index(stage)
            acc = warpgroup_mma(a_buf.index(stage), b.permute((1, 0)) if TRANSPOSED else b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _free(empty, step, STAGES, k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(empty, step, STAGES)
        _store(acc, out, first, last, column * N, OUTER, False, PIECE)


@gluon.jit
def grouped_gemm_kernel(
    rows, w, out, tile_expert, tile_row, num_needed, end, INNER, OUTER, TRANSPOSED: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], rows.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, K] if TRANSPOSED else [STAGES, K, N], w.layout)
    full, empty = _ring(STAGES, 1)
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


@gluon.jit
def _load_gradient(
    a, source, b, end, count, E, A, num_m, num_n, a_buf, b_buf, full, empty, M: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    inner = gl.arange(0, K, layout=gl.SliceLayout(1, layout))
    step = 0
    each = num_m * num_n
    for pid in range(gl.program_id(0), E * each, PROGRAMS):
        expert = pid // each
        m, n = _swizzle(pid % each, num_n, num_m, GROUP)
        stop = gl.load(end + expert)
        start = stop - gl.load(count + expert)
        am = m * M + gl.arange(0, M, layout=gl.SliceLayout(0, layout))
        own = a + am[None, :]
        row = start + inner
        token = row if source is None else gl.load(source + row, mask=row < stop, other=0)
        for k in range(start, stop, K):
            # the next expert's rows, which the descriptor of `b` reads too, meet zeros
            real = (k + inner < stop)[:, None] & (am < A)[None, :]
            address = own + token.to(gl.int64)[:, None] * A
            row = k + K + inner  # a step ahead: its copy does not wait for where a token is
            token = row if source is None else gl.load(source + row, mask=row < stop, other=0)
            stage, filled = _claim(full, empty, step, K * N * 2, STAGES)
            tma.async_copy_global_to_shared(b, [k, n * N], filled, b_buf.index(stage))
            async_copy.async_copy_global_to_shared(a_buf.index(stage), address, mask=real)
            async_copy.mbarrier_arrive(filled, increment_count=False)
            step += 1


@gluon.jit
def _multiply_gradient(
    out, end, count, E, A, B, num_m, num_n, a_buf, b_buf, full, empty, M: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    each = num_m * num_n
    for pid in range(gl.program_id(0), E * each, PROGRAMS):
        expert = pid // each
        m, n = _swizzle(pid % each, num_n, num_m, GROUP)
        stop = gl.load(end + expert)
        start = stop - gl.load(count + expert)
        acc = gl.zeros((M, N), gl.float32, mma)
        for k in range(start, stop, K):
            stage = _filled(full, step, STAGES)
            fence_async_shared()  # what single threads copied is seen by the tensor cores
            acc = warpgroup_mma(a_buf.index(stage).permute((1, 0)), b_buf.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _free(empty, step, STAGES, k > start)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(empty, step, STAGES, stop > start)
        _store(acc, out + expert.to(gl.int64) * A * B, m * M, A, n * N, B, ADD, PIECE)


@gluon.jit
def grouped_weight_gradient_kernel(
    a, source, b, out, end, count, E, A, B, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, M], b.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, K, N], b.layout)
    full, empty = _ring(STAGES, 1 + 128)
    num_m, num_n = gl.cdiv(A, M), gl.cdiv(B, N)
    gl.warp_specialize(
        [
            (_multiply_gradient, (out, end, count, E, A, B, num_m, num_n, a_buf, b_buf, full, empty, M, N, K, GROUP,
                                  PROGRAMS, STAGES, ADD, PIECE)),
            (_load_gradient, (a, source, b, end, count, E, A, num_m, num_n, a_buf, b_buf, full, empty, M, N, K, GROUP,
                              PROGRAMS, STAGES)),
        ],
        [4],
        [56],
    )  # fmt: skip


@gluon.jit
def _load_activation(
    rows, w, h, tile_expert, tile_row, num_m, columns, F, D, a_buf, b_buf, h_buf, full, empty, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, D, K):
            stage, filled = _claim(full, empty, step, (M + N) * K * 2, STAGES)
            tma.async_copy_global_to_shared(rows, [first, k], filled, a_buf.index(stage))
            tma.async_copy_global_to_shared(w, [expert * F + column * N, k], filled, b_buf.index(stage))
            step += 1
        # what the epilogue reads comes through the same stages, before it is asked for
        for n in range(column * N, column * N + N, PIECE):
            stage, filled = _claim(full, empty, step, 2 * M * PIECE * 2, STAGES)
            tma.async_copy_global_to_shared(h, [first, n], filled, h_buf.index(stage * (K // PIECE)))
            tma.async_copy_global_to_shared(h, [first, F + n], filled, h_buf.index(stage * (K // PIECE) + 1))
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
        left, right = _halves(da)
        part = _store_activation(
            left, share, dh, a, h_buf, full, empty, first, last, column, F, step, AT, STAGES, PER_STAGE, PIECE
        )
        part += _store_activation(
            right, share, dh, a, h_buf, full, empty, first, last, column, F, step, AT + N // 2, STAGES, PER_STAGE, PIECE
        )
    else:
        own: gl.constexpr = da.type.layout
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [8, 1], [1, 0])
        stage = _filled(full, step + AT // PIECE, STAGES)
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
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, N, 16])
    step = 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = _swizzle(pid, columns, num_m, GROUP)
        last = gl.load(end + gl.load(tile_expert + tile))
        first = gl.load(tile_row + tile)
        row = first + gl.arange(0, M, layout=gl.SliceLayout(1, mma))
        share = gl.load(weight + gl.load(slot + row, mask=row < last, other=0), mask=row < last, other=0.0)
        da = gl.zeros((M, N), gl.float32, mma)
        for k in range(0, D, K):
            stage = _filled(full, step, STAGES)
            da = warpgroup_mma(a_buf.index(stage), b_buf.index(stage).permute((1, 0)), da, is_async=True)
            da = warpgroup_mma_wait(1, deps=(da,))
            _free(empty, step, STAGES, k > 0)
            step += 1
        da = warpgroup_mma_wait(0, deps=(da,))
        _free(empty, step, STAGES)
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
    full, empty = _ring(STAGES, 1)
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
