"""Sparse latent attention: every query reads the rows of its own keys, which all its heads share.

Letters: b sequence, t query (counted over all sequences), g query within a chunk, h first head and j first slot of a
block; a slot is a place in a query's list of keys. A row of `kv` has `rank` channels of the latent, which is key and
value, and `rope` rotated ones behind them.

Both passes go through the queries in chunks. In the forward pass `weights_kernel` makes each pair's weight, relative to
the highest score of its block of slots, `output_kernel` sums them over keys, and `mean_kernel` over heads, which is
what the indexer is trained towards.

In the backward pass `pairs_kernel` makes the probabilities of a chunk's pairs and the
gradients of their scores, `dq_kernel` sums them over keys. Their sum over queries would need atomics, as several
queries read one key: `parts_kernel` writes what each pair adds, over all heads, and `lists` has a key's owner add that
up in the order of the queries. Every sum has one owner and one order, so that gradients are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E
from nmoe.effects.kernels.attention.dsa_index_kernels import load_rows
from nmoe.effects.kernels.attention.lists import place_of

GENERAL = ("positions", "slots")
"""Integers of which the compiled code assumes nothing: not that a loop over slots has one turn, as `nsa_kernels`."""


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
def load_pairs(x, g, slot, there, heads, slots, h, block_m: tl.constexpr):
    """What [g slots heads] has of some slots and `block_m` heads from h on."""
    head = h + tl.arange(0, block_m)
    at = (g.to(tl.int64) * slots + slot)[:, None] * heads + head[None, :]
    return tl.load(x + at, mask=there[:, None] & (head < heads)[None, :], other=0.0)


@triton.jit(do_not_specialize=GENERAL)
def weights_kernel(
    q, kv, chosen, p, top, size, first_query, positions, heads, slots, scale, block_m: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
):  # fmt: skip
    """Weights [g slots heads] of `block_n` keys and `block_m` heads of a query, their highest score and their sum.

    That score is to base 2 and rounded up to a whole number: weights of two blocks differ by a power of two, which
    another block's reader multiplies by without rounding.
    """
    width: tl.constexpr = rank + rope
    g = tl.program_id(0)
    n = tl.program_id(1)
    j = n * block_n
    t = first_query + g
    if j < list_of(t, positions, slots):
        slot, at, there = load_slots(chosen, t, positions, slots, j, block_n)
        head = tl.program_id(2) * block_m + tl.arange(0, block_m)
        mine = head < heads
        row = t.to(tl.int64) * heads + head
        # Transposed, keys by heads: Triton 3.6 gets the transpose of a product wrong on sm_90.
        s = tl.zeros([block_n, block_m], tl.float32)
        for c in tl.range(0, width, block_k):
            keys = load_part(kv, at, there, width, c, width, block_k)
            s = tl.dot(keys, load_part(q, row, mine, width, c, width, block_k).T, s)
        # Scaled before the comparison: a hidden score minus itself must be exactly zero.
        s = tl.where(there[:, None], s * (scale * LOG2_E), HIDDEN)
        most = tl.ceil(tl.max(s, 0))
        # The sum is of what is stored: a query of one key has its value then, and no gradient but for fp32's rounding.
        weight = tl.exp2(s - most[None, :]).to(p.dtype.element_ty)
        to = (g.to(tl.int64) * slots + slot)[:, None] * heads + head[None, :]
        tl.store(p + to, weight, mask=(slot < slots)[:, None] & mine[None, :])
        out = (g * tl.num_programs(1) + n) * heads + head
        tl.store(top + out, most, mask=mine)
        tl.store(size + out, tl.sum(weight.to(tl.float32), 0), mask=mine)


@triton.jit(do_not_specialize=GENERAL)
def output_kernel(
    kv, chosen, p, top, size, o, lse, first_query, positions, heads, slots, blocks, block: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr,
):  # fmt: skip
    """Output of `block_m` heads of one query in `block_k` channels, and the logarithm to base 2 of each head's sum.

    `block` slots have a highest score and a sum together, of which a step takes `block_n`.
    """
    width: tl.constexpr = rank + rope
    g = tl.program_id(0)
    t = first_query + g
    h = tl.program_id(1) * block_m
    head = h + tl.arange(0, block_m)
    mine = head < heads
    c = tl.program_id(2) * block_k
    until = list_of(t, positions, slots)
    highest = tl.full([block_m], HIDDEN, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    for n in tl.range(0, tl.cdiv(until, block)):
        at_block = (g * blocks + n) * heads + head
        most = tl.load(top + at_block, mask=mine, other=0.0)
        new = tl.maximum(highest, most)
        total = total * tl.exp2(highest - new) + tl.load(size + at_block, mask=mine, other=1.0) * tl.exp2(most - new)
        highest = new
    acc = tl.zeros([block_m, block_k], tl.float32)
    # a step's keys are known a step before: else its loads would wait for where they are
    slot, at, there = load_slots(chosen, t, positions, slots, 0, block_n)
    # a query sees itself; a loop of no turn would hide from ptxas where accumulators live, and products would wait
    tl.assume(until > 0)
    for j in tl.range(0, until, block_n):
        weight = load_pairs(p, g, slot, there, heads, slots, h, block_m)
        most = tl.load(top + (g * blocks + j // block) * heads + head, mask=mine, other=0.0)
        keys = load_part(kv, at, there, width, c, rank, block_k)
        slot, at, there = load_slots(chosen, t, positions, slots, j + block_n, block_n)
        acc = tl.dot((weight.T * tl.exp2(most - highest)[:, None]).to(keys.dtype), keys, acc)
        if slots < 0:  # never, which no compiler knows: the product is waited for, before its left side is written anew
            acc = tl.zeros_like(acc)
    row = t.to(tl.int64) * heads + head
    store_part(o, row, mine, rank, c, acc / total[:, None], block_k)
    if tl.program_id(2) == 0:
        tl.store(lse + row, highest + tl.log2(total), mask=mine)


@triton.jit(do_not_specialize=GENERAL)
def mean_kernel(
    p, top, lse, target, first_query, positions, heads, slots, blocks, block: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr,
):  # fmt: skip
    """Mean of the heads' probabilities of `block_n` keys of a query, `block_m` heads a step."""
    g = tl.program_id(0)
    j = tl.program_id(1) * block_n
    t = first_query + g
    slot = j + tl.arange(0, block_n)
    there = slot < list_of(t, positions, slots)
    mean = tl.zeros([block_n], tl.float32)
    if j < list_of(t, positions, slots):
        for h in tl.range(0, heads, block_m):
            head = h + tl.arange(0, block_m)
            mine = head < heads
            weight = load_pairs(p, g, slot, there, heads, slots, h, block_m).to(tl.float32)
            most = tl.load(top + (g * blocks + j // block) * heads + head, mask=mine, other=0.0)
            log_sum = tl.load(lse + t.to(tl.int64) * heads + head, mask=mine, other=0.0)
            mean += tl.sum(weight * tl.exp2(most - log_sum)[None, :], 1)
    tl.store(target + t.to(tl.int64) * slots + slot, mean / heads, mask=slot < slots)


@triton.jit
def delta_kernel(o, do, delta, rows, block_m: tl.constexpr, rank: tl.constexpr, rank_box: tl.constexpr):
    """What softmax takes off each of a row's gradients: sum(dO * O) = sum(dP * P)."""
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    inside = row < rows
    output = load_rows(o, row, inside, rank, rank_box).to(tl.float32)
    gradient = load_rows(do, row, inside, rank, rank_box).to(tl.float32)
    tl.store(delta + row, tl.sum(output * gradient, 1), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
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
        s = tl.zeros([block_n, block_m], tl.float32)  # transposed, as in `weights_kernel`
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


@triton.jit(do_not_specialize=GENERAL)
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


@triton.jit(do_not_specialize=GENERAL)
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
