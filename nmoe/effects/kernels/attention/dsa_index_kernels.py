"""The indexer of sparse latent attention: scores, the exact best of a row, and the gradients of its loss.

Letters: b sequence, t query (counted over all sequences, i within its own), n first key of a block, x heads of the
indexer. `heads_box` and `channels_box` are their numbers rounded up to what the tensor cores take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN
from nmoe.effects.kernels.attention.lists import place_of


@triton.jit
def first_key(start, b, i, positions, documents: tl.constexpr):
    """The first key that a query sees."""
    first = i * 0
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + i, mask=i < positions, other=0)
    return first


@triton.jit
def load_heads(q, t, heads, channels: tl.constexpr, heads_box: tl.constexpr, channels_box: tl.constexpr):
    """The heads [X Y] of one query."""
    head = tl.arange(0, heads_box)
    channel = tl.arange(0, channels_box)
    at = q + t.to(tl.int64) * heads * channels + head[:, None] * channels + channel[None, :]
    if channels == channels_box:
        return tl.load(at, mask=(head < heads)[:, None], other=0.0)
    return tl.load(at, mask=(head < heads)[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def load_rows(x, row, inside, channels: tl.constexpr, channels_box: tl.constexpr):
    """Rows [n channels] of x, zeros where they are not `inside`."""
    channel = tl.arange(0, channels_box)
    at = x + row.to(tl.int64)[:, None] * channels + channel[None, :]
    if channels == channels_box:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def score_kernel(
    q, k, w, start, scores, first_block, row_blocks, positions, heads, count, block_m: tl.constexpr,
    block_n: tl.constexpr, channels: tl.constexpr, channels_box: tl.constexpr, heads_box: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Scores of one block of keys for `block_m` queries, unless no query has more keys than it may read.

    Keys are the rows of each product and heads its columns, so that the sum over heads stays within a warp.
    """
    key_blocks = tl.cdiv(positions, block_n)
    index = tl.program_id(0) // key_blocks
    n = tl.program_id(0) % key_blocks * block_n
    b = (first_block + index) // row_blocks
    m = (first_block + index) % row_blocks * block_m
    queries = m + tl.arange(0, block_m)
    first = first_key(start, b, queries, positions, documents)
    most = tl.max(tl.where(queries < positions, queries - first + 1, 0), 0)
    until = tl.minimum(m + block_m, positions)
    # starts never decrease: what the first query does not see, no query sees
    begin = first_key(start, b, m, positions, documents)
    if (most > count) & (n < until) & (n + block_n > begin):
        key = n + tl.arange(0, block_n)
        row = b * positions + key
        keys = load_rows(k, row, key < positions, channels, channels_box)
        head = tl.arange(0, heads_box)
        for step in tl.range(0, until - m):
            t = b * positions + m + step
            tile = load_heads(q, t, heads, channels, heads_box, channels_box)
            weight = tl.load(w + t.to(tl.int64) * heads + head, mask=head < heads, other=0.0).to(tl.float32)
            score = tl.sum(tl.maximum(tl.dot(keys, tile.T), 0.0) * weight[None, :], 1)
            at = (index * block_m + step).to(tl.int64) * positions + key
            tl.store(scores + at, score, mask=key < positions)


