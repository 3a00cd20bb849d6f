"""Gradient of queries of MLA: `mla_kernels.dq_kernel` for Hopper, without documents.

Letters as in `mla_kernels`. A tile is 128 queries of one head. Two groups of 4 warps own 64 queries each; one warp loads
blocks of 64 keys and values into a ring, from the diagonal down, so that a tile's masked block is its first. A group
begins the scores of a block before it waits for what the block before adds to the gradient (`DELAYED`): its softmax lies
behind its own products as well as behind the other group's.
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

from nmoe.effects.kernels.moe.hopper.ring import SWIZZLED, claim, filled, ring, store

LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = 128
"""Queries of a tile."""


@gluon.jit
def _turns(tiles):
    """Tiles of this program: every second turn runs backwards, so that programs that stay have equally much to do."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    full = tiles // programs
    return full + gl.where(gl.where(full % 2 == 1, programs - 1 - me, me) < tiles % programs, 1, 0)


@gluon.jit
def _tile(turn, blocks, heads, rows, HEADS: gl.constexpr):
    """Block of queries, sequence and head of a turn, in the order of `blocks.schedule`."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    at = turn * programs + gl.where(turn % 2 == 1, programs - 1 - me, me)
    group = at // (blocks * HEADS)
    within = at % (blocks * HEADS)
    width = gl.minimum(rows - group * HEADS, HEADS)
    row = group * HEADS + within % width
    return blocks - 1 - within // width, row, row // heads, row % heads


@gluon.jit
def _queries(
    q, do, at, h, turn, q_part, q_rope_part, do_part, q_full, q_empty, NOPE: gl.constexpr, ROPE: gl.constexpr,
    VALUE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Load the queries of one group, and the gradient of their output, once it is through with those before."""
    C: gl.constexpr = NOPE + ROPE
    ready = q_full.index(PART)
    mbarrier.wait(q_empty.index(PART), (turn & 1) ^ 1)
    mbarrier.expect(ready, 64 * (C + VALUE) * 2)
    for c in gl.static_range(0, NOPE, 64):
        tma.async_copy_global_to_shared(q, [at + PART * 64, h * C + c], ready, q_part.index((PART * NOPE + c) // 64))
    for c in gl.static_range(0, ROPE, 64):
        to = q_rope_part.index((PART * ROPE + c) // 64)
        tma.async_copy_global_to_shared(q, [at + PART * 64, h * C + NOPE + c], ready, to)
    for c in gl.static_range(0, VALUE, 64):
        to = do_part.index((PART * VALUE + c) // 64)
        tma.async_copy_global_to_shared(do, [at + PART * 64, h * VALUE + c], ready, to)


@gluon.jit
def _load(
    q, kv, k_rope, do, positions, heads, rows, q_part, q_rope_part, do_part, k_part, rope_part, v_part, q_full, q_empty, full,
    empty, N: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Boxes are 64 columns wide: `*_part` are the buffers cut up into them."""
    blocks = positions // 128
    step = 0
    for turn in range(0, _turns(blocks * rows)):
        block, row, b, h = _tile(turn, blocks, heads, rows, HEADS)
        first = b * positions
        _queries(q, do, first + block * 128, h, turn, q_part, q_rope_part, do_part, q_full, q_empty, NOPE, ROPE, VALUE, 0)
        count = (block + 1) * (128 // N)
        for i in range(0, count):
            n = first + (count - 1 - i) * N
            stage, ready = claim(full, empty, step, N * (NOPE + ROPE + VALUE) * 2, STAGES)
            for c in gl.static_range(0, NOPE, 64):
                to = k_part.index(stage * (NOPE // 64) + c // 64)
                tma.async_copy_global_to_shared(kv, [n, h * (NOPE + VALUE) + c], ready, to)
            for c in gl.static_range(0, ROPE, 64):
                tma.async_copy_global_to_shared(k_rope, [n, c], ready, rope_part.index(stage * (ROPE // 64) + c // 64))
            for c in gl.static_range(0, VALUE, 64):
                to = v_part.index(stage * (VALUE // 64) + c // 64)
                tma.async_copy_global_to_shared(kv, [n, h * (NOPE + VALUE) + NOPE + c], ready, to)
            step += 1
            if i == 128 // N - 1:  # later, as the first group may be through with its tile before
                _queries(q, do, first + block * 128, h, turn, q_part, q_rope_part, do_part, q_full, q_empty, NOPE, ROPE, VALUE, 1)


@gluon.jit
def _scores(q, q_rope, k, k_rope):
    """Queries by keys, under way in two groups of products."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = k.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    s = gl.zeros((M, N), gl.float32, mma)
    s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, k_rope.permute((1, 0)), s, is_async=True)


@gluon.jit
def _probabilities_gradient(do, v):
    """Gradient of the output by values, under way."""
    M: gl.constexpr = do.shape[0]
    N: gl.constexpr = v.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    zero = gl.zeros((M, N), gl.float32, mma)
    return warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _add(ds, k, k_rope, acc, acc_rope):
    """Gradient of scores by keys added to the gradient of queries, under way in two groups of products."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_rope.type.layout, k_width=2)
    acc = warpgroup_mma(gl.convert_layout(ds, left), k, acc, is_async=True)
    acc_rope = warpgroup_mma(gl.convert_layout(ds, right), k_rope, acc_rope, is_async=True)
    return acc, acc_rope


@gluon.jit
def _gradient(
    o, lse, dq, top, delta, positions, heads, rows, padded, o_step, scale, q_buf, q_rope_buf, do_buf, k_buf, rope_buf,
    v_buf, q_full, q_empty, full, empty, N: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr, DELAYED: gl.constexpr, BOUND: gl.constexpr, BARE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    own: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NOPE, 16])
    shared: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROPE, 16])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE, VALUE // 8], [4, 1], [1, 0])
    blocks = positions // 128
    scale2 = scale * LOG2_E
    q, q_rope, do = q_buf.index(PART), q_rope_buf.index(PART), do_buf.index(PART)
    step = 0
    for turn in range(0, _turns(blocks * rows)):
        block, row, b, h = _tile(turn, blocks, heads, rows, HEADS)
        m = block * 128 + PART * 64
        first = b * positions + m
        queries = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        channels = gl.arange(0, VALUE, layout=gl.SliceLayout(0, layout))
        there = o + (first.to(gl.int64) * o_step + h * VALUE) + (queries * o_step)[:, None] + channels[None, :]
        output = gl.load(there)
        query = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        lse2 = gl.load(lse + (row.to(gl.int64) * positions + m) + query) * LOG2_E
        mbarrier.wait(q_full.index(PART), turn & 1)
        if PART == 0:  # its queries see nothing of the last 64 keys
            mbarrier.arrive(empty.index(filled(full, step, STAGES)), count=1)
            step += 1
        stage = filled(full, step, STAGES)
        s = _scores(q, q_rope, k_buf.index(stage), rope_buf.index(stage))
        dp = _probabilities_gradient(do, v_buf.index(stage))
        # delta = sum(dO * O) = sum(dP * P): the term that softmax subtracts from each row, without a pass of its own.
        off = gl.sum(do.load(layout).to(gl.float32) * output.to(gl.float32), 1)
        fence_async_shared()  # what is read is read before another proxy writes there
        at = row.to(gl.int64) * padded + m
        gl.store(top + at + query, lse2)
        gl.store(delta + at + queries, off)
        off = gl.convert_layout(off, gl.SliceLayout(1, mma))
        acc = gl.zeros((64, NOPE), gl.float32, own)
        acc_rope = gl.zeros((64, ROPE), gl.float32, shared)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale2 - lse2[:, None])
        key = gl.arange(0, N, layout=gl.SliceLayout(0, mma))
        p = gl.where(query[:, None] >= key[None, :], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        # Rounded to the input format for the tensor cores, as P is: error 2.4e-3 against fp64, that of cuDNN.
        ds = (p * (dp - off[:, None])).to(gl.bfloat16)
        for i in range(0, block * 2 + PART):
            if DELAYED == 2:
                step += 1
                before = stage
                stage = filled(full, step, STAGES)
                s = _scores(q, q_rope, k_buf.index(stage), rope_buf.index(stage))
                acc, acc_rope = _add(ds, k_buf.index(before), rope_buf.index(before), acc, acc_rope)
                dp = _probabilities_gradient(do, v_buf.index(stage))
                s = warpgroup_mma_wait(3, deps=(s,))
                # Always true, which ptxas does not know: it would compute most of this after the wait that follows.
                if BARE:
                    s = s + 1
                elif (positions > 0) | (not BOUND):
                    s = gl.exp2(s * scale2 - lse2[:, None])
                acc, acc_rope, dp = warpgroup_mma_wait(0, deps=(acc, acc_rope, dp))
                mbarrier.arrive(empty.index(before), count=1)
                ds = (s * (dp - off[:, None])).to(gl.bfloat16)
            elif DELAYED == 1:
                step += 1
                before = stage
                stage = filled(full, step, STAGES)
                s = _scores(q, q_rope, k_buf.index(stage), rope_buf.index(stage))
                dp = _probabilities_gradient(do, v_buf.index(stage))
                acc, acc_rope = _add(ds, k_buf.index(before), rope_buf.index(before), acc, acc_rope)
                s = warpgroup_mma_wait(3, deps=(s,))
                # Always true, which ptxas does not know: it would compute most of this after the waits that follow.
                if (positions > 0) | (not BOUND):
                    s = gl.exp2(s * scale2 - lse2[:, None])
                dp = warpgroup_mma_wait(2, deps=(dp,))
                if (heads > 0) | (not BOUND):
                    s = s * (dp - off[:, None])
                acc, acc_rope = warpgroup_mma_wait(0, deps=(acc, acc_rope))
                mbarrier.arrive(empty.index(before), count=1)
                ds = s.to(gl.bfloat16)
            else:
                acc, acc_rope = _add(ds, k_buf.index(stage), rope_buf.index(stage), acc, acc_rope)
                acc, acc_rope = warpgroup_mma_wait(0, deps=(acc, acc_rope))
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
                stage = filled(full, step, STAGES)
                s = _scores(q, q_rope, k_buf.index(stage), rope_buf.index(stage))
                dp = _probabilities_gradient(do, v_buf.index(stage))
                s = warpgroup_mma_wait(1, deps=(s,))
                if (positions > 0) | (not BOUND):
                    s = gl.exp2(s * scale2 - lse2[:, None])
                dp = warpgroup_mma_wait(0, deps=(dp,))
                ds = (s * (dp - off[:, None])).to(gl.bfloat16)
        mbarrier.arrive(q_empty.index(PART), count=1)
        acc, acc_rope = _add(ds, k_buf.index(stage), rope_buf.index(stage), acc, acc_rope)
        acc, acc_rope = warpgroup_mma_wait(0, deps=(acc, acc_rope))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
        C: gl.constexpr = NOPE + ROPE
        store(acc * scale, dq, first, first + 64, h * C, heads * C, False, 32)
        store(acc_rope * scale, dq, first, first + 64, h * C + NOPE, heads * C, False, 32)


@gluon.jit(do_not_specialize=["heads", "rows"])
def dq_kernel(
    q, kv, k_rope, o, do, dq, lse, top, delta, positions, heads, rows, padded, o_step, scale, N: gl.constexpr,
    NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    DELAYED: gl.constexpr, BOUND: gl.constexpr, BARE: gl.constexpr, OTHER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = gl.bfloat16
    q_buf = gl.allocate_shared_memory(dtype, [2, 64, NOPE], q.layout)
    q_rope_buf = gl.allocate_shared_memory(dtype, [2, 64, ROPE], q.layout)
    do_buf = gl.allocate_shared_memory(dtype, [2, 64, VALUE], q.layout)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, N, NOPE], q.layout)
    rope_buf = gl.allocate_shared_memory(dtype, [STAGES, N, ROPE], q.layout)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, N, VALUE], q.layout)
    full, empty = ring(STAGES, 1, READERS=2)
    q_full, q_empty = ring(2, 1)
    q_part = q_buf._reinterpret(dtype, [2 * (NOPE // 64), 64, 64], q.layout)
    q_rope_part = q_rope_buf._reinterpret(dtype, [2 * (ROPE // 64), 64, 64], q.layout)
    do_part = do_buf._reinterpret(dtype, [2 * (VALUE // 64), 64, 64], q.layout)
    k_part = k_buf._reinterpret(dtype, [STAGES * (NOPE // 64), N, 64], q.layout)
    rope_part = rope_buf._reinterpret(dtype, [STAGES * (ROPE // 64), N, 64], q.layout)
    v_part = v_buf._reinterpret(dtype, [STAGES * (VALUE // 64), N, 64], q.layout)
    gl.warp_specialize(
        [
            (_gradient, (o, lse, dq, top, delta, positions, heads, rows, padded, o_step, scale, q_buf, q_rope_buf, do_buf,
                         k_buf, rope_buf, v_buf, q_full, q_empty, full, empty, N, NOPE, ROPE, VALUE, HEADS, STAGES,
                         DELAYED, BOUND, BARE, 0)),
            (_gradient, (o, lse, dq, top, delta, positions, heads, rows, padded, o_step, scale, q_buf, q_rope_buf, do_buf,
                         k_buf, rope_buf, v_buf, q_full, q_empty, full, empty, N, NOPE, ROPE, VALUE, HEADS, STAGES,
                         DELAYED, BOUND, BARE, 1)),
            (_load, (q, kv, k_rope, do, positions, heads, rows, q_part, q_rope_part, do_part, k_part, rope_part, v_part,
                     q_full, q_empty, full, empty, N, NOPE, ROPE, VALUE, HEADS, STAGES)),
        ],
        [4, 1],
        [OTHER, REGISTERS],
    )  # fmt: skip


def dq_pass(
    q: Tensor, kv: Tensor, k_rope: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float, heads_per_group: int,
    programs: int, *, stages: int = 3, delayed: int = 1, bound: bool = True, bare: bool = False, other: int = 240, registers: int = 24,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`mla.dq_pass` without documents: bf16, 128 + 64 channels of a query, 128 of a value, positions a multiple of 128.

    programs  that share the tiles out; 0: one a tile
    """
    batch, positions, heads, width = q.shape
    rope = k_rope.shape[-1]
    nope = width - rope
    value = kv.shape[-1] - nope
    top, delta = lse.new_empty(2, batch * heads, positions)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = positions // ROWS * batch * heads
    o = o.contiguous()

    def flat(x: Tensor) -> TensorDescriptor:
        rows = x.reshape(batch * positions, -1)
        return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [64, 64], SWIZZLED)

    dq_kernel[(min(programs, tiles) if programs else tiles,)](
        flat(q), flat(kv), flat(k_rope), o, flat(do), dq, lse.contiguous(), top, delta, positions, heads, batch * heads,
        top.stride(0), o.stride(1), scale, 64, nope, rope, value, heads_per_group, stages, delayed, bound, bare, other, registers,
        num_warps=4,
    )  # fmt: skip
    return dq, top, delta
