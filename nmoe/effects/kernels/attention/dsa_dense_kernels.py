"""The indexer's loss over all keys, and its gradients, while every query reads all keys.

Letters: b sequence, m first query and n first key of a block, h head, x head of the indexer; `index` counts the blocks
of queries of a chunk, whose scores [queries, positions] in fp32 exist at once. `score_kernel` of the indexer writes
them; `target_kernel` replaces each with the slope of the loss towards it, from which one kernel that owns queries and
one that owns keys make gradients. Every sum has one owner and one order: gradients are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import HIDDEN, LOG2_E, load_block, visible
from nmoe.effects.kernels.attention.dsa_index_kernels import first_key, load_rows


@triton.jit
def sums_kernel(
    scores, start, top, first_block, row_blocks, positions, block_m: tl.constexpr, block_n: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Natural logarithm of the sum of exponentials of one query's scores, to `top` [queries of the chunk]."""
    b = first_block // row_blocks
    i = first_block % row_blocks * block_m + tl.program_id(0)
    if i < positions:
        first = first_key(start, b, i, positions, documents)
        row = scores + tl.program_id(0).to(tl.int64) * positions
        # A number a place in a block: one reduction after the loop; Triton 3.7 fails on the loop's own for sm_100.
        row_max = tl.full([block_n], HIDDEN, tl.float32)
        row_sum = tl.zeros([block_n], tl.float32)
        for n in tl.range(first, i + 1, block_n):
            key = n + tl.arange(0, block_n)
            score = tl.load(row + key, mask=key <= i, other=HIDDEN)
            new_max = tl.maximum(row_max, score)
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.exp(score - new_max)
            row_max = new_max
        highest = tl.max(row_max, 0)
        total = tl.sum(row_sum * tl.exp(row_max - highest), 0)
        tl.store(top + tl.program_id(0), highest + tl.log(total))


