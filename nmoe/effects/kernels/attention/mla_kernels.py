"""The three kernels of `kernels.attend_mla`: output of a block of queries, its gradient, gradient of a block of keys.

Channels are read through descriptors [B H T channels], which fill with zeros what a block has beyond a sequence's or a
head's end. Programs of some heads run side by side, those with most to do first.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def schedule(blocks, rows, heads_per_group: tl.constexpr):
    """Block and (sequence, head) of this program: first blocks of `heads_per_group` heads, then their second ones, ...

    Together they stay within the cache; the long ones come first, so that no long one is alone at the end.
    """
    per_group = blocks * heads_per_group
    group = tl.program_id(0) // per_group
    within = tl.program_id(0) % per_group
    width = tl.minimum(rows - group * heads_per_group, heads_per_group)
    return within // width, group * heads_per_group + within % width


@triton.jit
def block(x, b, h, t, size: tl.constexpr, channels: tl.constexpr):
    return tl.reshape(x.load([b, h, t, 0]), (size, channels))


@triton.jit
def put_(x, b, h, t, value, size: tl.constexpr, channels: tl.constexpr):
    x.store([b, h, t, 0], tl.reshape(value.to(x.dtype), (1, 1, size, channels)))


@triton.jit
def visible(queries, keys, first, documents: tl.constexpr):
    """Where a query sees a key; the three broadcast."""
    seen = queries >= keys
    if documents:
        seen = seen & (first <= keys)
    return seen


@triton.jit
def key_ranges(start, b, m, positions, block_m: tl.constexpr, block_n: tl.constexpr, documents: tl.constexpr):
    """Keys of a block of queries: from where to where every query sees all, and the whole."""
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
    acc,
    total,
    top,
    q,
    q_rope,
    queries,
    first,
    k,
    k_rope,
    v,
    b,
    h,
    begin,
    end,
    scale2,
    block_n: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for n in tl.range(begin, end, block_n):
        s = tl.dot(q, block(k, b, h, n, block_n, nope).T)
        s = tl.dot(q_rope, block(k_rope, b, 0, n, block_n, rope).T, s)
        if masked:
            # Scaled before the comparison: a hidden score minus itself must be exactly zero.
            keys = n + tl.arange(0, block_n)
            s = tl.where(visible(queries[:, None], keys[None, :], first[:, None], documents), s * scale2, HIDDEN)
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        else:
            higher = tl.maximum(top, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), block(v, b, h, n, block_n, value), acc * shrink[:, None])
        top = higher
    return acc, total, top


@triton.jit
def forward_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    o,
    lse,
    start,
    positions,
    heads,
    rows,
    scale,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    heads_per_group: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Output of one block of queries of one head."""
    blocks = tl.cdiv(positions, block_m)
    index, row = schedule(blocks, rows, heads_per_group)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * block_m
    queries = m + tl.arange(0, block_m)
    first = queries
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=queries < positions, other=0)
    tile = block(q, b, h, m, block_m, nope)
    tile_rope = block(q_rope, b, h, m, block_m, rope)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, value], tl.float32)
    total = tl.zeros([block_m], tl.float32)
    top = tl.full([block_m], float("-inf"), tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, block_m, block_n, documents)
    if documents:
        acc, total, top = forward_range(
            acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, begin, full, scale2,
            block_n, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, total, top = forward_range(
        acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, full, diagonal, scale2,
        block_n, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, total, top = forward_range(
        acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, diagonal, until, scale2,
        block_n, nope, rope, value, True, documents,
    )  # fmt: skip
    put_(o, b, h, m, acc / total[:, None], block_m, value)
    at = lse + row.to(tl.int64) * positions + queries
    tl.store(at, (top + tl.log2(total)) * LN_2, mask=queries < positions)


@triton.jit
def dq_range(
    acc,
    acc_rope,
    q,
    q_rope,
    do,
    lse2,
    delta,
    queries,
    first,
    k,
    k_rope,
    v,
    b,
    h,
    begin,
    end,
    scale2,
    block_n: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for n in tl.range(begin, end, block_n):
        keys = block(k, b, h, n, block_n, nope)
        keys_rope = block(k_rope, b, 0, n, block_n, rope)
        s = tl.dot(q, keys.T)
        s = tl.dot(q_rope, keys_rope.T, s)
        dp = tl.dot(do, block(v, b, h, n, block_n, value).T)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if masked:
            at = n + tl.arange(0, block_n)
            p = tl.where(visible(queries[:, None], at[None, :], first[:, None], documents), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        acc = tl.dot(ds, keys, acc)
        acc_rope = tl.dot(ds, keys_rope, acc_rope)
    return acc, acc_rope


@triton.jit
def dq_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    o,
    do,
    dq,
    dq_rope,
    lse,
    top,
    delta,
    padded,
    start,
    positions,
    heads,
    rows,
    scale,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    heads_per_group: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Gradient of one block of queries of one head, and for `dkv_kernel` what softmax takes off each of its rows."""
    blocks = tl.cdiv(positions, block_m)
    index, row = schedule(blocks, rows, heads_per_group)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * block_m
    queries = m + tl.arange(0, block_m)
    inside = queries < positions
    first = queries
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=inside, other=0)
    gradient = block(do, b, h, m, block_m, value)
    off = tl.sum(gradient.to(tl.float32) * block(o, b, h, m, block_m, value).to(tl.float32), 1)
    lse2 = tl.load(lse + row.to(tl.int64) * positions + queries, mask=inside, other=0.0) * LOG2_E
    at = row.to(tl.int64) * padded + queries
    tl.store(top + at, lse2, mask=inside)
    tl.store(delta + at, off, mask=inside)
    tile = block(q, b, h, m, block_m, nope)
    tile_rope = block(q_rope, b, h, m, block_m, rope)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, nope], tl.float32)
    acc_rope = tl.zeros([block_m, rope], tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, block_m, block_n, documents)
    if documents:
        acc, acc_rope = dq_range(
            acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, begin, full,
            scale2, block_n, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, full, diagonal,
        scale2, block_n, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, diagonal, until,
        scale2, block_n, nope, rope, value, True, documents,
    )  # fmt: skip
    put_(dq, b, h, m, acc * scale, block_m, nope)
    put_(dq_rope, b, h, m, acc_rope * scale, block_m, rope)


@triton.jit
def dkv_range(
    acc,
    acc_rope,
    acc_v,
    keys,
    keys_rope,
    values,
    at,
    last,
    q,
    q_rope,
    do,
    top,
    delta,
    row,
    b,
    h,
    begin,
    end,
    scale2,
    block_m: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for m in tl.range(begin, end, block_m):
        tile = block(q, b, h, m, block_m, nope)
        tile_rope = block(q_rope, b, h, m, block_m, rope)
        gradient = block(do, b, h, m, block_m, value)
        # Computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        dp = tl.dot(values, gradient.T)
        s = tl.dot(keys, tile.T)
        s = tl.dot(keys_rope, tile_rope.T, s)
        p = tl.exp2(s * scale2 - tl.reshape(top.load([row, m]), (1, block_m)))
        if masked:
            queries = m + tl.arange(0, block_m)
            seen = queries[None, :] >= at[:, None]
            if documents:
                seen = seen & (queries[None, :] < last[:, None])
            p = tl.where(seen, p, 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        ds = (p * (dp - tl.reshape(delta.load([row, m]), (1, block_m)))).to(tile.dtype)
        acc = tl.dot(ds, tile, acc)
        acc_rope = tl.dot(ds, tile_rope, acc_rope)
    return acc, acc_rope, acc_v


@triton.jit
def dkv_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    do,
    dk,
    dk_rope,
    dv,
    top,
    delta,
    end,
    positions,
    heads,
    rows,
    scale,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    heads_per_group: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Gradient of one block of keys and values of one head."""
    index, row = schedule(tl.cdiv(positions, block_n), rows, heads_per_group)
    b = row // heads
    h = row % heads
    n = index * block_n
    at = n + tl.arange(0, block_n)
    keys = block(k, b, h, n, block_n, nope)
    keys_rope = block(k_rope, b, 0, n, block_n, rope)
    values = block(v, b, h, n, block_n, value)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_n, nope], tl.float32)
    acc_rope = tl.zeros([block_n, rope], tl.float32)
    acc_v = tl.zeros([block_n, value], tl.float32)
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
    put_(dk, b, h, n, acc * scale, block_n, nope)
    put_(dk_rope, b, h, n, acc_rope * scale, block_n, rope)
    put_(dv, b, h, n, acc_v, block_n, value)
