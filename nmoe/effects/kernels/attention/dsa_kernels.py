"""Sparse latent attention: every query reads the rows of its own keys, which all its heads share.

Letters: b sequence, t query (counted over all sequences), g query within a chunk, h first head and j first slot of a
block; a slot is a place in a query's list of keys. A row of `kv` has `rank` channels of the latent, which is key and
value, and `rope` rotated ones behind them.

The backward pass goes through the queries in chunks. `pairs_kernel` makes the probabilities of a chunk's pairs and the
gradients of their scores, `dq_kernel` sums them over keys. Their sum over queries would need atomics, as several
queries read one key: `parts_kernel` writes what each pair adds, over all heads, and `lists` has a key's owner add that
up in the order of the queries. Every sum has one owner and one order, so that gradients are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E
from nmoe.effects.kernels.attention.dsa_index_kernels import load_heads, load_rows
from nmoe.effects.kernels.attention.lists import place_of


@triton.jit
def list_of(t, positions, slots):
    """How many slots of a query can have a key: it sees no more than those up to its own."""
    return tl.minimum(t % positions + 1, slots)


@triton.jit
def load_slots(chosen, t, positions, slots, j, block_n: tl.constexpr):
    """Slots, the rows of their keys, and which slots have one."""
    slot = j + tl.arange(0, block_n)
    key = tl.load(chosen + t.to(tl.int64) * slots + slot, mask=slot < list_of(t, positions, slots), other=-1)
    return slot, t // positions * positions + tl.maximum(key, 0), key >= 0


@triton.jit
def load_part(x, row, inside, width: tl.constexpr, c, until, block_k: tl.constexpr):
    """Channels c .. c + block_k - 1 of rows [n width], zeros from `until` on."""
    channel = c + tl.arange(0, block_k)
    at = x + row.to(tl.int64)[:, None] * width + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel < until)[None, :], other=0.0)


@triton.jit
def store_part(x, row, inside, width: tl.constexpr, c, value, block_k: tl.constexpr):
    """Writes channels c .. c + block_k - 1 of rows [n width]."""
    channel = c + tl.arange(0, block_k)
    to = x + row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(to, value.to(x.dtype.element_ty), mask=inside[:, None] & (channel < width)[None, :])


@triton.jit
def forward_kernel(
    q, kv, chosen, o, lse, positions, heads, slots, scale, block_m: tl.constexpr, block_n: tl.constexpr,
    rank: tl.constexpr, rope: tl.constexpr, rank_box: tl.constexpr, rope_box: tl.constexpr,
):  # fmt: skip
    """Output of `block_m` heads of one query, and the logarithm to base 2 of each head's sum of exponentials."""
    width: tl.constexpr = rank + rope
    head_blocks = tl.cdiv(heads, block_m)
    t = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * block_m + tl.arange(0, block_m)
    mine = head < heads
    channel = tl.arange(0, rank_box)
    turned = tl.arange(0, rope_box)
    row = t.to(tl.int64) * heads + head
    own = tl.load(
        q + row[:, None] * width + channel[None, :], mask=mine[:, None] & (channel < rank)[None, :], other=0.0
    )
    own_turned = tl.load(
        q + row[:, None] * width + rank + turned[None, :], mask=mine[:, None] & (turned < rope)[None, :], other=0.0
    )
    scale2 = scale * LOG2_E
    acc = tl.zeros([block_m, rank_box], tl.float32)
    row_max = tl.full([block_m], float("-inf"), tl.float32)
    row_sum = tl.zeros([block_m], tl.float32)
    # a step's keys are known a step before: else its loads would wait for where they are
    _, at, there = load_slots(chosen, t, positions, slots, 0, block_n)
    for j in tl.range(0, list_of(t, positions, slots), block_n):
        start = kv + at.to(tl.int64)[:, None] * width
        latent = tl.load(start + channel[None, :], mask=there[:, None] & (channel < rank)[None, :], other=0.0)
        key = tl.load(start + rank + turned[None, :], mask=there[:, None] & (turned < rope)[None, :], other=0.0)
        seen = there
        _, at, there = load_slots(chosen, t, positions, slots, j + block_n, block_n)
        s = tl.dot(own, latent.T)
        s = tl.dot(own_turned, key.T, s)
        # Scaled before the comparison: a hidden score minus itself must be exactly zero.
        s = tl.where(seen[None, :], s * scale2, HIDDEN)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * rescale[:, None])
        row_max = new_max
    out = (acc / row_sum[:, None]).to(o.dtype.element_ty)
    tl.store(o + row[:, None] * rank + channel[None, :], out, mask=mine[:, None] & (channel < rank)[None, :])
    tl.store(lse + row, row_max + tl.log2(row_sum), mask=mine)


