"""Native sparse attention: the tokens of a list of blocks, which the queries of a group share, and how it is found.

Letters: b sequence, g head of keys and values, i query, n keys of a block, r rows: queries times the heads of the
group, rounded up to `pack`, a power of two. Channels are parted as those of `gqa_kernels`.

Ranges of keys, the last ones or compressed blocks, are read by the kernels of `gqa_kernels`; here a query has a list of
blocks of `span` tokens, one block a step. Keys are the rows of every product and the heads of a group its columns, so
that few heads fill the tensor cores. No atomics: gradients of keys have one owner and one order. What reads a selected
block is found by an inverted list, sorted once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E, load_block
from nmoe.effects.kernels.attention.dsa_index_kernels import choose, first_key
from nmoe.effects.kernels.attention.gqa_kernels import blocks_before, load_rows, tokens_of

GENERAL = ("positions", "slots")
"""Integers of which the compiled code assumes nothing. With one token, or lists of one block, it knew of a loop of
one turn: the forward pass on an H200 then read where nothing is (docs/log.md, 2026-11-29)."""


@triton.jit
def heads_of(t, g, heads, group, pack: tl.constexpr):
    """Places of the heads of one query's group in q and o [r], and which are there."""
    head = tl.arange(0, pack)
    return t.to(tl.int64) * heads + g * group + head, head < group


@triton.jit
def block_at(lists, slot, j, first, i, span: tl.constexpr, block_n: tl.constexpr):
    """First token of the block at place j of a query's list, and which of its tokens the query sees [n].

    From registers: what is read next does not wait for a load of its place.
    """
    place = tl.sum(tl.where(slot == j, lists, 0), 0)
    n = first + tl.maximum(place, 0) * span
    offset = tl.arange(0, block_n)
    return n, (offset < span) & (n + offset <= i) & (place >= 0)