@triton.jit
def ordered(score):
    """Unsigned integers in the order of fp32 numbers; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    ones = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    sign = tl.full(bits.shape, 0x80000000, tl.uint32)
    return tl.where((bits >> 31) != 0, bits ^ ones, bits | sign)


@triton.jit
def digit_of_threshold(scores, visible, prefix, need, which: tl.constexpr, block_n: tl.constexpr):
    """Eight more bits of the lowest number that is chosen, and how many that share them are still needed."""
    shift: tl.constexpr = 24 - 8 * which
    digits = tl.arange(0, 256)
    histogram = tl.zeros([256], tl.int32)
    for n in tl.range(0, visible, block_n):
        at = n + tl.arange(0, block_n)
        inside = at < visible
        number = ordered(tl.load(scores + at, mask=inside, other=0.0))
        if which > 0:
            inside = inside & ((number >> (shift + 8)) == prefix)
        histogram += tl.histogram(((number >> shift) & 255).to(tl.int32), 256, mask=inside)
    above = tl.cumsum(histogram, 0, reverse=True)
    digit = tl.max(tl.where(above >= need, digits, 0), 0)
    need -= tl.sum(tl.where(digits > digit, histogram, 0), 0)
    return (prefix << 8) | digit.to(tl.uint32), need


@triton.jit
def choose(scores, out, first, visible, count, slots, block_n: tl.constexpr):
    """Writes to `out` [slots] the places of the `count` best of `visible` scores, counted from `first`, ascending.

    Of equal scores the lower place; -1 behind them. Four passes over the scores find the lowest chosen number, eight
    bits each, and a fifth writes. Places have 32 bits.
    """
    need = tl.minimum(visible, count)
    lowest = tl.zeros((), tl.uint32)
    if visible > count:
        for which in tl.static_range(4):
            lowest, need = digit_of_threshold(scores, visible, lowest, need, which, block_n)
    taken = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for n in tl.range(0, visible, block_n):
        at = n + tl.arange(0, block_n)
        take = at < visible
        if visible > count:
            number = ordered(tl.load(scores + at, mask=take, other=0.0))
            same = (number == lowest) & take
            rank = tl.cumsum(same.to(tl.int32), 0) + equal
            equal += tl.sum(same.to(tl.int32), 0)
            take = take & ((number > lowest) | (same & (rank <= need)))
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + place, first + at, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
    for n in tl.range(taken, slots, block_n):
        at = n + tl.arange(0, block_n)
        tl.store(out + at, -1, mask=at < slots)


@triton.jit
def select_kernel(
    scores, start, chosen, first_block, row_blocks, positions, count, slots, block_m: tl.constexpr,
    block_n: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """The `count` best keys of one query, in ascending order, of equal ones the lower; -1 behind them."""
    index = tl.program_id(0) // block_m
    b = (first_block + index) // row_blocks
    i = (first_block + index) % row_blocks * block_m + tl.program_id(0) % block_m
    if i < positions:
        first = first_key(start, b, i, positions, documents)
        visible = i - first + 1
        row = scores + tl.program_id(0).to(tl.int64) * positions + first
        out = chosen + (b.to(tl.int64) * positions + i) * slots
        choose(row, out, first, visible, count, slots, block_n)


@triton.jit
def load_keys(k, chosen, t, b, j, slots, until, positions, block_n: tl.constexpr, channels: tl.constexpr,
              channels_box: tl.constexpr):  # fmt: skip
    """The keys [n Y] of some slots of a query, and which slots have one."""
    slot = j + tl.arange(0, block_n)
    key = tl.load(chosen + t.to(tl.int64) * slots + slot, mask=slot < until, other=-1)
    row = b * positions + tl.maximum(key, 0)
    return load_rows(k, row, key >= 0, channels, channels_box), key >= 0


@triton.jit
def index_loss_kernel(
    q, k, w, chosen, target, top, loss, positions, heads, slots, block_n: tl.constexpr, channels: tl.constexpr,
    channels_box: tl.constexpr, heads_box: tl.constexpr,
):  # fmt: skip
    """How far the indexer's probabilities of one query's keys are from their target, and their log-sum."""
    t = tl.program_id(0)
    b = t // positions
    until = tl.minimum(t % positions + 1, slots)
    head = tl.arange(0, heads_box)
    tile = load_heads(q, t, heads, channels, heads_box, channels_box)
    weight = tl.load(w + t.to(tl.int64) * heads + head, mask=head < heads, other=0.0).to(tl.float32)
    # A number a place in a block: one reduction after the loop; Triton 3.7 fails on the loop's own for sm_100.
    row_max = tl.full([block_n], HIDDEN, tl.float32)
    row_sum = tl.zeros([block_n], tl.float32)
    distance = tl.zeros([block_n], tl.float32)
    mass = tl.zeros([block_n], tl.float32)
    for j in tl.range(0, until, block_n):
        keys, there = load_keys(k, chosen, t, b, j, slots, until, positions, block_n, channels, channels_box)
        score = tl.sum(tl.maximum(tl.dot(keys, tile.T), 0.0) * weight[None, :], 1)
        slot = j + tl.arange(0, block_n)
        mean = tl.load(target + t.to(tl.int64) * slots + slot, mask=there, other=0.0)
        known = tl.where(mean > 0, mean * tl.log(tl.where(mean > 0, mean, 1.0)), 0.0)
        distance += known - mean * score
        mass += mean
        score = tl.where(there, score, HIDDEN)
        new_max = tl.maximum(row_max, score)
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.exp(score - new_max)
        row_max = new_max
    peak = tl.max(row_max, 0)
    highest = peak + tl.log(tl.sum(row_sum * tl.exp(row_max - peak), 0))
    tl.store(top + t, highest)
    tl.store(loss + t, tl.sum(distance, 0) + tl.sum(mass, 0) * highest)


@triton.jit
def gradient_of_scores(score, top, target, t, slot, there, slots, grad_output):
    """Gradient of the loss towards the scores of some slots: what softmax gives them, less their target."""
    wanted = tl.load(target + t.to(tl.int64) * slots + slot, mask=there, other=0.0)
    return tl.where(there, tl.exp(score - top) - wanted, 0.0) * grad_output


@triton.jit
def index_gradient_kernel(
    q, k, w, chosen, target, top, dy, dq, dw, positions, heads, slots, block_n: tl.constexpr,
    channels: tl.constexpr, channels_box: tl.constexpr, heads_box: tl.constexpr,
):  # fmt: skip
    """Gradients of one query's heads and weights. Heads are the rows of each product, so that its sums stay here."""
    t = tl.program_id(0)
    b = t // positions
    until = tl.minimum(t % positions + 1, slots)
    head = tl.arange(0, heads_box)
    channel = tl.arange(0, channels_box)
    tile = load_heads(q, t, heads, channels, heads_box, channels_box)
    weight = tl.load(w + t.to(tl.int64) * heads + head, mask=head < heads, other=0.0).to(tl.float32)
    grad_output = tl.load(dy)
    highest = tl.load(top + t)
    acc = tl.zeros([heads_box, channels_box], tl.float32)
    acc_w = tl.zeros([heads_box], tl.float32)
    for j in tl.range(0, until, block_n):
        keys, there = load_keys(k, chosen, t, b, j, slots, until, positions, block_n, channels, channels_box)
        x = tl.dot(tile, keys.T)
        score = tl.sum(tl.maximum(x, 0.0) * weight[:, None], 0)
        slot = j + tl.arange(0, block_n)
        ds = gradient_of_scores(score, highest, target, t, slot, there, slots, grad_output)
        acc_w += tl.sum(tl.maximum(x, 0.0) * ds[None, :], 1)
        dx = tl.where(x > 0, weight[:, None] * ds[None, :], 0.0)
        acc = tl.dot(dx.to(keys.dtype), keys, acc)
    tl.store(dw + t.to(tl.int64) * heads + head, acc_w.to(dw.dtype.element_ty), mask=head < heads)
    at = t.to(tl.int64) * heads * channels + head[:, None] * channels + channel[None, :]
    inside = (head < heads)[:, None] & (channel < channels)[None, :]
    tl.store(dq + at, acc.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def index_parts_kernel(
    q, k, w, chosen, target, top, dy, parts, ranks, begins, first_query, positions, heads, slots, block_n: tl.constexpr,
    channels: tl.constexpr, channels_box: tl.constexpr, heads_box: tl.constexpr,
):  # fmt: skip
    """What one query adds to the gradients of `block_n` of its keys."""
    g = tl.program_id(0)
    j = tl.program_id(1) * block_n
    t = first_query + g
    b = t // positions
    until = tl.minimum(t % positions + 1, slots)
    if j < until:
        head = tl.arange(0, heads_box)
        channel = tl.arange(0, channels_box)
        tile = load_heads(q, t, heads, channels, heads_box, channels_box)
        weight = tl.load(w + t.to(tl.int64) * heads + head, mask=head < heads, other=0.0).to(tl.float32)
        keys, there = load_keys(k, chosen, t, b, j, slots, until, positions, block_n, channels, channels_box)
        x = tl.dot(keys, tile.T)
        score = tl.sum(tl.maximum(x, 0.0) * weight[None, :], 1)
        slot = j + tl.arange(0, block_n)
        ds = gradient_of_scores(score, tl.load(top + t), target, t, slot, there, slots, tl.load(dy))
        dx = tl.where(x > 0, weight[None, :] * ds[:, None], 0.0)
        part = tl.dot(dx.to(tile.dtype), tile)
        key = tl.load(chosen + t.to(tl.int64) * slots + slot, mask=there, other=0)
        place = place_of(ranks, begins, g, key, there, positions)
        at = parts + place.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(at, part.to(parts.dtype.element_ty), mask=there[:, None] & (channel < channels)[None, :])
