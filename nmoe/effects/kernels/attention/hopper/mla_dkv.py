"""Gradients of keys and values of MLA for Hopper: one warp loads, two groups of four warps multiply.

A program takes 128 keys of one head. Each group owns 64 of them: their scores, their probabilities and the sums of both
gradients are its own, in registers, so that the groups share nothing but the ring of blocks of 64 queries, and one's
softmax lies behind the other's products. Letters are those of `mla_kernels`.
"""

from __future__ import annotations

import torch
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

from nmoe.effects.kernels.attention.hopper import BLOCK, SIZES
from nmoe.effects.kernels.attention.hopper.parts import operand, product, schedule, scores
from nmoe.effects.kernels.ring import SWIZZLED, barrier, claim, filled, ring

NOPE, ROPE, VALUE = SIZES

QUERIES = 64
"""Of a step, and keys of a group."""

STAGES = 2
"""Steps under way: 80 KB of shared memory, beside as much of keys and values."""

HEADS = 8
"""Whose programs run side by side: their queries stay in the L2 cache."""

SHIFT = gl.constexpr(14)
"""Of probabilities in fp16: the least normal one is 2^-28, and 1 has no overflow."""


@gluon.jit
def _last(end, b, positions, key):
    """One past the last query that sees a key."""
    if end is None:
        return positions
    else:
        return gl.load(end + b.to(gl.int64) * positions + key)


