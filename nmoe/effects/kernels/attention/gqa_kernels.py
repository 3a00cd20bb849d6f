"""The three kernels of flash attention for GQA: forward, gradient of queries, gradient of keys and values.

Letters: b sequence, h first query head of a program, g head of keys and values, m first query and n first key of a
block. A row is one query of one head.

`forward_kernel` and `dq_kernel` take `pack` heads of a group at once: a block then has few queries, and the keys that a
window lets the first and the last of them see are nearly the same. `dkv_kernel` owns a block of keys and goes through
the queries of its whole group. No atomics: every sum has one owner and one order, so that gradients are bitwise
repeatable. What documents and windows hide are the keys before a query's first one, which never decreases.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E, load_block, schedule, store_block_, visible


@triton.jit
def owned(positions, heads, kv_heads, rows, side_by_side, block_m: tl.constexpr, pack: tl.constexpr):
    """Sequence, first query head, head of keys, and block of queries of a program that owns rows; last ones first."""
    size: tl.constexpr = block_m // pack
    blocks = tl.cdiv(positions, size)
    index, row = schedule(blocks, rows, side_by_side)
    b = row // (heads // pack)
    h = row % (heads // pack) * pack
    return b, h, h // (heads // kv_heads), blocks - 1 - index


@triton.jit
def load_rows(x, at, inside, channels: tl.constexpr):
    """Rows [M C] that begin at the elements `at` of x; zeros where a query is not `inside`.

    By pointers, as a descriptor's block [size, pack, C] reshaped to rows stays in registers: ptxas of Triton 3.6 gives
    the probabilities the registers of the queries, and scores are wrong from the second step on (docs/log.md,
    2026-11-28). What is loaded as rows goes to shared memory, like every left operand that outlives a step.
    """
    return tl.load(x + at[:, None] + tl.arange(0, channels)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def store_rows_(x, b, m, h, value, block_m: tl.constexpr, pack: tl.constexpr, channels: tl.constexpr):
    x.store([b, m, h, 0], tl.reshape(value.to(x.dtype), (1, block_m // pack, pack, channels)))


@triton.jit
def first_keys(start, b, queries, positions, window, documents: tl.constexpr, windowed: tl.constexpr):
    """The first key that each query sees."""
    first = queries * 0
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=queries < positions, other=0)
    if windowed:
        first = tl.maximum(first, queries - window + 1)
    return first


@triton.jit
def key_ranges(
    start, b, m, positions, window, size: tl.constexpr, block_n: tl.constexpr, documents: tl.constexpr,
    windowed: tl.constexpr,
):  # fmt: skip
    """Key ranges of `size` queries: begin, full, diagonal, until.

    begin..full is masked by documents and window, full..diagonal is not masked, diagonal..until is masked causally.
    """
    diagonal = m // block_n * block_n
    until = tl.minimum(m + size, positions)
    begin = first_keys(start, b, m, positions, window, documents, windowed) // block_n * block_n
    last = first_keys(start, b, until - 1, positions, window, documents, windowed)
    return begin, tl.minimum(tl.cdiv(last, block_n) * block_n, diagonal), diagonal, until


@triton.jit
def forward_range(
    acc, row_sum, row_max, q, queries, first_key, k, v, b, g, begin, end, scale2, block_n: tl.constexpr,
    channels: tl.constexpr, masked: tl.constexpr, limited: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin..end: rescales the accumulator whenever a row's maximum grows."""
    for n in tl.range(begin, end, block_n):
        s = tl.dot(q, load_block(k, b, g, n, block_n, channels).T)
        if masked:
            # Scaled before the comparison: a hidden score minus itself must be exactly zero.
            keys = n + tl.arange(0, block_n)
            s = tl.where(visible(queries[:, None], keys[None, :], first_key[:, None], limited), s * scale2, HIDDEN)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
        else:
            # scale > 0 (checked by the caller), so the maximum may be taken before scaling: one pass less over s.
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), load_block(v, b, g, n, block_n, channels), acc * rescale[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def forward_kernel(
    q, k, v, o, lse, sinks, start, q_by_batch, q_by_position, q_by_head, positions, padded, heads, kv_heads, rows,
    window, scale, block_m: tl.constexpr, block_n: tl.constexpr, side_by_side: tl.constexpr, pack: tl.constexpr,
    channels: tl.constexpr, documents: tl.constexpr, windowed: tl.constexpr, sunk: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Output of one block of queries of `pack` heads, and the logarithm to base 2 of each row's sum of exponentials."""
    limited: tl.constexpr = documents or windowed
    size: tl.constexpr = block_m // pack
    b, h, g, index = owned(positions, heads, kv_heads, rows, side_by_side, block_m, pack)
    m = index * size
    row = tl.arange(0, block_m)
    queries = m + row // pack
    inside = queries < positions
    first_key = first_keys(start, b, queries, positions, window, documents, windowed)
    at = b.to(tl.int64) * q_by_batch + queries.to(tl.int64) * q_by_position + (h + row % pack) * q_by_head
    tile = load_rows(q, at, inside, channels)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, channels], tl.float32)
    # The sink is a key that comes first and has no value.
    if sunk:
        row_max = tl.load(sinks + h + row % pack).to(tl.float32) * LOG2_E
        row_sum = tl.full([block_m], 1.0, tl.float32)
    else:
        row_max = tl.full([block_m], float("-inf"), tl.float32)
        row_sum = tl.zeros([block_m], tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, window, size, block_n, documents, windowed)
    # A window of few blocks is one loop, masked throughout, whose reads overlap: three loops of one step each wait.
    middle = begin
    if split:
        if limited:
            acc, row_sum, row_max = forward_range(
                acc, row_sum, row_max, tile, queries, first_key, k, v, b, g, begin, full, scale2, block_n, channels,
                True, limited,
            )  # fmt: skip
        acc, row_sum, row_max = forward_range(
            acc, row_sum, row_max, tile, queries, first_key, k, v, b, g, full, diagonal, scale2, block_n, channels,
            False, limited,
        )  # fmt: skip
        middle = diagonal
    acc, row_sum, row_max = forward_range(
        acc, row_sum, row_max, tile, queries, first_key, k, v, b, g, middle, until, scale2, block_n, channels, True,
        limited,
    )  # fmt: skip
    store_rows_(o, b, m, h, acc / row_sum[:, None], block_m, pack, channels)
    at = (b * heads + h + row % pack).to(tl.int64) * padded + queries
    tl.store(lse + at, row_max + tl.log2(row_sum), mask=inside)