@triton.jit
def target_kernel(
    q, q_rope, k, k_rope, lse, start, top, scores, parts, first_block, row_blocks, key_blocks, positions, heads, scale,
    block_m: tl.constexpr, block_n: tl.constexpr, nope: tl.constexpr, rope: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Of one block of queries and keys: what it adds to the loss of each query, and the slopes in place of the scores.

    A slope is the indexer's probability less the mean of the heads', whose log-sums `lse` [B H T] has.
    """
    index = tl.program_id(0) // key_blocks
    block = tl.program_id(0) % key_blocks
    n = block * block_n
    b = first_block // row_blocks
    m = (first_block % row_blocks + index) * block_m
    row = index * block_m + tl.arange(0, block_m)
    queries = m + tl.arange(0, block_m)
    part = tl.zeros([block_m], tl.float32)
    # starts never decrease: what the first query does not see, no query sees
    if (n < tl.minimum(m + block_m, positions)) & (n + block_n > first_key(start, b, m, positions, documents)):
        key = n + tl.arange(0, block_n)
        shared = load_block(k_rope, b, 0, n, block_n, rope)
        mean = tl.zeros([block_m, block_n], tl.float32)
        for h in tl.range(0, heads):
            s = tl.dot(load_block(q, b, h, m, block_m, nope), load_block(k, b, h, n, block_n, nope).T)
            s = tl.dot(load_block(q_rope, b, h, m, block_m, rope), shared.T, s)
            at = lse + (b * heads + h).to(tl.int64) * positions + queries
            off = tl.load(at, mask=queries < positions, other=0.0) * LOG2_E
            mean += tl.exp2(s * (scale * LOG2_E) - off[:, None])
        first = first_key(start, b, queries, positions, documents)
        seen = visible(queries[:, None], key[None, :], first[:, None], documents) & (queries < positions)[:, None]
        mean = tl.where(seen, mean / heads, 0.0)
        to = scores + row.to(tl.int64)[:, None] * positions + key[None, :]
        own = tl.load(to, mask=seen, other=0.0) - tl.load(top + row, mask=queries < positions, other=0.0)[:, None]
        known = tl.where(mean > 0, tl.log(tl.where(mean > 0, mean, 1.0)), 0.0)
        part = tl.sum(mean * (known - own), 1)
        tl.store(to, tl.exp(own) - mean, mask=seen)
    tl.store(parts + row * key_blocks + block, part)


@triton.jit
def query_kernel(
    q, k, w, start, slopes, dq, dw, first_block, row_blocks, positions, heads, block_m: tl.constexpr,
    block_n: tl.constexpr, channels: tl.constexpr, channels_box: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of the indexer and of its weights, for one block of queries."""
    index = tl.program_id(0) // heads
    x = tl.program_id(0) % heads
    b = first_block // row_blocks
    m = (first_block % row_blocks + index) * block_m
    queries = m + tl.arange(0, block_m)
    inside = queries < positions
    first = first_key(start, b, queries, positions, documents)
    own = (b * positions + queries).to(tl.int64) * heads + x
    tile = load_rows(q, own, inside, channels, channels_box)
    row = slopes + (index * block_m + tl.arange(0, block_m)).to(tl.int64) * positions
    acc = tl.zeros([block_m, channels_box], tl.float32)
    acc_w = tl.zeros([block_m], tl.float32)
    begin = first_key(start, b, m, positions, documents) // block_n * block_n
    until = tl.minimum(m + block_m, positions)
    # a loop of no turn would hide from ptxas where accumulators live, and it would have each product wait for the last
    tl.assume(begin < until)
    for n in tl.range(begin, until, block_n):
        key = n + tl.arange(0, block_n)
        keys = load_rows(k, b * positions + key, key < positions, channels, channels_box)
        s = tl.dot(tile, keys.T)
        seen = visible(queries[:, None], key[None, :], first[:, None], documents) & inside[:, None]
        slope = tl.load(row[:, None] + key[None, :], mask=seen, other=0.0)
        acc_w += tl.sum(tl.maximum(s, 0.0) * slope, 1)
        acc = tl.dot(tl.where(s > 0, slope, 0.0).to(keys.dtype), keys, acc)
    weight = tl.load(w + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(dw + own, acc_w.to(dw.dtype.element_ty), mask=inside)
    channel = tl.arange(0, channels_box)
    to = dq + own[:, None] * channels + channel[None, :]
    acc = (acc * weight[:, None]).to(dq.dtype.element_ty)
    tl.store(to, acc, mask=inside[:, None] & (channel < channels)[None, :])


@triton.jit
def key_kernel(
    q, k, w, start, slopes, total, first_block, row_blocks, number, positions, heads, block_m: tl.constexpr,
    block_n: tl.constexpr, channels: tl.constexpr, channels_box: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of `block_n` keys of one sequence, `total` [T Y] in fp32, what a chunk's queries have."""
    n = tl.program_id(0) * block_n
    b = first_block // row_blocks
    key = n + tl.arange(0, block_n)
    inside = key < positions
    tile = load_rows(k, b * positions + key, inside, channels, channels_box)
    channel = tl.arange(0, channels_box)
    to = total + key.to(tl.int64)[:, None] * channels + channel[None, :]
    held = inside[:, None] & (channel < channels)[None, :]
    acc = tl.load(to, mask=held, other=0.0)
    begin = first_block % row_blocks
    for index in tl.range(tl.maximum(n // block_m - begin, 0), number):
        m = (begin + index) * block_m
        if n + block_n > first_key(start, b, m, positions, documents):
            queries = m + tl.arange(0, block_m)
            first = first_key(start, b, queries, positions, documents)
            there = queries < positions
            seen = visible(queries[None, :], key[:, None], first[None, :], documents) & there[None, :]
            row = (index * block_m + tl.arange(0, block_m)).to(tl.int64) * positions
            slope = tl.load(slopes + row[None, :] + key[:, None], mask=seen, other=0.0)
            for x in tl.range(0, heads):
                own = (b * positions + queries).to(tl.int64) * heads + x
                rows = load_rows(q, own, there, channels, channels_box)
                weight = tl.load(w + own, mask=there, other=0.0).to(tl.float32)
                s = tl.dot(tile, rows.T)
                part = tl.where(s > 0, slope * weight[None, :], 0.0)
                acc = tl.dot(part.to(rows.dtype), rows, acc)
    tl.store(to, acc, mask=held)