@gluon.jit
def _load(
    q, q_rope, kv, k_rope, do, top, delta, end, positions, padded, heads, rows, k_buf, k_rope_buf, v_buf, q_buf,
    q_rope_buf, do_buf, off_buf, held, full, empty, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    b, h, index = schedule(gl.program_id(0), positions // 128, rows, heads, HEADS)
    n = index * 128
    at = b * positions
    row = (b * heads + h).to(gl.int64) * padded
    inner = gl.arange(0, 64, layout=layout)
    for step in range(0, gl.cdiv(_last(end, b, positions, n + 127) - n, 64)):
        # The second group's keys come behind the first one's queries: it begins later, so that the two take turns.
        if step < 2:
            ready = held.index(step)
            mbarrier.expect(ready, 64 * (NOPE + ROPE + VALUE) * 2)
            here = at + n + step * 64
            tma.async_copy_global_to_shared(kv, [here, h * (NOPE + VALUE)], ready, k_buf.index(step))
            tma.async_copy_global_to_shared(k_rope, [here, 0], ready, k_rope_buf.index(step))
            tma.async_copy_global_to_shared(kv, [here, h * (NOPE + VALUE) + NOPE], ready, v_buf.index(step))
        m = n + step * 64
        stage, ready = claim(full, empty, step, 64 * (NOPE + ROPE + VALUE) * 2, STAGES)
        tma.async_copy_global_to_shared(q, [at + m, h * (NOPE + ROPE)], ready, q_buf.index(stage))
        tma.async_copy_global_to_shared(q_rope, [at + m, h * (NOPE + ROPE) + NOPE], ready, q_rope_buf.index(stage))
        tma.async_copy_global_to_shared(do, [at + m, h * VALUE], ready, do_buf.index(stage))
        async_copy.async_copy_global_to_shared(off_buf.index(2 * stage), top + row + m + inner)
        async_copy.async_copy_global_to_shared(off_buf.index(2 * stage + 1), delta + row + m + inner)
        async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _probabilities(s, off, last, after, scale2, FIRST: gl.constexpr, MASKED: gl.constexpr):
    """Of keys by queries, times 2 to the power of `SHIFT`.

    last    one past the last query that sees each key, at which queries end that are `after` the first key
    FIRST   the block on the diagonal
    MASKED  by `last`
    """
    layout: gl.constexpr = s.type.layout
    top = off.load(gl.SliceLayout(0, layout)) - SHIFT
    p = gl.exp2(s * scale2 - top[None, :])
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    query = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    if FIRST:
        p = gl.where(query[None, :] >= key[:, None], p, 0.0)
    if MASKED:
        p = gl.where((query + after)[None, :] < gl.load(last + key)[:, None], p, 0.0)
    return p


@gluon.jit
def _step(
    k, k_rope, v, dk, dk_rope, dv, step, last, n, scale2, q_buf, q_rope_buf, do_buf, off_buf, full, empty,
    STAGES: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add one block of queries to the sums of 64 keys."""
    stage = filled(full, step, STAGES)
    q, q_rope, do = q_buf.index(stage), q_rope_buf.index(stage), do_buf.index(stage)
    s = scores(k, k_rope, q, q_rope)
    s = warpgroup_mma_wait(0, deps=(s,))
    dtype: gl.constexpr = q.dtype
    p = _probabilities(s, off_buf.index(2 * stage), last, n + step * 64, scale2, FIRST, MASKED)
    # Kept in fp16, for its own product in the products' format: as fp32 it would have more registers than there are.
    kept, rounded = p.to(gl.float16), p.to(dtype)
    dp = product(v, do, 64)
    left = operand(rounded, dv.shape[1])
    dv = warpgroup_mma(left, do, dv, use_acc=not FIRST, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    off = off_buf.index(2 * stage + 1).load(gl.SliceLayout(0, kept.type.layout))
    ds = (kept.to(gl.float32) * (dp - off[None, :])).to(dtype)
    # ptxas may give a left side's registers to other values as soon as its product is begun, though the wait takes it:
    # tests/kernels/registers.py looks. Before the next product, which needs the registers, and after ds, which else
    # would be made behind it.
    dv, ds, left = warpgroup_mma_wait(0, deps=(dv, ds, left))
    left = operand(ds, dk.shape[1])
    dk = warpgroup_mma(left, q, dk, use_acc=not FIRST, is_async=True)
    dk_rope = warpgroup_mma(left, q_rope, dk_rope, use_acc=not FIRST, is_async=True)
    # All products end before the loop's next turn: ptxas lets them wait for one another otherwise (C7512).
    dk, dk_rope, dv, left = warpgroup_mma_wait(0, deps=(dk, dk_rope, dv, left))
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dk_rope, dv


@gluon.jit
def _multiply(
    dkv, dk_rope, end, positions, heads, rows, scale, k_buf, k_rope_buf, v_buf, q_buf, q_rope_buf, do_buf, off_buf,
    held, full, empty, PART: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
    HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NOPE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROPE, 16])
    broad: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE, 16])
    k, k_rope, v = k_buf.index(PART), k_rope_buf.index(PART), v_buf.index(PART)
    scale2 = scale * 1.4426950408889634  # exp2 is one instruction, exp is not
    b, h, index = schedule(gl.program_id(0), positions // 128, rows, heads, HEADS)
    n = index * 128
    masked: gl.constexpr = end is not None
    own = n + PART * 64
    last = end
    if masked:
        last = end + b.to(gl.int64) * positions + own
    # Up to the first query that does not see the first key nothing is masked but the diagonal.
    whole = gl.maximum((_last(end, b, positions, own) - n) // 64, PART + 1)
    steps = gl.cdiv(_last(end, b, positions, own + 63) - n, 64)
    mbarrier.wait(held.index(PART), 0)
    if PART == 1:  # no key of the second half is seen by the first queries
        mbarrier.arrive(empty.index(filled(full, 0, STAGES)), count=1)
    sum_k = gl.zeros((64, NOPE), gl.float32, wide)
    sum_rope = gl.zeros((64, ROPE), gl.float32, narrow)
    sum_v = gl.zeros((64, VALUE), gl.float32, broad)
    sum_k, sum_rope, sum_v = _step(
        k, k_rope, v, sum_k, sum_rope, sum_v, PART, last, n, scale2, q_buf, q_rope_buf, do_buf, off_buf, full, empty,
        STAGES, True, masked,
    )  # fmt: skip
    for step in range(PART + 1, whole):
        sum_k, sum_rope, sum_v = _step(
            k, k_rope, v, sum_k, sum_rope, sum_v, step, last, n, scale2, q_buf, q_rope_buf, do_buf, off_buf, full,
            empty, STAGES, False, False,
        )  # fmt: skip
    if masked:
        for step in range(whole, steps):
            sum_k, sum_rope, sum_v = _step(
                k, k_rope, v, sum_k, sum_rope, sum_v, step, last, n, scale2, q_buf, q_rope_buf, do_buf, off_buf, full,
                empty, STAGES, False, True,
            )  # fmt: skip
        if PART == 0:  # what the other group's keys alone are seen by
            for step in range(steps, gl.cdiv(_last(end, b, positions, n + 127) - n, 64)):
                mbarrier.arrive(empty.index(filled(full, step, STAGES)), count=1)
    # Found anew, in a way that no compiler sees through: kept through the loop it would have registers.
    pid = gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    b, h, index = schedule(pid, positions // 128, rows, heads, HEADS)
    n = index * 128
    factor = 1.0 / (1 << SHIFT)
    # Through where the operands were: no product reads them any longer.
    v.store((sum_v * factor).to(v.dtype))
    k.store((sum_k * (scale * factor)).to(v.dtype))
    k_rope.store((sum_rope * (scale * factor)).to(v.dtype))
    fence_async_shared()
    barrier()
    first = b * positions + n + PART * 64
    column = h * (NOPE + VALUE)
    tma.async_copy_shared_to_global(dkv, [first, column + NOPE], v)
    tma.async_copy_shared_to_global(dkv, [first, column], k)
    tma.async_copy_shared_to_global(dk_rope, [(b * heads + h) * positions + n + PART * 64, 0], k_rope)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "rows"])
def mla_dkv_kernel(
    q, q_rope, kv, k_rope, do, top, delta, end, dkv, dk_rope, positions, padded, heads, rows, scale,
    NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, NOPE], kv.layout)
    k_rope_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, ROPE], k_rope.layout)
    v_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, VALUE], kv.layout)
    q_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, NOPE], q.layout)
    q_rope_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, ROPE], q_rope.layout)
    do_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, VALUE], do.layout)
    off_buf = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    held, _ = ring(2, 1)
    full, empty = ring(STAGES, 1 + 32, READERS=2)
    gl.warp_specialize(
        [
            (_multiply, (dkv, dk_rope, end, positions, heads, rows, scale, k_buf, k_rope_buf, v_buf, q_buf, q_rope_buf,
                         do_buf, off_buf, held, full, empty, 0, NOPE, ROPE, VALUE, HEADS, STAGES)),
            (_multiply, (dkv, dk_rope, end, positions, heads, rows, scale, k_buf, k_rope_buf, v_buf, q_buf, q_rope_buf,
                         do_buf, off_buf, held, full, empty, 1, NOPE, ROPE, VALUE, HEADS, STAGES)),
            (_load, (q, q_rope, kv, k_rope, do, top, delta, end, positions, padded, heads, rows, k_buf, k_rope_buf,
                     v_buf, q_buf, q_rope_buf, do_buf, off_buf, held, full, empty, NOPE, ROPE, VALUE, HEADS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def gradients(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    end: Tensor | None,
    top: Tensor,
    delta: Tensor,
    do: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `kv`, and of `k_rope` one rounded part a head, [B H T P]; `mla.dkv_pass` adds them up.

    q, kv, k_rope, do  as `mla.mla_attention` takes them; T a multiple of `BLOCK`
    end                [B T] i32, one past the last query that sees each key, or None: all later ones
    top, delta         of `mla.dq_pass`
    """
    batch, positions, heads, _ = q.shape
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    parts = q.new_empty(batch, heads, positions, ROPE)

    def described(x: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.reshape(batch * positions, -1), [QUERIES, columns], SWIZZLED)

    mla_dkv_kernel[(positions // BLOCK * batch * heads,)](
        described(q, NOPE), described(q, ROPE), described(kv, NOPE), described(k_rope, ROPE), described(do, VALUE),
        top, delta, end, described(dkv, NOPE),
        TensorDescriptor.from_tensor(parts.view(-1, ROPE), [QUERIES, ROPE], SWIZZLED),
        positions, top.stride(0), heads, batch * heads, scale, NOPE, ROPE, VALUE, HEADS, STAGES, num_warps=4,
    )  # fmt: skip
    return dkv, parts