@triton.jit
def delta_kernel(o, do, delta, rows, block_m: tl.constexpr, rank: tl.constexpr, rank_box: tl.constexpr):
    """What softmax takes off each of a row's gradients: sum(dO * O) = sum(dP * P)."""
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    inside = row < rows
    output = load_rows(o, row, inside, rank, rank_box).to(tl.float32)
    gradient = load_rows(do, row, inside, rank, rank_box).to(tl.float32)
    tl.store(delta + row, tl.sum(output * gradient, 1), mask=inside)


@triton.jit
def pairs_kernel(
    q, kv, do, chosen, lse, delta, p, ds, first_query, positions, heads, slots, scale, block_m: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
):  # fmt: skip
    """Probabilities and gradients of scores, [g slots heads] each, of `block_n` keys and `block_m` heads of a query."""
    width: tl.constexpr = rank + rope
    g = tl.program_id(0)
    j = tl.program_id(1) * block_n
    t = first_query + g
    if j < list_of(t, positions, slots):
        slot, at, there = load_slots(chosen, t, positions, slots, j, block_n)
        head = tl.program_id(2) * block_m + tl.arange(0, block_m)
        mine = head < heads
        row = t.to(tl.int64) * heads + head
        # Transposed, keys by heads: Triton 3.6 gets the transpose of a product wrong on sm_90.
        s = tl.zeros([block_n, block_m], tl.float32)
        dp = tl.zeros([block_n, block_m], tl.float32)
        for c in tl.range(0, width, block_k):
            keys = load_part(kv, at, there, width, c, width, block_k)
            s = tl.dot(keys, load_part(q, row, mine, width, c, width, block_k).T, s)
            dp = tl.dot(keys, load_part(do, row, mine, rank, c, rank, block_k).T, dp)
        top = tl.load(lse + row, mask=mine, other=0.0)
        off = tl.load(delta + row, mask=mine, other=0.0)
        weight = tl.where(there[:, None] & mine[None, :], tl.exp2(s * (scale * LOG2_E) - top[None, :]), 0.0)
        to = (g.to(tl.int64) * slots + slot)[:, None] * heads + head[None, :]
        inside = (slot < slots)[:, None] & mine[None, :]
        tl.store(p + to, weight.to(p.dtype.element_ty), mask=inside)
        # Rounded to the input format for the tensor cores, as P is.
        tl.store(ds + to, (weight * (dp - off[None, :]) * scale).to(ds.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(x, g, slot, there, heads, slots, h, block_m: tl.constexpr):
    """What [g slots heads] has of some slots and `block_m` heads from h on."""
    head = h + tl.arange(0, block_m)
    at = (g.to(tl.int64) * slots + slot)[:, None] * heads + head[None, :]
    return tl.load(x + at, mask=there[:, None] & (head < heads)[None, :], other=0.0)


@triton.jit
def dq_kernel(
    kv, chosen, ds, dq, first_query, positions, heads, slots, block_m: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
):  # fmt: skip
    """Gradient of `block_m` heads of one query in `block_k` channels and half as many behind them."""
    width: tl.constexpr = rank + rope
    half: tl.constexpr = block_k // 2
    g = tl.program_id(0)
    t = first_query + g
    head = tl.program_id(1) * block_m + tl.arange(0, block_m)
    c = tl.program_id(2) * (block_k + half)
    acc = tl.zeros([block_m, block_k], tl.float32)
    acc_half = tl.zeros([block_m, half], tl.float32)
    slot, at, there = load_slots(chosen, t, positions, slots, 0, block_n)
    for j in tl.range(0, list_of(t, positions, slots), block_n):
        dscore = load_pairs(ds, g, slot, there, heads, slots, tl.program_id(1) * block_m, block_m)
        keys = load_part(kv, at, there, width, c, width, block_k)
        rest = load_part(kv, at, there, width, c + block_k, width, half)
        slot, at, there = load_slots(chosen, t, positions, slots, j + block_n, block_n)
        acc = tl.dot(dscore.T, keys, acc)
        acc_half = tl.dot(dscore.T, rest, acc_half)
    row = t.to(tl.int64) * heads + head
    store_part(dq, row, head < heads, width, c, acc, block_k)
    store_part(dq, row, head < heads, width, c + block_k, acc_half, half)


@triton.jit
def parts_kernel(
    q, do, chosen, p, ds, parts, ranks, begins, first_query, positions, heads: tl.constexpr, slots,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
):  # fmt: skip
    """What one query adds to the gradients of `block_n` of its keys, over all heads, `block_k` channels a step."""
    width: tl.constexpr = rank + rope
    g = tl.program_id(0)
    j = tl.program_id(1) * block_n
    t = first_query + g
    if j < list_of(t, positions, slots):
        slot, at, there = load_slots(chosen, t, positions, slots, j, block_n)
        place = place_of(ranks, begins, g, at - t // positions * positions, there, positions)
        weight = load_pairs(p, g, slot, there, heads, slots, 0, block_m)
        dscore = load_pairs(ds, g, slot, there, heads, slots, 0, block_m)
        for c in tl.range(0, width, block_k):
            acc = tl.zeros([block_n, block_k], tl.float32)
            for h in tl.static_range(0, heads, block_m):
                if heads > block_m:
                    weight = load_pairs(p, g, slot, there, heads, slots, h, block_m)
                    dscore = load_pairs(ds, g, slot, there, heads, slots, h, block_m)
                head = h + tl.arange(0, block_m)
                row = t.to(tl.int64) * heads + head
                acc = tl.dot(weight, load_part(do, row, head < heads, rank, c, rank, block_k), acc)
                acc = tl.dot(dscore, load_part(q, row, head < heads, width, c, width, block_k), acc)
            channel = c + tl.arange(0, block_k)
            to = parts + place.to(tl.int64)[:, None] * width + channel[None, :]
            tl.store(to, acc.to(parts.dtype.element_ty), mask=there[:, None] & (channel < width)[None, :])


@triton.jit
def target_kernel(
    q, kv, chosen, lse, index_q, index_k, index_w, target, top, loss, positions, heads, slots, index_heads, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
    channels: tl.constexpr, channels_box: tl.constexpr, heads_box: tl.constexpr,
):  # fmt: skip
    """Mean of the heads' probabilities of one query's keys, how far the indexer's are from it, and their log-sum."""
    width: tl.constexpr = rank + rope
    t = tl.program_id(0)
    index_head = tl.arange(0, heads_box)
    tile = load_heads(index_q, t, index_heads, channels, heads_box, channels_box)
    weight = tl.load(index_w + t.to(tl.int64) * index_heads + index_head, mask=index_head < index_heads, other=0.0)
    # A number a place in a block: one reduction after the loop; Triton 3.7 fails on the loop's own for sm_100.
    row_max = tl.full([block_n], HIDDEN, tl.float32)
    row_sum = tl.zeros([block_n], tl.float32)
    distance = tl.zeros([block_n], tl.float32)
    mass = tl.zeros([block_n], tl.float32)
    for j in tl.range(0, list_of(t, positions, slots), block_n):
        slot, at, there = load_slots(chosen, t, positions, slots, j, block_n)
        mean = tl.zeros([block_n], tl.float32)
        for h in tl.range(0, heads, block_m):
            head = h + tl.arange(0, block_m)
            mine = head < heads
            row = t.to(tl.int64) * heads + head
            s = tl.zeros([block_n, block_m], tl.float32)
            for c in tl.range(0, width, block_k):
                keys = load_part(kv, at, there, width, c, width, block_k)
                s = tl.dot(keys, load_part(q, row, mine, width, c, width, block_k).T, s)
            off = tl.load(lse + row, mask=mine, other=0.0)
            mean += tl.sum(tl.where(mine[None, :], tl.exp2(s * (scale * LOG2_E) - off[None, :]), 0.0), 1)
        mean = tl.where(there, mean / heads, 0.0)
        tl.store(target + t.to(tl.int64) * slots + slot, mean, mask=slot < slots)
        index_keys = load_rows(index_k, at, there, channels, channels_box)
        score = tl.sum(tl.maximum(tl.dot(index_keys, tile.T), 0.0) * weight.to(tl.float32)[None, :], 1)
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
