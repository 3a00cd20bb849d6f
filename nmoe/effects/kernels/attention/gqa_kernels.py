"""The three kernels of flash attention for GQA: forward, gradient of queries, gradient of keys and values.

Letters: b sequence, h first query head of a program, g head of keys and values, m first query and n first key of a
block. A row is one query of one head. A key has `width` channels: `near`, a power of two, and `far` behind them,
rounded up to one, 0 where there are none; `value` those of a value, rounded up. What ends in `_far` belongs to the far.

`forward_kernel` and `dq_kernel` take `pack` heads of a group at once: a block then has few queries, and the keys that a
window lets the first and the last of them see are nearly the same. `dkv_kernel` owns a block of keys and goes through
the queries of its whole group. No atomics: every sum has one owner and one order, so that gradients are bitwise
repeatable. What documents and windows hide are the keys before a query's first one, which never decreases.

Keys may stand for blocks of tokens, `compressed`: such a key stands at the last token of its block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E, load_block, schedule, store_block_, visible

PARTS = tl.constexpr(1024)
"""Parts of a sink's gradient that are added at once."""

GENERAL = ("positions",)
"""Integers of which the compiled code assumes nothing: ptxas 12.8 crashes on what Triton makes of one token, whose
number it takes for a constant (docs/log.md, 2026-11-29)."""


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
def load_rows(x, at, inside, width: tl.constexpr, first: tl.constexpr, channels: tl.constexpr):
    """Channels first .. first + channels - 1 of rows that begin at the elements `at` of x; zeros where a query is not
    `inside`, and from the channel `width` on.

    By pointers, as a descriptor's block [size, pack, C] reshaped to rows stays in registers: ptxas of Triton 3.6 gives
    the probabilities the registers of the queries, and scores are wrong from the second step on (docs/log.md,
    2026-11-28). What is loaded as rows goes to shared memory, like every left operand that outlives a step.
    """
    channel = first + tl.arange(0, channels)
    if first + channels <= width:
        return tl.load(x + at[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
    return tl.load(x + at[:, None] + channel[None, :], mask=inside[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def store_rows_(x, b, m, h, value, block_m: tl.constexpr, pack: tl.constexpr, channels: tl.constexpr):
    x.store([b, m, h, 0], tl.reshape(value.to(x.dtype), (1, block_m // pack, pack, channels)))


@triton.jit
def tokens_of(begins, b, keys, positions, num_keys, block, stride, compressed: tl.constexpr, documents: tl.constexpr):
    """Where each key stands: of a block its last token, beyond the row where there is no block."""
    at = keys
    if compressed:
        at = keys * stride + block - 1
        if documents:
            begin = tl.load(begins + b.to(tl.int64) * num_keys + keys, mask=keys < num_keys, other=0)
            at = tl.where(keys < num_keys, begin, positions) + block - 1
    return at


@triton.jit
def first_tokens(
    start, b, queries, positions, window, block, compressed: tl.constexpr, documents: tl.constexpr,
    windowed: tl.constexpr,
):  # fmt: skip
    """The first token at which a key that each query sees may stand."""
    first = queries * 0
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=queries < positions, other=0)
    if windowed:
        first = tl.maximum(first, queries - window + 1)
    if compressed:
        first += block - 1
    return first


@triton.jit
def blocks_before(tokens, block, stride):
    """Blocks of whole rows that end within the first `tokens`."""
    return tl.where(tokens >= block, (tokens - block) // stride + 1, 0)


@triton.jit
def key_ranges(
    start, b, m, positions, num_keys, window, block, stride, size: tl.constexpr, block_n: tl.constexpr,
    compressed: tl.constexpr, documents: tl.constexpr, windowed: tl.constexpr,
):  # fmt: skip
    """Key ranges of `size` queries: begin, full, diagonal, until.

    begin..full is masked by documents and window, full..diagonal is not masked, diagonal..until is masked causally.
    """
    end = tl.minimum(m + size, positions)
    if compressed:
        until = tl.minimum(blocks_before(end, block, stride), num_keys)
        begin = m * 0
        diagonal = blocks_before(m + 1, block, stride) // block_n * block_n
        if documents:
            # a row has places of no block among those of its blocks: all are masked
            begin = tl.load(start + b.to(tl.int64) * positions + m) // stride // block_n * block_n
            diagonal = begin
        full = begin
    else:
        until = end
        diagonal = m // block_n * block_n
        begin = first_tokens(start, b, m, positions, window, block, False, documents, windowed) // block_n * block_n
        last = first_tokens(start, b, end - 1, positions, window, block, False, documents, windowed)
        full = tl.minimum(tl.cdiv(last, block_n) * block_n, diagonal)
    return begin, full, diagonal, until


@triton.jit
def forward_range(
    acc, row_sum, row_max, q, q_far, queries, first, k, k_far, v, begins, b, g, begin, end, positions, num_keys, block,
    stride, scale2, block_n: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value: tl.constexpr,
    masked: tl.constexpr, limited: tl.constexpr, compressed: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin..end: rescales the accumulator whenever a row's maximum grows."""
    for n in tl.range(begin, end, block_n):
        s = tl.dot(q, load_block(k, b, g, n, block_n, near).T)
        if far > 0:
            s = tl.dot(q_far, load_block(k_far, b, g, n, block_n, far).T, s)
        if masked:
            # Scaled before the comparison: a hidden score minus itself must be exactly zero.
            keys = n + tl.arange(0, block_n)
            at = tokens_of(begins, b, keys, positions, num_keys, block, stride, compressed, documents)
            s = tl.where(visible(queries[:, None], at[None, :], first[:, None], limited), s * scale2, HIDDEN)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
        else:
            # scale > 0 (checked by the caller), so the maximum may be taken before scaling: one pass less over s.
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), load_block(v, b, g, n, block_n, value), acc * rescale[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=GENERAL)
def forward_kernel(
    q, k, k_far, v, o, lse, sinks, start, begins, q_by_batch, q_by_position, q_by_head, positions, padded, num_keys,
    heads, kv_heads, rows, window, block, stride, scale, block_m: tl.constexpr, block_n: tl.constexpr,
    side_by_side: tl.constexpr, pack: tl.constexpr, width: tl.constexpr, near: tl.constexpr, far: tl.constexpr,
    value: tl.constexpr, compressed: tl.constexpr, documents: tl.constexpr, windowed: tl.constexpr,
    sunk: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Output of one block of queries of `pack` heads, and the logarithm to base 2 of each row's sum of exponentials.

    A row that sees no key, as there may be where keys are `compressed`, has zeros and the logarithm 0.
    """
    limited: tl.constexpr = documents or windowed
    size: tl.constexpr = block_m // pack
    b, h, g, index = owned(positions, heads, kv_heads, rows, side_by_side, block_m, pack)
    m = index * size
    row = tl.arange(0, block_m)
    queries = m + row // pack
    inside = queries < positions
    first = first_tokens(start, b, queries, positions, window, block, compressed, documents, windowed)
    at = b.to(tl.int64) * q_by_batch + queries.to(tl.int64) * q_by_position + (h + row % pack) * q_by_head
    tile = load_rows(q, at, inside, width, 0, near)
    tile_far = tile
    if far > 0:
        tile_far = load_rows(q, at, inside, width, near, far)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, value], tl.float32)
    # The sink is a key that comes first and has no value.
    if sunk:
        row_max = tl.load(sinks + h + row % pack).to(tl.float32) * LOG2_E
        row_sum = tl.full([block_m], 1.0, tl.float32)
    else:
        row_max = tl.full([block_m], float("-inf"), tl.float32)
        row_sum = tl.zeros([block_m], tl.float32)
    begin, full, diagonal, until = key_ranges(
        start, b, m, positions, num_keys, window, block, stride, size, block_n, compressed, documents, windowed
    )
    # A window of few blocks is one loop, masked throughout, whose reads overlap: three loops of one step each wait.
    middle = begin
    if split:
        if limited:
            acc, row_sum, row_max = forward_range(
                acc, row_sum, row_max, tile, tile_far, queries, first, k, k_far, v, begins, b, g, begin, full,
                positions, num_keys, block, stride, scale2, block_n, near, far, value, True, limited, compressed,
                documents,
            )  # fmt: skip
        acc, row_sum, row_max = forward_range(
            acc, row_sum, row_max, tile, tile_far, queries, first, k, k_far, v, begins, b, g, full, diagonal,
            positions, num_keys, block, stride, scale2, block_n, near, far, value, False, limited, compressed,
            documents,
        )  # fmt: skip
        middle = diagonal
    acc, row_sum, row_max = forward_range(
        acc, row_sum, row_max, tile, tile_far, queries, first, k, k_far, v, begins, b, g, middle, until, positions,
        num_keys, block, stride, scale2, block_n, near, far, value, True, limited, compressed, documents,
    )  # fmt: skip
    sees = row_max > 0.5 * HIDDEN
    if compressed:
        row_sum = tl.where(sees, row_sum, 1.0)
        acc = tl.where(sees[:, None], acc, 0.0)
    top = row_max + tl.log2(row_sum)
    if compressed:
        top = tl.where(sees, top, 0.0)
    store_rows_(o, b, m, h, acc / row_sum[:, None], block_m, pack, value)
    at = (b * heads + h + row % pack).to(tl.int64) * padded + queries
    tl.store(lse + at, top, mask=inside)


@triton.jit
def dq_range(
    acc, acc_far, q, q_far, do, lse, delta, queries, first, k, k_far, v, begins, b, g, begin, end, positions, num_keys,
    block, stride, scale2, block_n: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value: tl.constexpr,
    masked: tl.constexpr, limited: tl.constexpr, compressed: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradient of queries over keys begin..end; probabilities are recomputed from the log-sum-exp."""
    for n in tl.range(begin, end, block_n):
        keys = load_block(k, b, g, n, block_n, near)
        s = tl.dot(q, keys.T)
        if far > 0:
            keys_far = load_block(k_far, b, g, n, block_n, far)
            s = tl.dot(q_far, keys_far.T, s)
        dp = tl.dot(do, load_block(v, b, g, n, block_n, value).T)
        p = tl.exp2(s * scale2 - lse[:, None])
        if masked:
            at = n + tl.arange(0, block_n)
            at = tokens_of(begins, b, at, positions, num_keys, block, stride, compressed, documents)
            p = tl.where(visible(queries[:, None], at[None, :], first[:, None], limited), p, 0.0)
        # Rounded to the input format for the tensor cores, as P is.
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        acc = tl.dot(ds, keys, acc)
        if far > 0:
            acc_far = tl.dot(ds, keys_far, acc_far)
    return acc, acc_far


@triton.jit(do_not_specialize=GENERAL)
def dq_kernel(
    q, k, k_far, v, o, do, dq, dq_far, lse, delta, sinks, sink_parts, start, begins, q_by_batch, q_by_position,
    q_by_head, positions, padded, num_keys, heads, kv_heads, rows, window, block, stride, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, side_by_side: tl.constexpr, pack: tl.constexpr, width: tl.constexpr,
    near: tl.constexpr, far: tl.constexpr, value_width: tl.constexpr, value: tl.constexpr, compressed: tl.constexpr,
    documents: tl.constexpr, windowed: tl.constexpr, sunk: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of `pack` heads; what softmax takes off each of its rows; its part of dsinks."""
    limited: tl.constexpr = documents or windowed
    size: tl.constexpr = block_m // pack
    b, h, g, index = owned(positions, heads, kv_heads, rows, side_by_side, block_m, pack)
    m = index * size
    row = tl.arange(0, block_m)
    queries = m + row // pack
    inside = queries < positions
    first = first_tokens(start, b, queries, positions, window, block, compressed, documents, windowed)
    head = h + row % pack
    at = ((b.to(tl.int64) * positions + queries) * heads + head) * value_width  # o and do are contiguous
    gradient = load_rows(do, at, inside, value_width, 0, value)
    output = load_rows(o, at, inside, value_width, 0, value)
    to = (b * heads + head).to(tl.int64) * padded + queries
    top = tl.load(lse + to, mask=inside, other=0.0)
    at = b.to(tl.int64) * q_by_batch + queries.to(tl.int64) * q_by_position + head * q_by_head
    tile = load_rows(q, at, inside, width, 0, near)
    acc = tl.zeros([block_m, near], tl.float32)
    tile_far, acc_far = tile, top
    if far > 0:
        tile_far = load_rows(q, at, inside, width, near, far)
        acc_far = tl.zeros([block_m, far], tl.float32)
    sink = top
    if sunk:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    # All that is read comes first: no load waits for what is made of another.
    # delta = sum(dO * O) = sum(dP * P): the term that softmax subtracts from each row, without a pass of its own.
    off = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + to, off, mask=inside)
    if sunk:
        # One part a block of queries, summed by `dkv_kernel`: the order of its sum never changes.
        part = tl.where(inside, -tl.exp2(sink - top) * off, 0.0)
        blocks = tl.cdiv(positions, size)
        to = (h + tl.arange(0, pack)).to(tl.int64) * (rows // (heads // pack) * blocks) + b * blocks + index
        tl.store(sink_parts + to, tl.sum(tl.reshape(part, (size, pack)), 0))
    scale2 = scale * LOG2_E
    begin, full, diagonal, until = key_ranges(
        start, b, m, positions, num_keys, window, block, stride, size, block_n, compressed, documents, windowed
    )
    middle = begin
    if split:
        if limited:
            acc, acc_far = dq_range(
                acc, acc_far, tile, tile_far, gradient, top, off, queries, first, k, k_far, v, begins, b, g, begin,
                full, positions, num_keys, block, stride, scale2, block_n, near, far, value, True, limited,
                compressed, documents,
            )  # fmt: skip
        acc, acc_far = dq_range(
            acc, acc_far, tile, tile_far, gradient, top, off, queries, first, k, k_far, v, begins, b, g, full,
            diagonal, positions, num_keys, block, stride, scale2, block_n, near, far, value, False, limited,
            compressed, documents,
        )  # fmt: skip
        middle = diagonal
    acc, acc_far = dq_range(
        acc, acc_far, tile, tile_far, gradient, top, off, queries, first, k, k_far, v, begins, b, g, middle, until,
        positions, num_keys, block, stride, scale2, block_n, near, far, value, True, limited, compressed, documents,
    )  # fmt: skip
    store_rows_(dq, b, m, h, acc * scale, block_m, pack, near)
    if far > 0:
        store_rows_(dq_far, b, m, h, acc_far * scale, block_m, pack, far)


@triton.jit
def dkv_range(
    acc, acc_far, acc_v, keys, keys_far, values, at, last, q, q_far, do, lse, delta, b, h, row, begin, end, scale2,
    block_m: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value: tl.constexpr, group: tl.constexpr,
    masked: tl.constexpr, limited: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values over queries begin..end of every head of the group."""
    # One loop over queries and heads, so that a head's first reads overlap with the last products of another.
    for step in tl.range(0, tl.cdiv(end - begin, block_m) * group):
        m = begin + step // group * block_m
        head = step % group
        tile = load_block(q, b, h + head, m, block_m, near)
        gradient = load_block(do, b, h + head, m, block_m, value)
        # Computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        dp = tl.dot(values, gradient.T)
        s = tl.dot(keys, tile.T)
        if far > 0:
            tile_far = load_block(q_far, b, h + head, m, block_m, far)
            s = tl.dot(keys_far, tile_far.T, s)
        p = tl.exp2(s * scale2 - tl.reshape(lse.load([row + head, m]), (1, block_m)))
        if masked:
            queries = m + tl.arange(0, block_m)
            visible = queries[None, :] >= at[:, None]
            if limited:
                visible = visible & (queries[None, :] < last[:, None])
            p = tl.where(visible, p, 0.0)
        # Before the product of p, which still reads its registers while others are written: on sm_90 ptxas would have
        # each instruction of each product wait for the one before it.
        ds = (p * (dp - tl.reshape(delta.load([row + head, m]), (1, block_m)))).to(tile.dtype)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        acc = tl.dot(ds, tile, acc)
        if far > 0:
            acc_far = tl.dot(ds, tile_far, acc_far)
    return acc, acc_far, acc_v


@triton.jit
def add_parts(x, to, number):
    """Writes the sum of `number` parts, always in one order."""
    acc = tl.zeros([PARTS], tl.float32)
    for first in tl.range(0, number, PARTS):
        at = first + tl.arange(0, PARTS)
        acc += tl.load(x + at, mask=at < number, other=0.0)
    tl.store(to, tl.sum(acc, 0).to(to.dtype.element_ty))


@triton.jit
def after_last(end, b, tokens, positions, window, documents: tl.constexpr, windowed: tl.constexpr):
    """One past the last query that sees the key at each token; `positions` at most."""
    last = tokens * 0 + positions
    if documents:
        last = tl.load(end + b.to(tl.int64) * positions + tokens, mask=tokens < positions, other=0)
    if windowed:
        last = tl.minimum(last, tokens + window)
    return last


@triton.jit(do_not_specialize=GENERAL)
def dkv_kernel(
    q, q_far, k, k_far, v, do, dk, dk_far, dv, lse, delta, sink_parts, dsinks, end, begins, parts, share, positions,
    num_keys, heads, kv_heads, rows, window, block, stride, scale, block_m: tl.constexpr, block_n: tl.constexpr,
    side_by_side: tl.constexpr, group: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value: tl.constexpr,
    compressed: tl.constexpr, documents: tl.constexpr, windowed: tl.constexpr, sunk: tl.constexpr,
    split: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of keys and values of one head of theirs, over `share` queries, a multiple of block_m.

    Programs of the second axis share the queries, and each writes a sum of its own, [shares of B]. The first programs
    sum the parts of the sinks' gradients too, [H parts], one head each: a launch less.
    """
    limited: tl.constexpr = documents or windowed
    if sunk:
        for head in tl.range(tl.program_id(0), heads, tl.num_programs(0)):
            add_parts(sink_parts + tl.cast(head, tl.int64) * parts, dsinks + head, parts)
    # Blocks in ascending order: early keys are seen by most queries, so these are the long programs.
    index, kv = schedule(tl.cdiv(num_keys, block_n), rows, side_by_side)
    b = kv // kv_heads
    g = kv % kv_heads
    h = g * group
    row = b * heads + h
    n = index * block_n
    at = tokens_of(begins, b, n + tl.arange(0, block_n), positions, num_keys, block, stride, compressed, documents)
    keys = load_block(k, b, g, n, block_n, near)
    values = load_block(v, b, g, n, block_n, value)
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_n, near], tl.float32)
    acc_v = tl.zeros([block_n, value], tl.float32)
    keys_far, acc_far = keys, scale2
    if far > 0:
        keys_far = load_block(k_far, b, g, n, block_n, far)
        acc_far = tl.zeros([block_n, far], tl.float32)
    # The first and the last query that see some key, and the first that sees all.
    low = n
    full = n + block_n - 1
    token = tl.minimum(n + block_n, positions) - 1
    if compressed:
        low = n * stride + block - 1
        full = full * stride + block - 1
        token = tl.minimum(tl.minimum(n + block_n, num_keys) * stride, positions) - 1
        # a place of no block has a token beyond the row
    last = after_last(end, b, at, positions, window, documents, windowed)
    until = tl.minimum(after_last(end, b, token, positions, window, documents, windowed), positions)
    share_first = tl.program_id(1) * share
    share_end = share_first + share
    until = tl.minimum(until, share_end)
    middle = tl.maximum(low // block_m * block_m, share_first)
    if split:
        full = tl.maximum(tl.cdiv(full, block_m) * block_m, share_first)
        if compressed and documents:
            full = until
        acc, acc_far, acc_v = dkv_range(
            acc, acc_far, acc_v, keys, keys_far, values, at, last, q, q_far, do, lse, delta, b, h, row, middle,
            tl.minimum(full, until), scale2, block_m, near, far, value, group, True, limited,
        )  # fmt: skip
        middle = until
        if limited and not compressed:
            middle = tl.minimum(after_last(end, b, n, positions, window, documents, windowed), positions)
            middle = tl.maximum(middle // block_m * block_m, full)
        acc, acc_far, acc_v = dkv_range(
            acc, acc_far, acc_v, keys, keys_far, values, at, last, q, q_far, do, lse, delta, b, h, row, full, middle,
            scale2, block_m, near, far, value, group, False, limited,
        )  # fmt: skip
    if (limited and not compressed) or not split:
        acc, acc_far, acc_v = dkv_range(
            acc, acc_far, acc_v, keys, keys_far, values, at, last, q, q_far, do, lse, delta, b, h, row, middle, until,
            scale2, block_m, near, far, value, group, True, limited,
        )  # fmt: skip
    to = tl.program_id(1) * (rows // kv_heads) + b
    store_block_(dk, to, g, n, acc * scale, block_n, near)
    store_block_(dv, to, g, n, acc_v, block_n, value)
    if far > 0:
        store_block_(dk_far, to, g, n, acc_far * scale, block_n, far)
