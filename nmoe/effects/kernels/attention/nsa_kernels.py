"""Native sparse attention: the queries of a group read a range of keys, or the tokens of their own list of blocks.

Letters: b sequence, g head of keys and values, m first query of a program, n keys of a block, r rows: queries times the
heads of the group, rounded up to `pack`, a power of two.

Keys are the rows of every product and the heads of a group its columns, so that few heads fill the tensor cores. Three
branches share the kernels: `WINDOW` reads the last keys, `COMPRESSED` those of the compressed blocks that have ended,
`SELECTED` a list of blocks, of one query a program. No atomics: gradients of keys have one owner and one order. What
reads a selected block is found by an inverted list, sorted once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E
from nmoe.effects.kernels.attention.dsa_index_kernels import choose, first_key
from nmoe.effects.kernels.attention.dsa_kernels import load_part

WINDOW = tl.constexpr(0)
COMPRESSED = tl.constexpr(1)
SELECTED = tl.constexpr(2)


@triton.jit
def rows_of(b, g, query, positions, heads, group, pack: tl.constexpr, size: tl.constexpr):
    """Places of rows in q and o, the query of each, and which are there; `query` [size] may lie beyond the row."""
    r = tl.arange(0, size * pack)
    queries = tl.reshape(tl.broadcast_to(query[:, None], (size, pack)), (size * pack,))
    head = r % pack
    row = (b.to(tl.int64) * positions + queries) * heads + g * group + head
    return row, queries, (head < group) & (queries < positions)


@triton.jit
def range_of(start, b, m, last, positions, window, block, stride, mode: tl.constexpr, documents: tl.constexpr):
    """First key, and one past the last, that some query of m .. last sees."""
    first = first_key(start, b, m, positions, documents)
    if mode == WINDOW:
        return tl.maximum(first, m - window + 1), last + 1
    return first // stride, tl.where(last + 1 >= block, (last + 1 - block) // stride + 1, 0)


@triton.jit
def seen(key, there, begins, b, num_keys, query, first, window, block, mode: tl.constexpr):
    """Which keys [n] each row [r] sees: [n r]."""
    if mode == COMPRESSED:
        token = tl.load(begins + b.to(tl.int64) * num_keys + key, mask=there, other=0)
        return there[:, None] & (token[:, None] + block <= query[None, :] + 1) & (token[:, None] >= first[None, :])
    return (
        there[:, None]
        & (key[:, None] <= query[None, :])
        & (key[:, None] >= first[None, :])
        & (key[:, None] > query[None, :] - window)
    )


@triton.jit
def keys_at(
    j, low, until, chosen, b, g, query, first, positions, kv_heads, slots, span: tl.constexpr, mode: tl.constexpr,
    block_n: tl.constexpr,
):  # fmt: skip
    """Keys j .. j + block_n - 1 of a range, or of a list of blocks of `span` tokens, and which are there."""
    at = j + tl.arange(0, block_n)
    if mode != SELECTED:
        key = low + at
        there = key < until
    else:
        entry = chosen + ((b.to(tl.int64) * positions + query) * kv_heads + g) * slots + at // span
        place = tl.load(entry, mask=at < until, other=-1)
        key = first + place * span + at % span
        there = (place >= 0) & (key <= query)
    return key, there


@triton.jit
def scores(q, row, mine, k, key_row, there, width: tl.constexpr, block_k: tl.constexpr, block_n: tl.constexpr,
           rows: tl.constexpr):  # fmt: skip
    """Products of keys and rows [n r], over channels in steps."""
    s = tl.zeros([block_n, rows], tl.float32)
    for c in tl.range(0, width, block_k):
        channel = c + tl.arange(0, block_k)
        keys = tl.load(
            k + key_row[:, None] + channel[None, :], mask=there[:, None] & (channel < width)[None, :], other=0.0
        )
        s = tl.dot(keys, load_part(q, row, mine, width, c, width, block_k).T, s)
    return s


@triton.jit
def all_channels(x, key_row, there, width: tl.constexpr, width_box: tl.constexpr):
    """Keys or values [n channels]."""
    channel = tl.arange(0, width_box)
    return tl.load(x + key_row[:, None] + channel[None, :], mask=there[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def work_of(
    start, chosen, positions, kv_heads, num_keys, slots, window, block, stride, size: tl.constexpr,
    span: tl.constexpr, mode: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Sequence, group and first query of a program, and the keys it goes through: low, and how many or until."""
    blocks = tl.cdiv(positions, size)
    m = (blocks - 1 - tl.program_id(0) % blocks) * size
    other = tl.program_id(0) // blocks
    b = other // kv_heads
    g = other % kv_heads
    if mode == SELECTED:
        own = (m - first_key(start, b, m, positions, documents)) // span + 1
        return b, g, m, 0, tl.minimum(own, slots) * span
    last = tl.minimum(m + size, positions) - 1
    low, until = range_of(start, b, m, last, positions, window, block, stride, mode, documents)
    return b, g, m, low, tl.minimum(until, num_keys)


