"""Gradient of queries of MLA for Hopper: one warp loads, two groups of four warps multiply.

A program takes a block of 128 queries of one head. Each group owns 64 of the queries; blocks of 64 keys and values come
through a ring, from the diagonal down. A group begins at once a block's scores, what the block before adds to the
gradient, and the gradient of the block's probabilities: exponentials lie behind the latter two, and behind the other
group's products. Letters are those of `mla_kernels`.

Lengths are multiples of 128.
"""

from __future__ import annotations

import torch
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

from nmoe.effects.kernels.attention.hopper import BLOCK, SIZES
from nmoe.effects.kernels.attention.hopper.parts import operand, product, schedule, scores
from nmoe.effects.kernels.ring import PIECE, SWIZZLED, claim, filled, ring, store

NOPE, ROPE, VALUE = SIZES

KEYS = 64
"""Of a step, and queries of a group."""

STAGES = 3
"""Steps under way: 120 KB of shared memory beside 80 of queries and their output's gradient."""

HEADS = 8
"""Whose programs run side by side: their keys stay in the L2 cache."""


@gluon.jit
def _load(
    q, q_rope, kv, k_rope, do, start, positions, heads, rows, q_buf, q_rope_buf, do_buf, k_buf, k_rope_buf, v_buf, held,
    full, empty, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    blocks = positions // 128
    b, h, index = schedule(gl.program_id(0), blocks, rows, heads, HEADS)
    m = (blocks - 1 - index) * 128  # long ones first
    at = b * positions
    begin = 0
    if start is not None:
        begin = gl.load(start + (at + m).to(gl.int64)) // 64
    for step in range(0, m // 64 + 2 - begin):
        if step < 2:  # the second group begins with the first block of keys, the first group with the next
            part = 1 - step
            ready = held.index(part)
            mbarrier.expect(ready, 64 * (NOPE + ROPE + VALUE) * 2)
            here = at + m + part * 64
            tma.async_copy_global_to_shared(q, [here, h * (NOPE + ROPE)], ready, q_buf.index(part))
            tma.async_copy_global_to_shared(q_rope, [here, h * (NOPE + ROPE) + NOPE], ready, q_rope_buf.index(part))
            tma.async_copy_global_to_shared(do, [here, h * VALUE], ready, do_buf.index(part))
        n = at + m + 64 - step * 64
        stage, ready = claim(full, empty, step, 64 * (NOPE + ROPE + VALUE) * 2, STAGES)
        tma.async_copy_global_to_shared(kv, [n, h * (NOPE + VALUE)], ready, k_buf.index(stage))
        tma.async_copy_global_to_shared(k_rope, [n, 0], ready, k_rope_buf.index(stage))
        tma.async_copy_global_to_shared(kv, [n, h * (NOPE + VALUE) + NOPE], ready, v_buf.index(stage))


@gluon.jit
def _multiply(
    o, lse, dq, top, delta, start, positions, heads, rows, scale, q_buf, q_rope_buf, do_buf, k_buf, k_rope_buf, v_buf,
    held, full, empty, PART: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NOPE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROPE, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE, VALUE // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_buf.dtype
    q, q_rope, do = q_buf.index(PART), q_rope_buf.index(PART), do_buf.index(PART)
    scale2 = scale * 1.4426950408889634  # exp2 is one instruction, exp is not
    blocks = positions // 128
    b, h, index = schedule(gl.program_id(0), blocks, rows, heads, HEADS)
    m = (blocks - 1 - index) * 128  # long ones first
    m += PART * 64
    first = b * positions + m
    at = (b * heads + h).to(gl.int64) * positions + m
    query = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    key = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    inner = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, VALUE, layout=gl.SliceLayout(0, layout))
    there = o + first.to(gl.int64) * (heads * VALUE) + h * VALUE
    out = gl.load(there + ((inner * (heads * VALUE))[:, None] + channel[None, :]))
    above = gl.load(lse + at + query) * 1.4426950408889634
    begin = 0
    if start is not None:
        starts = start + first.to(gl.int64)
        first_key = gl.load(starts + query)
        begin = gl.load(starts) // 64
        whole = gl.load(starts + 63)  # from this key on all see all
    mbarrier.wait(held.index(PART), 0)
    if PART == 0:  # its queries see nothing of the first block of keys
        mbarrier.arrive(empty.index(filled(full, 0, STAGES)), count=1)
    stage = filled(full, 1 - PART, STAGES)
    s = scores(q, q_rope, k_buf.index(stage), k_rope_buf.index(stage))
    # delta = sum(dO * O) = sum(dP * P): the term that softmax subtracts from each row, without a pass of its own.
    off = gl.sum(do.load(layout).to(gl.float32) * out.to(gl.float32), 1)
    fence_async_shared()  # nothing is written there any more, but no check has to know
    gl.store(top + at + query, above)
    gl.store(delta + at + inner, off)
    off = gl.convert_layout(off, gl.SliceLayout(1, mma))
    dp = product(do, v_buf.index(stage), 64)
    s = warpgroup_mma_wait(1, deps=(s,))
    s = gl.exp2(s * scale2 - above[:, None])
    s = gl.where(query[:, None] >= key[None, :], s, 0.0)
    if start is not None:
        s = gl.where(first_key[:, None] <= (m + key)[None, :], s, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    # Rounded to the input format for the tensor cores, as P is: error 2.4e-3 against fp64, that of cuDNN.
    ds = (s * (dp - off[:, None])).to(dtype)
    sums = gl.zeros((64, NOPE), gl.float32, wide)
    sums_rope = gl.zeros((64, ROPE), gl.float32, narrow)
    steps = m // 64 - begin + 2 - PART
    for step in range(2 - PART, steps):
        before = stage
        stage = filled(full, step, STAGES)
        s = scores(q, q_rope, k_buf.index(stage), k_rope_buf.index(stage))
        left = operand(ds, NOPE)
        sums = warpgroup_mma(left, k_buf.index(before), sums, is_async=True)
        sums_rope = warpgroup_mma(left, k_rope_buf.index(before), sums_rope, is_async=True)
        dp = product(do, v_buf.index(stage), 64)
        s = warpgroup_mma_wait(3, deps=(s,))
        # Always true, which ptxas does not know: it would compute most of this behind the wait that follows.
        if positions > 0:
            s = gl.exp2(s * scale2 - above[:, None])
        if start is not None:
            n = m + (1 - PART - step) * 64
            if n < whole:
                s = gl.where(first_key[:, None] <= (n + key)[None, :], s, 0.0)
        # ptxas may give the left side's registers to other values as soon as its product is begun, though the wait
        # takes it: the new ds needs dP, the last product begun, so it is behind the wait; tests/kernels/registers.py.
        sums, sums_rope, dp, left = warpgroup_mma_wait(0, deps=(sums, sums_rope, dp, left))
        mbarrier.arrive(empty.index(before), count=1)
        ds = (s * (dp - off[:, None])).to(dtype)
    left = operand(ds, NOPE)
    sums = warpgroup_mma(left, k_buf.index(stage), sums, is_async=True)
    sums_rope = warpgroup_mma(left, k_rope_buf.index(stage), sums_rope, is_async=True)
    sums, sums_rope, left = warpgroup_mma_wait(0, deps=(sums, sums_rope, left))
    if start is not None:
        if PART == 1:  # what the other group's queries alone see
            mbarrier.arrive(empty.index(stage), count=1)
            for step in range(steps, m // 64 + 1 - gl.load(starts - 64) // 64):
                mbarrier.arrive(empty.index(filled(full, step, STAGES)), count=1)
    C: gl.constexpr = NOPE + ROPE
    store(sums * scale, dq, first, first + 64, h * C, heads * C, False, PIECE)
    store(sums_rope * scale, dq, first, first + 64, h * C + NOPE, heads * C, False, PIECE)


@gluon.jit(do_not_specialize=["heads", "rows"])
def mla_dq_kernel(
    q, q_rope, kv, k_rope, o, do, start, lse, dq, top, delta, positions, heads, rows, scale, NOPE: gl.constexpr,
    ROPE: gl.constexpr, VALUE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    q_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, NOPE], q.layout)
    q_rope_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, ROPE], q_rope.layout)
    do_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, VALUE], do.layout)
    k_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, NOPE], kv.layout)
    k_rope_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, ROPE], k_rope.layout)
    v_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, VALUE], kv.layout)
    held, _ = ring(2, 1)
    full, empty = ring(STAGES, 1, READERS=2)
    gl.warp_specialize(
        [
            (_multiply, (o, lse, dq, top, delta, start, positions, heads, rows, scale, q_buf, q_rope_buf, do_buf, k_buf,
                         k_rope_buf, v_buf, held, full, empty, 0, NOPE, ROPE, VALUE, HEADS, STAGES, PIECE)),
            (_multiply, (o, lse, dq, top, delta, start, positions, heads, rows, scale, q_buf, q_rope_buf, do_buf, k_buf,
                         k_rope_buf, v_buf, held, full, empty, 1, NOPE, ROPE, VALUE, HEADS, STAGES, PIECE)),
            (_load, (q, q_rope, kv, k_rope, do, start, positions, heads, rows, q_buf, q_rope_buf, do_buf, k_buf,
                     k_rope_buf, v_buf, held, full, empty, NOPE, ROPE, VALUE, HEADS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def gradient(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `mla.dq_pass` returns: gradient of `q`; top and delta, both [B·H T] f32.

    q, kv, k_rope, o, do  as `mla.mla_attention` takes and returns them; T a multiple of `BLOCK`
    start                 [B T] i32, the first key that each query sees, or None: all from the first on
    lse                   [B H T] f32, natural logarithms of the sums of exponentials
    """
    batch, positions, heads, _ = q.shape
    rows = batch * heads
    top, delta = lse.new_empty(2, rows, positions)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def described(x: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.reshape(batch * positions, -1), [KEYS, columns], SWIZZLED)

    mla_dq_kernel[(positions // BLOCK * rows,)](
        described(q, NOPE), described(q, ROPE), described(kv, NOPE), described(k_rope, ROPE), o.contiguous(),
        described(do, VALUE), start, lse.contiguous(), dq, top, delta, positions, heads, rows, scale, NOPE, ROPE, VALUE,
        HEADS, STAGES, PIECE, num_warps=4,
    )  # fmt: skip
    return dq, top, delta