@triton.jit
def list_of(
    start, chosen, positions, kv_heads, slots, slots_box: tl.constexpr, span: tl.constexpr, documents: tl.constexpr
):
    """Sequence, group and query of a program, its document's first token, its list, and how many blocks to go through.

    Last queries first, which have most to do.
    """
    i = positions - 1 - tl.program_id(0) % positions
    other = tl.program_id(0) // positions
    b = other // kv_heads
    g = other % kv_heads
    first = first_key(start, b, i, positions, documents)
    slot = tl.arange(0, slots_box)
    entry = chosen + ((b.to(tl.int64) * positions + i) * kv_heads + g) * slots
    lists = tl.load(entry + slot, mask=slot < slots, other=-1)
    return b, g, i, first, lists, slot, tl.minimum((i - first) // span + 1, slots)


@triton.jit(do_not_specialize=GENERAL)
def forward_kernel(
    q, k, k_far, v, o, lse, start, chosen, positions, heads, kv_heads, group, slots, scale, pack: tl.constexpr,
    block_n: tl.constexpr, width: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value_width: tl.constexpr,
    value: tl.constexpr, slots_box: tl.constexpr, span: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Output of the heads of a group of one query, and logarithms to base 2 of their sums of exponentials."""
    b, g, i, first, lists, slot, number = list_of(start, chosen, positions, kv_heads, slots, slots_box, span, documents)
    row, mine = heads_of(b * positions + i, g, heads, group, pack)
    tile = load_rows(q, row * width, mine, width, 0, near)
    tile_far = tile
    if far > 0:
        tile_far = load_rows(q, row * width, mine, width, near, far)
    row_max = tl.full([pack], HIDDEN, tl.float32)
    row_sum = tl.zeros([pack], tl.float32)
    acc = tl.zeros([value, pack], tl.float32)
    for j in tl.range(0, number):
        n, there = block_at(lists, slot, j, first, i, span, block_n)
        s = tl.dot(load_block(k, b, g, n, block_n, near), tile.T)
        if far > 0:
            s = tl.dot(load_block(k_far, b, g, n, block_n, far), tile_far.T, s)
        s = tl.where(there[:, None], s * (scale * LOG2_E), HIDDEN)
        new_max = tl.maximum(row_max, tl.max(s, 0))
        p = tl.exp2(s - new_max[None, :])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        values = load_block(v, b, g, n, block_n, value)
        acc = tl.dot(values.T, p.to(values.dtype), acc * rescale[None, :])
        row_max = new_max
    channel = tl.arange(0, value)
    at = row[None, :] * value_width + channel[:, None]
    out = (acc / row_sum[None, :]).to(o.dtype.element_ty)
    tl.store(o + at, out, mask=mine[None, :] & (channel < value_width)[:, None])
    tl.store(lse + row, row_max + tl.log2(row_sum), mask=mine)


@triton.jit(do_not_specialize=GENERAL)
def dq_kernel(
    q, k, k_far, v, o, do, dq, lse, delta, start, chosen, positions, heads, kv_heads, group, slots, scale,
    pack: tl.constexpr, block_n: tl.constexpr, width: tl.constexpr, near: tl.constexpr, far: tl.constexpr,
    value_width: tl.constexpr, value: tl.constexpr, slots_box: tl.constexpr, span: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Gradient of the heads of a group of one query, and for `dkv_kernel` what softmax takes off each."""
    b, g, i, first, lists, slot, number = list_of(start, chosen, positions, kv_heads, slots, slots_box, span, documents)
    row, mine = heads_of(b * positions + i, g, heads, group, pack)
    gradient = load_rows(do, row * value_width, mine, value_width, 0, value)
    output = load_rows(o, row * value_width, mine, value_width, 0, value)
    off = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + row, off, mask=mine)
    top = tl.load(lse + row, mask=mine, other=0.0)
    tile = load_rows(q, row * width, mine, width, 0, near)
    acc = tl.zeros([near, pack], tl.float32)
    tile_far, acc_far = tile, off
    if far > 0:
        tile_far = load_rows(q, row * width, mine, width, near, far)
        acc_far = tl.zeros([far, pack], tl.float32)
    for j in tl.range(0, number):
        n, there = block_at(lists, slot, j, first, i, span, block_n)
        keys = load_block(k, b, g, n, block_n, near)
        s = tl.dot(keys, tile.T)
        if far > 0:
            keys_far = load_block(k_far, b, g, n, block_n, far)
            s = tl.dot(keys_far, tile_far.T, s)
        dp = tl.dot(load_block(v, b, g, n, block_n, value), gradient.T)
        p = tl.where(there[:, None] & mine[None, :], tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        # Rounded to the input format for the tensor cores, as P is.
        ds = (p * (dp - off[None, :])).to(keys.dtype)
        acc = tl.dot(keys.T, ds, acc)
        if far > 0:
            acc_far = tl.dot(keys_far.T, ds, acc_far)
    channel = tl.arange(0, near)
    at = row[None, :] * width + channel[:, None]
    inside = mine[None, :] & (channel < width)[:, None]
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=inside)
    if far > 0:
        channel = near + tl.arange(0, far)
        at = row[None, :] * width + channel[:, None]
        inside = mine[None, :] & (channel < width)[:, None]
        tl.store(dq + at, (acc_far * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def keys_of(start, b, n, positions, span: tl.constexpr, block_n: tl.constexpr, documents: tl.constexpr):
    """Keys of the owner that begins at n, and which are there."""
    offset = tl.arange(0, block_n)
    key = n + offset
    there = (offset < span) & (key < positions)
    if documents:
        # a block ends with its document
        one = first_key(start, b, key, positions, documents)
        there = there & (one == first_key(start, b, n, positions, documents))
    return key, there


@triton.jit
def store_keys(x, row, inside, value, width: tl.constexpr, first: tl.constexpr, channels: tl.constexpr):
    """Channels first .. first + channels - 1 of rows [n width] of x."""
    channel = first + tl.arange(0, channels)
    to = x + row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(to, value.to(x.dtype.element_ty), mask=inside[:, None] & (channel < width)[None, :])


@triton.jit(do_not_specialize=GENERAL)
def dkv_kernel(
    q, k, k_far, v, do, dk, dv, lse, delta, start, readers, bounds, more, base, owner_of, chunk_of, part, part_v,
    positions, heads, kv_heads, group, step, owners, extra, chunk, scale, size: tl.constexpr, pack: tl.constexpr,
    block_n: tl.constexpr, width: tl.constexpr, near: tl.constexpr, far: tl.constexpr, value_width: tl.constexpr,
    value: tl.constexpr, span: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values of a group, over the queries that read it, `size` at a time.

    Where more than `chunk` queries read a block, several programs share them, and `join_kernel` adds their sums: the
    first block of a document is read by every query.

    readers             [pairs] i32    queries, sorted by the block that they read, then by themselves
    bounds              [owners + 1]   where each owner's begin
    more                [owners] i32   programs of an owner beside its first one
    base                [owners] i32   place of its sums among the parts
    owner_of, chunk_of  [extra] i32    of the programs beside, which come first; those of no owner do nothing
    part                [parts block_n width] f32, part_v the same of values
    """
    index = tl.program_id(0) - extra
    c = 0
    if index < 0:
        c = tl.load(chunk_of + tl.program_id(0))
        index = tl.load(owner_of + tl.program_id(0))
    other = index // owners
    b = other // kv_heads
    g = other % kv_heads
    n = index % owners * step
    key, there = keys_of(start, b, n, positions, span, block_n, documents)
    low = tl.load(bounds + index)
    until = tl.load(bounds + index + 1)
    # what nobody begins a block at is owned by the block before
    written = there & (until > low)
    low += c * chunk
    until = tl.minimum(until, low + chunk)
    until = tl.where(c < 0, low, until)
    keys = load_block(k, b, g, n, block_n, near)
    values = load_block(v, b, g, n, block_n, value)
    acc = tl.zeros([block_n, near], tl.float32)
    acc_v = tl.zeros([block_n, value], tl.float32)
    keys_far, acc_far = keys, scale
    if far > 0:
        keys_far = load_block(k_far, b, g, n, block_n, far)
        acc_far = tl.zeros([block_n, far], tl.float32)
    r = tl.arange(0, size * pack)
    for m in tl.range(0, (until - low).to(tl.int32), size):
        at = low + m + r // pack
        query = tl.load(readers + at, mask=at < until, other=positions)
        mine = (r % pack < group) & (query < positions)
        row = (b.to(tl.int64) * positions + query) * heads + g * group + r % pack
        tile = load_rows(q, row * width, mine, width, 0, near)
        gradient = load_rows(do, row * value_width, mine, value_width, 0, value)
        # Computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        dp = tl.dot(values, gradient.T)
        s = tl.dot(keys, tile.T)
        if far > 0:
            tile_far = load_rows(q, row * width, mine, width, near, far)
            s = tl.dot(keys_far, tile_far.T, s)
        top = tl.load(lse + row, mask=mine, other=0.0)
        off = tl.load(delta + row, mask=mine, other=0.0)
        visible = there[:, None] & (key[:, None] <= query[None, :]) & mine[None, :]
        p = tl.where(visible, tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        ds = (p * (dp - off[None, :])).to(tile.dtype)
        acc = tl.dot(ds, tile, acc)
        if far > 0:
            acc_far = tl.dot(ds, tile_far, acc_far)
    shared = tl.load(more + index) > 0
    to = (tl.load(base + index).to(tl.int64) + c) * block_n + tl.arange(0, block_n)
    inside = there & shared & (c >= 0)
    store_keys(part, to, inside, acc * scale, width, 0, near)
    store_keys(part_v, to, inside, acc_v, value_width, 0, value)
    if far > 0:
        store_keys(part, to, inside, acc_far * scale, width, near, far)
    to = (b.to(tl.int64) * positions + tl.where(there, key, 0)) * kv_heads + g
    inside = written & (shared == 0) & (c == 0)
    store_keys(dk, to, inside, acc * scale, width, 0, near)
    store_keys(dv, to, inside, acc_v, value_width, 0, value)
    if far > 0:
        store_keys(dk, to, inside, acc_far * scale, width, near, far)


@triton.jit(do_not_specialize=GENERAL)
def join_kernel(
    part, dk, more, base, start, positions, kv_heads, step, owners, block_n: tl.constexpr, width: tl.constexpr,
    width_box: tl.constexpr, span: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """The sums of an owner that several programs have shared, in the order of their queries."""
    index = tl.program_id(0)
    number = tl.load(more + index)
    if number > 0:
        other = index // owners
        b = other // kv_heads
        n = index % owners * step
        key, there = keys_of(start, b, n, positions, span, block_n, documents)
        channel = tl.arange(0, width_box)
        inside = there[:, None] & (channel < width)[None, :]
        acc = tl.zeros([block_n, width_box], tl.float32)
        for c in tl.range(0, number + 1):
            at = (tl.load(base + index).to(tl.int64) + c) * block_n + tl.arange(0, block_n)
            acc += tl.load(part + at[:, None] * width + channel[None, :], mask=inside, other=0.0)
        to = (b.to(tl.int64) * positions + tl.where(there, key, 0)) * kv_heads + other % kv_heads
        tl.store(dk + to[:, None] * width + channel[None, :], acc.to(dk.dtype.element_ty), mask=inside)


@triton.jit
def compressed_blocks(start, b, i, positions, num_keys, block, stride, documents: tl.constexpr):
    """The places of the compressed blocks that a query may see: the first, and one past the last."""
    low = first_key(start, b, i, positions, documents) // stride
    return low, tl.minimum(blocks_before(i + 1, block, stride), num_keys)


@triton.jit
def weight_kernel(
    q, k, k_far, lse, start, begins, weight, first_row, positions, padded, heads, kv_heads, group, num_keys, block,
    stride, scale, pack: tl.constexpr, block_n: tl.constexpr, width: tl.constexpr, near: tl.constexpr,
    far: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Attention of one query to the compressed blocks of its document, summed over the heads of its group."""
    at = first_row + tl.program_id(0)
    t = at // kv_heads
    g = at % kv_heads
    b = t // positions
    i = t % positions
    row, mine = heads_of(t, g, heads, group, pack)
    first = first_key(start, b, i, positions, documents) + block - 1
    low, until = compressed_blocks(start, b, i, positions, num_keys, block, stride, documents)
    head = b * heads + g * group + tl.arange(0, pack)
    top = tl.load(lse + head.to(tl.int64) * padded + i, mask=mine, other=0.0)
    tile = load_rows(q, row * width, mine, width, 0, near)
    tile_far = tile
    if far > 0:
        tile_far = load_rows(q, row * width, mine, width, near, far)
    for j in tl.range(low, until, block_n):
        key = j + tl.arange(0, block_n)
        s = tl.dot(load_block(k, b, g, j, block_n, near), tile.T)
        if far > 0:
            s = tl.dot(load_block(k_far, b, g, j, block_n, far), tile_far.T, s)
        token = tokens_of(begins, b, key, positions, num_keys, block, stride, True, documents)
        visible = (token <= i) & (token >= first)
        p = tl.where(visible[:, None] & mine[None, :], tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        tl.store(weight + tl.program_id(0).to(tl.int64) * num_keys + key - low, tl.sum(p, 1), mask=key < until)


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
    low, until = compressed_blocks(start, b, i, positions, num_keys, block, stride, documents)
    number = until - low
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