@triton.jit
def dq_range(
    acc, q, do, lse, delta, queries, first_key, k, v, b, g, begin, end, scale2, block_n: tl.constexpr,
    channels: tl.constexpr, masked: tl.constexpr, limited: tl.constexpr,
):  # fmt: skip
    """Gradient of queries over keys begin..end; probabilities are recomputed from the log-sum-exp."""
    for n in tl.range(begin, end, block_n):
        keys = load_block(k, b, g, n, block_n, channels)
        s = tl.dot(q, keys.T)
        dp = tl.dot(do, load_block(v, b, g, n, block_n, channels).T)
        p = tl.exp2(s * scale2 - lse[:, None])
        if masked:
            at = n + tl.arange(0, block_n)
            p = tl.where(visible(queries[:, None], at[None, :], first_key[:, None], limited), p, 0.0)
        # Rounded to the input format for the tensor cores, as P is.
        acc = tl.dot((p * (dp - delta[:, None])).to(q.dtype), keys, acc)
    return acc


@triton.jit
def dq_kernel(
    q, k, v, o, do, dq, lse, delta, sinks, dsinks, start, q_by_batch, q_by_position, q_by_head, positions, padded,
    heads, kv_heads, rows, window, scale, block_m: tl.constexpr, block_n: tl.constexpr, side_by_side: tl.constexpr,
    pack: tl.constexpr, channels: tl.constexpr, documents: tl.constexpr, windowed: tl.constexpr, sunk: tl.constexpr,
    split: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of `pack` heads; what softmax takes off each of its rows; its part of dsinks."""
    limited: tl.constexpr = documents or windowed
    size: tl.constexpr = block_m // pack
    b, h, g, index = owned(positions, heads, kv_heads, rows, side_by_side, block_m, pack)
    m = index * size
    row = tl.arange(0, block_m)
    queries = m + row // pack
    inside = queries < positions
    first_key = first_keys(start, b, queries, positions, window, documents, windowed)
    head = h + row % pack
    at = ((b.to(tl.int64) * positions + queries) * heads + head) * channels  # o and do are contiguous
    gradient = load_rows(do, at, inside, channels)
    # delta = sum(dO * O) = sum(dP * P): the term that softmax subtracts from each row, without a pass of its own.
    output = load_rows(o, at, inside, channels)
    off = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    at = (b * heads + head).to(tl.int64) * padded + queries
    top = tl.load(lse + at, mask=inside, other=0.0)
    tl.store(delta + at, off, mask=inside)
    if sunk:
        sink = tl.load(sinks + h + row % pack).to(tl.float32) * LOG2_E
        # One part a block of queries, summed by the caller: the order of its sum never changes.
        part = tl.where(inside, -tl.exp2(sink - top) * off, 0.0)
        to = dsinks + (index * (rows // (heads // pack)) + b).to(tl.int64) * heads + h
        tl.store(to + tl.arange(0, pack), tl.sum(tl.reshape(part, (size, pack)), 0))
    at = b.to(tl.int64) * q_by_batch + queries.to(tl.int64) * q_by_position + head * q_by_head
    tile = load_rows(q, at, inside, channels)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, channels], tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, window, size, block_n, documents, windowed)
    middle = begin
    if split:
        if limited:
            acc = dq_range(
                acc, tile, gradient, top, off, queries, first_key, k, v, b, g, begin, full, scale2, block_n, channels,
                True, limited,
            )  # fmt: skip
        acc = dq_range(
            acc, tile, gradient, top, off, queries, first_key, k, v, b, g, full, diagonal, scale2, block_n, channels,
            False, limited,
        )  # fmt: skip
        middle = diagonal
    acc = dq_range(
        acc, tile, gradient, top, off, queries, first_key, k, v, b, g, middle, until, scale2, block_n, channels, True,
        limited,
    )  # fmt: skip
    store_rows_(dq, b, m, h, acc * scale, block_m, pack, channels)


@triton.jit
def dkv_range(
    acc, acc_v, keys, values, at, last, q, do, lse, delta, b, h, row, begin, end, scale2, block_m: tl.constexpr,
    channels: tl.constexpr, group: tl.constexpr, masked: tl.constexpr, limited: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values over queries begin..end of every head of the group."""
    # One loop over queries and heads, so that a head's first reads overlap with the last products of another.
    for step in tl.range(0, tl.cdiv(end - begin, block_m) * group):
        m = begin + step // group * block_m
        head = step % group
        tile = load_block(q, b, h + head, m, block_m, channels)
        gradient = load_block(do, b, h + head, m, block_m, channels)
        # Computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        dp = tl.dot(values, gradient.T)
        s = tl.dot(keys, tile.T)
        p = tl.exp2(s * scale2 - tl.reshape(lse.load([row + head, m]), (1, block_m)))
        if masked:
            queries = m + tl.arange(0, block_m)
            visible = queries[None, :] >= at[:, None]
            if limited:
                visible = visible & (queries[None, :] < last[:, None])
            p = tl.where(visible, p, 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        ds = (p * (dp - tl.reshape(delta.load([row + head, m]), (1, block_m)))).to(tile.dtype)
        acc = tl.dot(ds, tile, acc)
    return acc, acc_v


@triton.jit
def after_last(end, b, keys, positions, window, documents: tl.constexpr, windowed: tl.constexpr):
    """One past the last query that sees each key; `positions` at most."""
    last = keys * 0 + positions
    if documents:
        last = tl.load(end + b.to(tl.int64) * positions + keys, mask=keys < positions, other=0)
    if windowed:
        last = tl.minimum(last, keys + window)
    return last


@triton.jit
def dkv_kernel(
    q, k, v, do, dk, dv, lse, delta, end, positions, heads, kv_heads, rows, window, scale, block_m: tl.constexpr,
    block_n: tl.constexpr, side_by_side: tl.constexpr, group: tl.constexpr, channels: tl.constexpr,
    documents: tl.constexpr, windowed: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of keys and values of one head of theirs."""
    limited: tl.constexpr = documents or windowed
    # Blocks in ascending order: early keys are seen by most queries, so these are the long programs.
    index, kv = schedule(tl.cdiv(positions, block_n), rows, side_by_side)
    b = kv // kv_heads
    g = kv % kv_heads
    h = g * group
    row = b * heads + h
    n = index * block_n
    at = n + tl.arange(0, block_n)
    last = after_last(end, b, at, positions, window, documents, windowed)
    keys = load_block(k, b, g, n, block_n, channels)
    values = load_block(v, b, g, n, block_n, channels)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_n, channels], tl.float32)
    acc_v = tl.zeros([block_n, channels], tl.float32)
    middle = n // block_m * block_m
    until = after_last(end, b, tl.minimum(n + block_n, positions) - 1, positions, window, documents, windowed)
    until = tl.minimum(until, positions)
    if split:
        full = tl.cdiv(n + block_n - 1, block_m) * block_m
        acc, acc_v = dkv_range(
            acc, acc_v, keys, values, at, last, q, do, lse, delta, b, h, row, middle, tl.minimum(full, until), scale2,
            block_m, channels, group, True, limited,
        )  # fmt: skip
        middle = until
        if limited:
            middle = tl.minimum(after_last(end, b, n, positions, window, documents, windowed), positions)
            middle = tl.maximum(middle // block_m * block_m, full)
        acc, acc_v = dkv_range(
            acc, acc_v, keys, values, at, last, q, do, lse, delta, b, h, row, full, middle, scale2, block_m, channels,
            group, False, limited,
        )  # fmt: skip
    if limited or not split:
        acc, acc_v = dkv_range(
            acc, acc_v, keys, values, at, last, q, do, lse, delta, b, h, row, middle, until, scale2, block_m, channels,
            group, True, limited,
        )  # fmt: skip
    store_block_(dk, b, g, n, acc * scale, block_n, channels)
    store_block_(dv, b, g, n, acc_v, block_n, channels)
