"""Gradient of the activation: the product with `down`, and the gradient of SwiGLU as its epilogue.

Two groups of four warps have a tile each in turn: one multiplies beside the other's epilogue. Gate and value come
through a ring of their own: in the ring of the products a group in its epilogue would hold stages that the other one's
steps need (4.0 in the place of 2.5 ms, docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.effects.kernels.moe.dispatch import RowTiles
from nmoe.effects.kernels.moe.hopper.tiles import ROWS, STEP, swizzle
from nmoe.effects.kernels.ring import NARROW, SWIZZLED, free, halves

WIDTH = 128
"""Columns of a tile."""

STAGES, SLOTS = 5, 7
"""Steps of products under way, 160 KB of shared memory, and pieces of gate and value, 56 KB."""

GROUPS = 2
"""Groups of warps that multiply."""


@gluon.jit
def _ring(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """`ring.ring`, with barriers of filled stages for each group: one that waits many steps ahead of the other's would
    take an older phase of a common barrier for its own."""
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(GROUPS * STAGES):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def _claim(full, empty, step, turn, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """The stage of a step, once it is free, and the barrier of the group it is for, which so many bytes fill."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    ready = full.index(turn * STAGES + stage)
    mbarrier.expect(ready, BYTES)
    return stage, ready


@gluon.jit
def _filled(full, step, used, STAGES: gl.constexpr, TURN: gl.constexpr):
    """The stage of a step, once it is filled. `used`: a bit for each stage, how often this group used it, modulo 2."""
    stage = step % STAGES
    mbarrier.wait(full.index(TURN * STAGES + stage), (used >> stage) & 1)
    return stage


