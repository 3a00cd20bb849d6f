"""The three kernels of flash attention for MLA: forward, gradient of queries, gradient of keys and values.

Letters: b sequence, h head, m first query of a block of `block_m`, n first key of a block of `block_n`; `nope`, `rope`,
`value` are the padded channels of a head's own key, the shared rotated key and the value.

Channels are read through descriptors [B H T channels], which fill with zeros what a block has beyond a sequence's or a
head's end. Programs of `heads_per_group` heads run side by side, those with most to do first. No atomics: every sum has
one owner and one order, so that gradients are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LN_2, LOG2_E, load_block, schedule, store_block_, visible


@triton.jit
def key_ranges(start, b, m, positions, block_m: tl.constexpr, block_n: tl.constexpr, documents: tl.constexpr):
    """Key ranges of a block of queries: begin, full, diagonal, until.

    begin..full is masked by documents, full..diagonal is not masked, diagonal..until is masked causally.
    """
    diagonal = m // block_n * block_n
    until = tl.minimum(m + block_m, positions)
    if documents:
        at = start + b.to(tl.int64) * positions
        begin = tl.load(at + m) // block_n * block_n
        full = tl.minimum(tl.cdiv(tl.load(at + until - 1), block_n) * block_n, diagonal)
    else:
        begin = 0
        full = 0
    return begin, full, diagonal, until


@triton.jit
def forward_range(
    acc, row_sum, row_max, q, q_rope, queries, first_key, k, k_rope, v, b, h, begin, end, scale2,
    block_n: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr, masked: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin..end: rescales the accumulator whenever a row's maximum grows."""
    for n in tl.range(begin, end, block_n):
        # Own and shared channels are multiplied apart: whole keys are never assembled, 0.1 ms and a copy less.
        s = tl.dot(q, load_block(k, b, h, n, block_n, nope).T)
        s = tl.dot(q_rope, load_block(k_rope, b, 0, n, block_n, rope).T, s)
        if masked:
            # Scaled before the comparison: a hidden score minus itself must be exactly zero.
            keys = n + tl.arange(0, block_n)
            s = tl.where(visible(queries[:, None], keys[None, :], first_key[:, None], documents), s * scale2, HIDDEN)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
        else:
            # scale > 0 (checked by the caller), so the maximum may be taken before scaling: one pass less over s.
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), load_block(v, b, h, n, block_n, value), acc * rescale[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def forward_kernel(
    q, q_rope, k, k_rope, v, o, lse, start, positions, heads, rows, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, heads_per_group: tl.constexpr, nope: tl.constexpr,
    rope: tl.constexpr, value: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Output of one block of queries of one head."""
    blocks = tl.cdiv(positions, block_m)
    index, row = schedule(blocks, rows, heads_per_group)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * block_m
    queries = m + tl.arange(0, block_m)
    first_key = queries
    if documents:
        first_key = tl.load(start + b.to(tl.int64) * positions + queries, mask=queries < positions, other=0)
    tile = load_block(q, b, h, m, block_m, nope)
    tile_rope = load_block(q_rope, b, h, m, block_m, rope)
    scale2 = scale * LOG2_E
    # 128 x 128, 8 warps, 2 stages: 1.51 ms forward at 8 x 4096 x 16 heads on an H200, docs/log.md, 2026-11-24.
    acc = tl.zeros([block_m, value], tl.float32)
    row_sum = tl.zeros([block_m], tl.float32)
    row_max = tl.full([block_m], float("-inf"), tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, block_m, block_n, documents)
    if documents:
        acc, row_sum, row_max = forward_range(
            acc, row_sum, row_max, tile, tile_rope, queries, first_key, k, k_rope, v, b, h, begin, full, scale2,
            block_n, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, row_sum, row_max = forward_range(
        acc, row_sum, row_max, tile, tile_rope, queries, first_key, k, k_rope, v, b, h, full, diagonal, scale2,
        block_n, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, row_sum, row_max = forward_range(
        acc, row_sum, row_max, tile, tile_rope, queries, first_key, k, k_rope, v, b, h, diagonal, until, scale2,
        block_n, nope, rope, value, True, documents,
    )  # fmt: skip
    store_block_(o, b, h, m, acc / row_sum[:, None], block_m, value)
    at = lse + row.to(tl.int64) * positions + queries
    tl.store(at, (row_max + tl.log2(row_sum)) * LN_2, mask=queries < positions)


@triton.jit
def dq_range(
    acc, acc_rope, q, q_rope, do, lse2, delta, queries, first_key, k, k_rope, v, b, h, begin, end, scale2,
    block_n: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr, masked: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Gradient of queries over keys begin..end; probabilities are recomputed from the log-sum-exp."""
    for n in tl.range(begin, end, block_n):
        keys = load_block(k, b, h, n, block_n, nope)
        keys_rope = load_block(k_rope, b, 0, n, block_n, rope)
        s = tl.dot(q, keys.T)
        s = tl.dot(q_rope, keys_rope.T, s)
        dp = tl.dot(do, load_block(v, b, h, n, block_n, value).T)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if masked:
            at = n + tl.arange(0, block_n)
            p = tl.where(visible(queries[:, None], at[None, :], first_key[:, None], documents), p, 0.0)
        # Rounded to the input format for the tensor cores, as P is: error 2.4e-3 against fp64, that of cuDNN.
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        acc = tl.dot(ds, keys, acc)
        acc_rope = tl.dot(ds, keys_rope, acc_rope)
    return acc, acc_rope


@triton.jit
def dq_kernel(
    q, q_rope, k, k_rope, v, o, do, dq, dq_rope, lse, top, delta, padded, start, positions, heads, rows, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, heads_per_group: tl.constexpr, nope: tl.constexpr,
    rope: tl.constexpr, value: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of one head, and for `dkv_kernel` what softmax takes off each of its rows."""
    blocks = tl.cdiv(positions, block_m)
    index, row = schedule(blocks, rows, heads_per_group)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * block_m
    queries = m + tl.arange(0, block_m)
    inside = queries < positions
    first_key = queries
    if documents:
        first_key = tl.load(start + b.to(tl.int64) * positions + queries, mask=inside, other=0)
    gradient = load_block(do, b, h, m, block_m, value)
    # delta = sum(dO * O) = sum(dP * P): the term that softmax subtracts from each row, without a pass of its own.
    off = tl.sum(gradient.to(tl.float32) * load_block(o, b, h, m, block_m, value).to(tl.float32), 1)
    lse2 = tl.load(lse + row.to(tl.int64) * positions + queries, mask=inside, other=0.0) * LOG2_E
    at = row.to(tl.int64) * padded + queries
    tl.store(top + at, lse2, mask=inside)
    tl.store(delta + at, off, mask=inside)
    tile = load_block(q, b, h, m, block_m, nope)
    tile_rope = load_block(q_rope, b, h, m, block_m, rope)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, nope], tl.float32)
    acc_rope = tl.zeros([block_m, rope], tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, block_m, block_n, documents)
    if documents:
        acc, acc_rope = dq_range(
            acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first_key, k, k_rope, v, b, h, begin, full,
            scale2, block_n, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first_key, k, k_rope, v, b, h, full, diagonal,
        scale2, block_n, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first_key, k, k_rope, v, b, h, diagonal, until,
        scale2, block_n, nope, rope, value, True, documents,
    )  # fmt: skip
    store_block_(dq, b, h, m, acc * scale, block_m, nope)
    store_block_(dq_rope, b, h, m, acc_rope * scale, block_m, rope)


@triton.jit
def dkv_range(
    acc, acc_rope, acc_v, keys, keys_rope, values, at, last, q, q_rope, do, top, delta, row, b, h, begin, end, scale2,
    block_m: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr, masked: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values over queries begin..end."""
    for m in tl.range(begin, end, block_m):
        tile = load_block(q, b, h, m, block_m, nope)
        tile_rope = load_block(q_rope, b, h, m, block_m, rope)
        gradient = load_block(do, b, h, m, block_m, value)
        # Computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        dp = tl.dot(values, gradient.T)
        s = tl.dot(keys, tile.T)
        s = tl.dot(keys_rope, tile_rope.T, s)
        p = tl.exp2(s * scale2 - tl.reshape(top.load([row, m]), (1, block_m)))
        if masked:
            queries = m + tl.arange(0, block_m)
            visible = queries[None, :] >= at[:, None]
            if documents:
                visible = visible & (queries[None, :] < last[:, None])
            p = tl.where(visible, p, 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        ds = (p * (dp - tl.reshape(delta.load([row, m]), (1, block_m)))).to(tile.dtype)
        acc = tl.dot(ds, tile, acc)
        acc_rope = tl.dot(ds, tile_rope, acc_rope)
    return acc, acc_rope, acc_v


@triton.jit
def dkv_kernel(
    q, q_rope, k, k_rope, v, do, dk, dk_rope, dv, top, delta, end, positions, heads, rows, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, heads_per_group: tl.constexpr, nope: tl.constexpr,
    rope: tl.constexpr, value: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of keys and values of one head."""
    # Blocks in ascending order: early keys are seen by most queries, so these are the long programs.
    index, row = schedule(tl.cdiv(positions, block_n), rows, heads_per_group)
    b = row // heads
    h = row % heads
    n = index * block_n
    at = n + tl.arange(0, block_n)
    keys = load_block(k, b, h, n, block_n, nope)
    keys_rope = load_block(k_rope, b, 0, n, block_n, rope)
    values = load_block(v, b, h, n, block_n, value)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_n, nope], tl.float32)
    acc_rope = tl.zeros([block_n, rope], tl.float32)
    acc_v = tl.zeros([block_n, value], tl.float32)
    # 32 queries by 64 keys, 4 warps, 3 stages: 2.77 ms on an H200 (2 stages: 2.94); 64 queries spill on sm_90.
    begin = n // block_m * block_m
    full = tl.cdiv(n + block_n - 1, block_m) * block_m
    until = positions
    split = positions
    last = at
    if documents:
        end += b.to(tl.int64) * positions
        last = tl.load(end + at, mask=at < positions, other=0)
        until = tl.load(end + tl.minimum(n + block_n, positions) - 1)
        split = tl.maximum(tl.load(end + n) // block_m * block_m, full)
    acc, acc_rope, acc_v = dkv_range(
        acc, acc_rope, acc_v, keys, keys_rope, values, at, last, q, q_rope, do, top, delta, row, b, h, begin,
        tl.minimum(full, until), scale2, block_m, nope, rope, value, True, documents,
    )  # fmt: skip
    acc, acc_rope, acc_v = dkv_range(
        acc, acc_rope, acc_v, keys, keys_rope, values, at, last, q, q_rope, do, top, delta, row, b, h, full,
        split, scale2, block_m, nope, rope, value, False, documents,
    )  # fmt: skip
    if documents:
        acc, acc_rope, acc_v = dkv_range(
            acc, acc_rope, acc_v, keys, keys_rope, values, at, last, q, q_rope, do, top, delta, row, b, h, split,
            until, scale2, block_m, nope, rope, value, True, documents,
        )  # fmt: skip
    store_block_(dk, b, h, n, acc * scale, block_n, nope)
    store_block_(dk_rope, b, h, n, acc_rope * scale, block_n, rope)
    store_block_(dv, b, h, n, acc_v, block_n, value)