@triton.jit
def forward_kernel(
    q, k, v, o, lse, start, begins, chosen, positions, heads, kv_heads, group, num_keys, slots, window, block, stride,
    k_batch, k_row, k_head, v_batch, v_row, v_head, scale, size: tl.constexpr, pack: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, width: tl.constexpr, value: tl.constexpr, value_box: tl.constexpr,
    span: tl.constexpr, mode: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Output of `size` queries of a group, zeros where one sees no key, and logarithms to base 2 of row sums."""
    rows: tl.constexpr = size * pack
    b, g, m, low, until = work_of(
        start, chosen, positions, kv_heads, num_keys, slots, window, block, stride, size, span, mode, documents
    )
    query = m + tl.arange(0, size)
    row, queries, mine = rows_of(b, g, query, positions, heads, group, pack, size)
    first = first_key(start, b, queries, positions, documents)
    own_first = first_key(start, b, m, positions, documents)
    row_max = tl.full([rows], HIDDEN, tl.float32)
    row_sum = tl.zeros([rows], tl.float32)
    acc = tl.zeros([value_box, rows], tl.float32)
    for j in tl.range(0, until - low, block_n):
        key, there = keys_at(j, low, until, chosen, b, g, m, own_first, positions, kv_heads, slots, span, mode, block_n)
        here = tl.where(there, key, 0).to(tl.int64)
        visible = seen(key, there, begins, b, num_keys, queries, first, window, block, mode)
        key_row = b.to(tl.int64) * k_batch + here * k_row + g * k_head
        s = scores(q, row, mine, k, key_row, there, width, block_k, block_n, rows)
        s = tl.where(visible, s * (scale * LOG2_E), HIDDEN)
        new_max = tl.maximum(row_max, tl.max(s, 0))
        p = tl.where(visible, tl.exp2(s - new_max[None, :]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        values = all_channels(v, b.to(tl.int64) * v_batch + here * v_row + g * v_head, there, value, value_box)
        acc = tl.dot(values.T, p.to(values.dtype), acc * rescale[None, :])
        row_max = new_max
    out = acc / tl.where(row_sum > 0, row_sum, 1.0)[None, :]
    channel = tl.arange(0, value_box)
    at = row[None, :] * value + channel[:, None]
    tl.store(o + at, out.to(o.dtype.element_ty), mask=mine[None, :] & (channel < value)[:, None])
    tl.store(lse + row, tl.where(row_sum > 0, row_max + tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), 0.0), mask=mine)


@triton.jit
def dq_kernel(
    q, k, v, do, dq, lse, delta, start, begins, chosen, positions, heads, kv_heads, group, num_keys, slots, window,
    block, stride, k_batch, k_row, k_head, v_batch, v_row, v_head, scale, size: tl.constexpr, pack: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, width: tl.constexpr, width_box: tl.constexpr, value: tl.constexpr,
    span: tl.constexpr, mode: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradient of `size` queries of a group."""
    rows: tl.constexpr = size * pack
    b, g, m, low, until = work_of(
        start, chosen, positions, kv_heads, num_keys, slots, window, block, stride, size, span, mode, documents
    )
    query = m + tl.arange(0, size)
    row, queries, mine = rows_of(b, g, query, positions, heads, group, pack, size)
    first = first_key(start, b, queries, positions, documents)
    own_first = first_key(start, b, m, positions, documents)
    top = tl.load(lse + row, mask=mine, other=0.0)
    off = tl.load(delta + row, mask=mine, other=0.0)
    acc = tl.zeros([width_box, rows], tl.float32)
    for j in tl.range(0, until - low, block_n):
        key, there = keys_at(j, low, until, chosen, b, g, m, own_first, positions, kv_heads, slots, span, mode, block_n)
        here = tl.where(there, key, 0).to(tl.int64)
        visible = seen(key, there, begins, b, num_keys, queries, first, window, block, mode)
        key_row = b.to(tl.int64) * k_batch + here * k_row + g * k_head
        s = scores(q, row, mine, k, key_row, there, width, block_k, block_n, rows)
        at = b.to(tl.int64) * v_batch + here * v_row + g * v_head
        dp = scores(do, row, mine, v, at, there, value, block_k, block_n, rows)
        p = tl.where(visible & mine[None, :], tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        keys = all_channels(k, key_row, there, width, width_box)
        # Rounded to the input format for the tensor cores, as P is.
        acc = tl.dot(keys.T, (p * (dp - off[None, :]) * scale).to(keys.dtype), acc)
    channel = tl.arange(0, width_box)
    at = row[None, :] * width + channel[:, None]
    tl.store(dq + at, acc.to(dq.dtype.element_ty), mask=mine[None, :] & (channel < width)[:, None])


@triton.jit
def readers(
    start, end, begins, b, n, last, positions, num_keys, window, block, stride, mode: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """First query, and one past the last, that sees some key of n .. last."""
    if mode == WINDOW:
        token = last
        low = n
    else:
        token = tl.minimum(last * stride + stride, positions) - 1
        low = n * stride + block - 1
    until = positions
    if documents:
        until = tl.load(end + b.to(tl.int64) * positions + token)
    if mode == WINDOW:
        until = tl.minimum(until, last + window)
    return low, until


@triton.jit
def keys_of(
    start, b, n, positions, num_keys, span: tl.constexpr, mode: tl.constexpr, block_n: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Keys of the owner that begins at n, and which are there."""
    offset = tl.arange(0, block_n)
    key = n + offset
    there = key < num_keys
    if mode == SELECTED:
        there = (offset < span) & (key < positions)
        if documents:
            # a block ends with its document
            one = first_key(start, b, key, positions, documents)
            there = there & (one == first_key(start, b, n, positions, documents))
    return key, there


@triton.jit
def dkv_kernel(
    q, k, v, do, dk, dv, lse, delta, start, end, begins, order, bounds, more, base, owner_of, chunk_of, part, part_v,
    positions, heads, kv_heads, group, num_keys, slots, window, block, stride, step, owners, extra, chunk, k_batch,
    k_row, k_head, v_batch, v_row, v_head, scale, size: tl.constexpr, pack: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, width: tl.constexpr, width_box: tl.constexpr, value: tl.constexpr,
    value_box: tl.constexpr, span: tl.constexpr, mode: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values of a group, over the queries that read it, `size` at a time.

    Where more than `chunk` queries read a block, several programs share them, and `join_kernel` adds their sums: the
    first block of a document is read by every query.

    order               [pairs] i64    places in the lists, sorted by the block there, then by the query
    bounds              [owners + 1]   where each owner's begin
    more                [owners] i32   programs of an owner beside its first one
    base                [owners] i32   place of its sums among the parts
    owner_of, chunk_of  [extra] i32    of the programs beside, which come first; those of no owner do nothing
    part                [parts block_n width] f32, part_v the same of values
    """
    rows: tl.constexpr = size * pack
    index = tl.program_id(0) - extra
    c = 0
    if mode != WINDOW:
        if index < 0:
            c = tl.load(chunk_of + tl.program_id(0))
            index = tl.load(owner_of + tl.program_id(0))
    other = index // owners
    b = other // kv_heads
    g = other % kv_heads
    n = index % owners * step
    key, there = keys_of(start, b, n, positions, num_keys, span, mode, block_n, documents)
    if mode == SELECTED:
        low = tl.load(bounds + index)
        until = tl.load(bounds + index + 1)
    else:
        low, until = readers(
            start, end, begins, b, n, tl.minimum(n + block_n, num_keys) - 1, positions, num_keys, window, block,
            stride, mode, documents,
        )  # fmt: skip
    written = there
    if mode == SELECTED:
        # what nobody begins a block at is owned by the block before
        written = there & (until > low)
    if mode != WINDOW:
        low += c * chunk
        until = tl.minimum(until, low + chunk)
        until = tl.where(c < 0, low, until)
    here = tl.where(there, key, 0).to(tl.int64)
    key_row = b.to(tl.int64) * k_batch + here * k_row + g * k_head
    value_row = b.to(tl.int64) * v_batch + here * v_row + g * v_head
    acc = tl.zeros([block_n, width_box], tl.float32)
    acc_v = tl.zeros([block_n, value_box], tl.float32)
    for m in tl.range(low, until, size):
        query = m + tl.arange(0, size)
        if mode == SELECTED:
            # places count lists of a group after those of another
            place = tl.load(order + query, mask=query < until, other=0) // slots
            query = tl.where(query < until, (place % positions).to(tl.int32), positions)
        row, queries, mine = rows_of(b, g, query, positions, heads, group, pack, size)
        first = first_key(start, b, queries, positions, documents)
        visible = seen(key, there, begins, b, num_keys, queries, first, window, block, mode) & mine[None, :]
        s = scores(q, row, mine, k, key_row, there, width, block_k, block_n, rows)
        dp = scores(do, row, mine, v, value_row, there, value, block_k, block_n, rows)
        top = tl.load(lse + row, mask=mine, other=0.0)
        off = tl.load(delta + row, mask=mine, other=0.0)
        p = tl.where(visible, tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        gradient = load_part(do, row, mine, value, 0, value, value_box)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        tile = load_part(q, row, mine, width, 0, width, width_box)
        acc = tl.dot((p * (dp - off[None, :]) * scale).to(tile.dtype), tile, acc)
    channel = tl.arange(0, width_box)
    channel_v = tl.arange(0, value_box)
    if mode != WINDOW:
        shared = tl.load(more + index) > 0
        at = (tl.load(base + index).to(tl.int64) + c) * block_n + tl.arange(0, block_n)
        written = written & (shared == 0) & (c == 0)
        inside = (there & shared & (c >= 0))[:, None]
        tl.store(part + at[:, None] * width + channel[None, :], acc, mask=inside & (channel < width)[None, :])
        tl.store(part_v + at[:, None] * value + channel_v[None, :], acc_v, mask=inside & (channel_v < value)[None, :])
    to = (b.to(tl.int64) * num_keys + here) * kv_heads + g
    inside = written[:, None] & (channel < width)[None, :]
    tl.store(dk + to[:, None] * width + channel[None, :], acc.to(dk.dtype.element_ty), mask=inside)
    inside = written[:, None] & (channel_v < value)[None, :]
    tl.store(dv + to[:, None] * value + channel_v[None, :], acc_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def join_kernel(
    part, dk, more, base, start, positions, kv_heads, num_keys, step, owners, block_n: tl.constexpr,
    width: tl.constexpr, width_box: tl.constexpr, span: tl.constexpr, mode: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """The sums of an owner that several programs have shared, in the order of their queries."""
    index = tl.program_id(0)
    number = tl.load(more + index)
    if number > 0:
        other = index // owners
        b = other // kv_heads
        n = index % owners * step
        key, there = keys_of(start, b, n, positions, num_keys, span, mode, block_n, documents)
        channel = tl.arange(0, width_box)
        inside = there[:, None] & (channel < width)[None, :]
        acc = tl.zeros([block_n, width_box], tl.float32)
        for c in tl.range(0, number + 1):
            at = (tl.load(base + index).to(tl.int64) + c) * block_n + tl.arange(0, block_n)
            acc += tl.load(part + at[:, None] * width + channel[None, :], mask=inside, other=0.0)
        to = (b.to(tl.int64) * num_keys + tl.where(there, key, 0)) * kv_heads + other % kv_heads
        tl.store(dk + to[:, None] * width + channel[None, :], acc.to(dk.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    q, k, lse, start, begins, weight, first_row, positions, heads, kv_heads, group, num_keys, block, stride, k_batch,
    k_row, k_head, scale, pack: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, width: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Attention of one query to the compressed blocks of its document, summed over the heads of its group."""
    at = first_row + tl.program_id(0)
    t = at // kv_heads
    g = at % kv_heads
    b = t // positions
    i = t % positions
    query = i + tl.arange(0, 1)
    row, queries, mine = rows_of(b, g, query, positions, heads, group, pack, 1)
    first = first_key(start, b, queries, positions, documents)
    low, until = range_of(start, b, i, i, positions, 0, block, stride, COMPRESSED, documents)
    until = tl.minimum(until, num_keys)
    top = tl.load(lse + row, mask=mine, other=0.0)
    for j in tl.range(0, until - low, block_n):
        key = low + j + tl.arange(0, block_n)
        there = key < until
        visible = seen(key, there, begins, b, num_keys, queries, first, 0, block, COMPRESSED)
        here = tl.where(there, key, 0).to(tl.int64)
        key_row = b.to(tl.int64) * k_batch + here * k_row + g * k_head
        s = scores(q, row, mine, k, key_row, there, width, block_k, block_n, pack)
        p = tl.where(visible & mine[None, :], tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        tl.store(weight + tl.program_id(0).to(tl.int64) * num_keys + key - low, tl.sum(p, 1), mask=there)


@triton.jit
def total_kernel(
    weight, start, total, first_row, positions, kv_heads, num_keys, num_blocks, block, stride, ratio, overlap,
    span: tl.constexpr, block_n: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Weight of each selected block of one query: of the compressed ones, in proportion to what they share."""
    at = first_row + tl.program_id(0)
    t = at // kv_heads
    b = t // positions
    i = t % positions
    first = first_key(start, b, i, positions, documents)
    low, until = range_of(start, b, i, i, positions, 0, block, stride, COMPRESSED, documents)
    number = tl.minimum(until, num_keys) - low
    own = (i - first) // span
    for j in tl.range(0, own + 1, block_n):
        candidate = j + tl.arange(0, block_n)
        acc = tl.zeros([block_n], tl.float32)
        for place in tl.range(1 - overlap, ratio):
            one = candidate * ratio + place
            shared = tl.minimum(place + overlap, ratio) - tl.maximum(place, 0)
            mask = (one >= 0) & (one < number)
            acc += shared * tl.load(weight + tl.program_id(0).to(tl.int64) * num_keys + one, mask=mask, other=0.0)
        forced = (candidate == 0) | (candidate >= own - 1)
        to = total + tl.program_id(0).to(tl.int64) * num_blocks + candidate
        tl.store(to, tl.where(forced, float("inf"), acc), mask=candidate <= own)


@triton.jit
def select_kernel(
    total, start, chosen, first_row, positions, kv_heads, num_blocks, count, slots, span: tl.constexpr,
    block_n: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """The `count` heaviest blocks of one query and group, ascending, of equal ones the lower; -1 behind them."""
    at = first_row + tl.program_id(0)
    t = at // kv_heads
    i = t % positions
    visible = (i - first_key(start, t // positions, i, positions, documents)) // span + 1
    row = total + tl.program_id(0).to(tl.int64) * num_blocks
    choose(row, chosen + at.to(tl.int64) * slots, 0, visible, count, slots, block_n)