@gluon.jit
def _load_products(
    rows, w, tile_expert, tile_row, num_m, columns, a_buf, b_buf, full, empty, D: gl.constexpr, F: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    step, turn = 0, 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        expert = gl.load(tile_expert + tile)
        first = gl.load(tile_row + tile)
        for k in range(0, D, K):
            stage, ready = _claim(full, empty, step, turn, (M + N) * K * 2, STAGES)
            tma.async_copy_global_to_shared(w, [expert * F + column * N, k], ready, b_buf.index(stage))
            tma.async_copy_global_to_shared(rows, [first, k], ready, a_buf.index(stage))
            step += 1
        turn = (turn + 1) % GROUPS  # pyright: ignore[reportOperatorIssue]


@gluon.jit
def _load_h(
    h, tile_row, num_m, columns, h_buf, full, empty, F: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, SLOTS: gl.constexpr, PIECE: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    step, turn = 0, 0
    for pid in range(gl.program_id(0), num_m * columns, PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        first = gl.load(tile_row + tile)
        for n in range(column * N, column * N + N, PIECE):
            slot, ready = _claim(full, empty, step, turn, 2 * M * PIECE * 2, SLOTS)
            tma.async_copy_global_to_shared(h, [first, n], ready, h_buf.index(2 * slot))
            tma.async_copy_global_to_shared(h, [first, F + n], ready, h_buf.index(2 * slot + 1))
            step += 1
        turn = (turn + 1) % GROUPS  # pyright: ignore[reportOperatorIssue]


@gluon.jit
def _pieces(x, PIECE: gl.constexpr):
    """A tile's columns as a tuple of pieces, from the left; no value moves to another thread."""
    N: gl.constexpr = x.shape[1]
    if N == PIECE:
        return (x,)
    else:
        left, right = halves(x)
        return _pieces(left, PIECE) + _pieces(right, PIECE)


@gluon.jit
def _shifted(x, one):
    """Each times a one that the compiler does not know: it would keep the values from before the last shift beside
    those from after it, 112 registers more, for a multiplication that costs what a move does."""
    COUNT: gl.constexpr = len(x)
    if COUNT == 0:
        return ()
    else:
        return (x[0] * one,) + _shifted(x[1:], one)


@gluon.jit
def _added(x):
    """Pieces added to each other, a half's sum to the other half's."""
    COUNT: gl.constexpr = len(x)
    if COUNT == 1:
        return x[0]
    else:
        return _added(x[: COUNT // 2]) + _added(x[COUNT // 2 :])  # pyright: ignore[reportOperatorIssue]


@gluon.jit
def _summed(x):
    """Sum over columns, the right half added to the left one until one is left: an order that no layout changes."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    if N == 1:
        return x.reshape((M,))
    else:
        return _summed(gl.sum(x.reshape((M, 2, N // 2)), 1))


@gluon.jit
def _gradient(da, gate, value, share, column, EDGE: gl.constexpr, dtype: gl.constexpr):
    """Gradients of gate and value, the weighted activation, and the activation times its gradient."""
    if EDGE is not None:  # beyond the width there is something else of h
        inside = column + gl.arange(0, da.shape[1], layout=gl.SliceLayout(0, da.type.layout)) < EDGE
        value = gl.where(inside[None, :], value, 0.0)
    sigmoid = 1 / (1 + gl.exp(-gate))
    silu = gate * sigmoid
    activation = silu * value
    # rounded by itself: a compiler that fused it with the sum would decide its bits
    product = gl.fma(da, activation, gl.zeros_like(da))
    da = da * share
    to_gate = (da * value * (sigmoid + silu * (1 - sigmoid))).to(dtype)
    return to_gate, (da * silu).to(dtype), (activation * share).to(dtype), product


@gluon.jit
def _multiply(
    weight, slot_of, dh, a, gate_part, tile_expert, tile_row, end, num_m, columns, a_buf, b_buf, full, empty, h_buf,
    h_full, h_empty, one, D: gl.constexpr, F: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, PIECE: gl.constexpr,
    GROUPS: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    # rows of a warp are those of its products: nothing moves between warps
    layout: gl.constexpr = gl.BlockedLayout([PIECE // 16, 8], [256 // PIECE, PIECE // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = dh.dtype.element_ty
    STEPS: gl.constexpr = (D + K - 1) // K
    TRIPS: gl.constexpr = N // PIECE
    EDGE: gl.constexpr = None if F % N == 0 else F
    step, used = TURN * STEPS, 0
    h_step, h_used = TURN * TRIPS, 0
    for pid in range(gl.program_id(0) + TURN * PROGRAMS, num_m * columns, GROUPS * PROGRAMS):
        tile, column = swizzle(pid, columns, num_m, GROUP)
        first = gl.load(tile_row + tile)
        last = gl.load(end + gl.load(tile_expert + tile))
        acc = gl.zeros((M, N), gl.float32, mma)
        for k in range(0, D, K):
            stage = _filled(full, step, used, STAGES, TURN)
            used = used ^ (1 << stage)
            acc = warpgroup_mma(a_buf.index(stage), b_buf.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            free(empty, step, STAGES, k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        free(empty, step, STAGES)
        step += (GROUPS - 1) * STEPS

        x = _pieces(acc, PIECE)
        own: gl.constexpr = x[0].type.layout
        mine = first + gl.arange(0, M, layout=gl.SliceLayout(1, own))
        share = gl.load(weight + gl.load(slot_of + mine, mask=mine < last, other=0), mask=mine < last, other=0.0)
        row = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
        f = gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
        real = (row < last - first)[:, None]
        to_h = dh + first.to(gl.int64) * (2 * F) + column * N
        to_a = a + first.to(gl.int64) * F + column * N
        of_h = (row * (2 * F))[:, None] + f[None, :]
        of_a = (row * F)[:, None] + f[None, :]
        # A loop, for straight code of all pieces takes 1.2 of the time. No index reaches registers: each trip takes the
        # first piece, shifts the others, and puts what it leaves last, so that all are there in order at the end.
        for n in range(0, N, PIECE):
            slot = _filled(h_full, h_step, h_used, SLOTS, TURN)
            gate = h_buf.index(2 * slot).load(own).to(gl.float32)
            value = h_buf.index(2 * slot + 1).load(own).to(gl.float32)
            # What is read is read before TMA writes there: without the fence 4 % of calls had other bits.
            fence_async_shared()
            mbarrier.arrive(h_empty.index(slot), count=1)
            h_used = h_used ^ (1 << slot)
            h_step += 1
            to_gate, to_value, active, product = _gradient(
                x[0], gate, value, share[:, None], column * N + n, EDGE, dtype
            )
            inside = real
            if EDGE is not None:
                inside = real & (column * N + n + f < EDGE)[None, :]
            gl.store(to_h + n + of_h, gl.convert_layout(to_gate, layout), mask=inside)
            gl.store(to_h + F + n + of_h, gl.convert_layout(to_value, layout), mask=inside)
            gl.store(to_a + n + of_a, gl.convert_layout(active, layout), mask=inside)
            x = _shifted(x[1:], one) + (product,)
        h_step += (GROUPS - 1) * TRIPS
        part = gl.convert_layout(_summed(_added(x)), share.type.layout)
        gl.store(gate_part + mine * columns + column, part, mask=mine < last)


# F is compiled in: as an argument that is no multiple of 16 it would hide that rows are multiples of 16 bytes apart,
# and stores of single elements spill. Beyond D, columns of `rows` and `down` are zeros, beyond P the rows of `h`:
# descriptors fill with them.
@gluon.jit
def swiglu_backward_gemm_kernel(
    rows, w, h, weight, slot, dh, a, gate_part, tile_expert, tile_row, num_needed, end, one, D: gl.constexpr,
    F: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, PIECE: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, M, K], w.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, K], w.layout)
    h_buf = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, M, PIECE], h.layout)
    full, empty = _ring(STAGES, GROUPS)
    h_full, h_empty = _ring(SLOTS, GROUPS)
    num_m = gl.load(num_needed)
    columns: gl.constexpr = (F + N - 1) // N
    gl.warp_specialize(
        [
            (_multiply, (weight, slot, dh, a, gate_part, tile_expert, tile_row, end, num_m, columns, a_buf, b_buf, full,
                         empty, h_buf, h_full, h_empty, one, D, F, M, N, K, GROUP, PROGRAMS, STAGES, SLOTS, PIECE,
                         GROUPS, 0)),
            (_multiply, (weight, slot, dh, a, gate_part, tile_expert, tile_row, end, num_m, columns, a_buf, b_buf, full,
                         empty, h_buf, h_full, h_empty, one, D, F, M, N, K, GROUP, PROGRAMS, STAGES, SLOTS, PIECE,
                         GROUPS, 1)),
            (_load_products, (rows, w, tile_expert, tile_row, num_m, columns, a_buf, b_buf, full, empty, D, F, M, N, K,
                              GROUP, PROGRAMS, STAGES, GROUPS)),
            (_load_h, (h, tile_row, num_m, columns, h_buf, h_full, h_empty, F, M, N, GROUP, PROGRAMS, SLOTS, PIECE,
                       GROUPS)),
        ],
        [4, 1, 1],
        [232, 40, 40],
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
    """`experts.swiglu_backward_gemm` of a plain SwiGLU; the gate's gradient is summed in another order than there.

    tiles     of `ROWS` rows
    programs  that share the tiles out: one a multiprocessor
    """
    experts, f, d = down.shape
    pairs = h.shape[0]
    dh = torch.empty_like(h)
    a = torch.empty(pairs, f, dtype=h.dtype, device=h.device)
    columns = triton.cdiv(f, WIDTH)
    part = torch.empty(pairs, columns, dtype=torch.float32, device=h.device)
    started = min(programs, tiles.expert.shape[0] * columns)
    narrow = gl.NVMMASharedLayout(swizzle_byte_width=2 * NARROW, element_bitwidth=16, rank=2)
    swiglu_backward_gemm_kernel[(started,)](
        TensorDescriptor.from_tensor(rows, [ROWS, STEP], SWIZZLED),
        TensorDescriptor.from_tensor(down.view(experts * f, d), [WIDTH, STEP], SWIZZLED),
        TensorDescriptor.from_tensor(h.view(pairs, 2 * f), [ROWS, NARROW], narrow),
        weight, slot, dh, a, part, tiles.expert, tiles.row, tiles.needed, end, 1.0, d, f, ROWS, WIDTH, STEP, group,
        started, STAGES, SLOTS, NARROW, GROUPS, num_warps=4,
    )  # fmt: skip
    return dh, a, part
