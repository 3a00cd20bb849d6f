"""The kernels of the chunked delta rule: `pure.model.attention.kda.attend_kda`, forward and backward.

Letters: b sequence, n chunk of a row, h head, L tokens of a chunk, C channels. A tile is one chunk of one head. It is
contiguous in what the kernels pass to one another: [B N H L C], rows beyond the end of a sequence included.

A chunk's pairs are scored in log2(L) levels. At level l its tokens are cut into blocks of 2^l, and pairs are those of a
block with the one before it, of which the first is even. Keys decay up to the middle of the two and rows from there:
one factor a token, an exponential of a sum of decays, none above 1, so that nothing overflows whatever the gate. The
inverse of the unit triangular matrix of corrections is built by the same levels: of two blocks with inverses P and R
and products Q across, it is [P 0; -R Q P, R]. Powers of the matrix, which overflow where keys repeat, do not occur.

Decays are to base 2 and summed within a chunk. No atomics: every sum has one owner and one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nmoe.effects.kernels.attention.blocks import LOG2_E

LEAST = tl.constexpr(-126.0)
"""Decay to base 2 at which a channel forgets all: the smallest normal fp32. It bounds what sums of decays lose."""


@triton.jit
def placed(heads, chunks):
    """Sequence, chunk, head and tile of a program that owns a tile."""
    tile = tl.program_id(0)
    return tile // (heads * chunks), tile // heads % chunks, tile % heads, tile.to(tl.int64)


@triton.jit
def square(rows: tl.constexpr, columns: tl.constexpr):
    """Elements of a contiguous matrix."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def outer(b, n, h, positions, heads, length: tl.constexpr):
    """Number among [B T H] of a tile's first token; in 64 bits, what is added to it within a tile fits into 32."""
    return (b.to(tl.int64) * positions + n * length) * heads + h


@triton.jit
def load_rows(x, at, channel, inside):
    """Rows [L C] that begin `at` elements after x, in fp32; zeros where a token is not `inside`."""
    return tl.load(x + at[:, None] + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def reach(start, b, n, positions, length: tl.constexpr, documents: tl.constexpr):
    """First token of each row's document, whether it sees the memory that enters, and whether its document leaves."""
    t = n * length + tl.arange(0, length)
    first = t * 0
    last = n * 0
    if documents:
        # rows beyond the end are of the last document
        first = tl.load(start + b.to(tl.int64) * positions + tl.minimum(t, positions - 1))
        last = tl.load(start + b.to(tl.int64) * positions + tl.minimum(n * length + length, positions) - 1)
    return first, (first < n * length) | (first <= 0), last <= t


@triton.jit
def half_way(total, channel, level, length: tl.constexpr, channels: tl.constexpr):
    """Factors [L C] of a level: decays of the odd blocks' tokens from the middle on, of the others' up to it."""
    row = tl.arange(0, length)
    end = ((row >> (level + 1)) << (level + 1)) + (1 << level) - 1
    sums = tl.load(total + row[:, None] * channels + channel[None, :])
    return tl.exp2(-tl.abs(sums - tl.load(total + end[:, None] * channels + channel[None, :])))


@triton.jit
def across(level, length: tl.constexpr):
    """Where [L L] a row and a key are in neighbouring blocks of a level, the row in the odd one."""
    row = tl.arange(0, length) >> level
    return (row[:, None] == row[None, :] + 1) & ((row & 1) == 1)[:, None]


@triton.jit
def gated(x, bias, log_rate, limit, h, channel, channels: tl.constexpr, bounded: tl.constexpr):
    """Decays [L C] of rows of gates in nats, and their derivatives by the gate and by the logarithm of the rate."""
    rate = tl.exp(tl.load(log_rate + h).to(tl.float32))
    x += tl.load(bias + h * channels + channel).to(tl.float32)[None, :]
    if bounded:
        share = 1.0 / (1.0 + tl.exp(-rate * x))
        slope = -limit * share * (1.0 - share) * rate
        return -limit * share, slope, slope * x
    else:
        small = tl.exp(-tl.abs(x))
        decay = -rate * (tl.maximum(x, 0.0) + tl.log(1.0 + small))
        return decay, -rate * tl.where(x > 0, 1.0, small) / (1.0 + small), decay


@triton.jit
def sum_kernel(
    x, bias, log_rate, total, limit, positions, heads, chunks, length: tl.constexpr, channels: tl.constexpr,
    values: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's decays through each token, to base 2; tokens beyond the end keep all."""
    b, n, h, tile = placed(heads, chunks)
    row = tl.arange(0, length)
    inside = n * length + row < positions
    x += outer(b, n, h, positions, heads, length) * channels
    channel = tl.program_id(1) * values + tl.arange(0, values)
    gates = load_rows(x, row * heads * channels, channel, inside)
    decay, _, _ = gated(gates, bias, log_rate, limit, h, channel, channels, bounded)
    decay = tl.where(inside[:, None], tl.maximum(decay * LOG2_E, LEAST), 0.0)
    total += tile * (length * channels)
    tl.store(total + row[:, None] * channels + channel[None, :], tl.cumsum(decay, 0))


@triton.jit
def sum_backward_kernel(
    x, bias, log_rate, dtotal, dx, dbias, drate, limit, positions, heads, chunks, length: tl.constexpr,
    channels: tl.constexpr, values: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's gates from that of the sums of its decays, and its parts of those of bias and log_rate."""
    b, n, h, tile = placed(heads, chunks)
    row = tl.arange(0, length)
    inside = n * length + row < positions
    given = outer(b, n, h, positions, heads, length) * channels
    x, dx = x + given, dx + given
    channel = tl.program_id(1) * values + tl.arange(0, values)
    gates = load_rows(x, row * heads * channels, channel, inside)
    decay, by_gate, by_rate = gated(gates, bias, log_rate, limit, h, channel, channels, bounded)
    # A decay is part of the sums from its token on. A product, as a scan beside a sum has crashed on sm_90.
    later = tl.where(row[:, None] <= row[None, :], 1.0, 0.0)
    dtotal += tile * (length * channels)
    sums = tl.load(dtotal + row[:, None] * channels + channel[None, :])
    gradient = tl.dot(later, sums, input_precision="tf32x3")
    gradient = tl.where(inside[:, None] & (decay * LOG2_E > LEAST), gradient, 0.0)
    at = (row * heads * channels)[:, None] + channel[None, :]
    tl.store(dx + at, (gradient * by_gate).to(dx.dtype.element_ty), mask=inside[:, None])
    tl.store(dbias + tile * channels + channel, tl.sum(gradient * by_gate, 0))
    tl.store(drate + tile * channels + channel, tl.sum(gradient * by_rate, 0))


@triton.jit
def prepare_kernel(
    q, k, v, total, step, start, entered, left, correction, value, weight, inverse, carried, positions, heads, chunks,
    by_batch, by_position, scale, eps, length: tl.constexpr, channels: tl.constexpr, levels: tl.constexpr,
    values: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """All of a tile that does not depend on the memory, `values` channels at a time.

    entered, left       queries decayed from the chunk's begin on, keys decayed up to its end
    weight, inverse     of the values for each row; of the matrix of corrections
    correction, value   what each token takes from the memory, and what it would write into an empty one
    carried             what the memory keeps of each channel
    """
    b, n, h, tile = placed(heads, chunks)
    row = tl.arange(0, length)
    t = n * length + row
    inside = t < positions
    given = b.to(tl.int64) * by_batch + (n * length).to(tl.int64) * by_position + h * channels
    q, k, v = q + given, k + given, v + given
    given = row * by_position
    step += outer(b, n, h, positions, heads, length)
    beta = tl.load(step + row * heads, mask=inside, other=0.0).to(tl.float32)
    total += tile * (length * channels)
    entered, left = entered + tile * (length * channels), left + tile * (length * channels)
    correction, value = correction + tile * (length * channels), value + tile * (length * channels)
    first, sees, stays = reach(start, b, n, positions, length, documents)
    by_query = tl.zeros([length], tl.float32)
    by_key = tl.zeros([length], tl.float32)
    own = tl.zeros([length], tl.float32)
    for begin in tl.range(0, channels, values):
        channel = begin + tl.arange(0, values)
        queries = load_rows(q, given, channel, inside)
        keys = load_rows(k, given, channel, inside)
        by_query += tl.sum(queries * queries, 1)
        by_key += tl.sum(keys * keys, 1)
        own += tl.sum(queries * keys, 1)
    by_query = tl.rsqrt(by_query + eps) * scale
    by_key = tl.rsqrt(by_key + eps)
    diagonal = row[:, None] == row[None, :]
    weights = tl.where(diagonal, (own * by_query * by_key)[:, None], 0.0)
    solved = tl.where(diagonal, 1.0, 0.0)
    for level in tl.range(0, levels):
        odd = ((row >> level) & 1) == 1
        by_near = by_key * tl.where(odd, beta, 1.0)
        scores = tl.zeros([length, length], tl.float32)
        overlap = tl.zeros([length, length], tl.float32)
        for begin in tl.range(0, channels, values):
            channel = begin + tl.arange(0, values)
            factor = half_way(total, channel, level, length, channels)
            near = (load_rows(k, given, channel, inside) * by_near[:, None] * factor).to(q.dtype.element_ty)
            far = (load_rows(q, given, channel, inside) * by_query[:, None] * factor).to(q.dtype.element_ty)
            scores = tl.dot(far, tl.trans(near), scores)
            overlap = tl.dot(near, tl.trans(near), overlap)
        pairs = across(level, length)
        if documents:
            pairs = pairs & (first[:, None] <= t[None, :])
        weights += tl.where(pairs, scores, 0.0)
        overlap = tl.where(pairs, overlap, 0.0)
        # tf32: ten bits of the inverse, which is rounded to eight
        solved -= tl.dot(tl.dot(solved, overlap, input_precision="tf32"), solved, input_precision="tf32")
    weight, inverse = weight + tile * (length * length), inverse + tile * (length * length)
    tl.store(weight + square(length, length), weights.to(weight.dtype.element_ty))
    solution = solved.to(inverse.dtype.element_ty)
    tl.store(inverse + square(length, length), solution)
    # the last row's document is the one that leaves
    seen = tl.max(tl.where(row == length - 1, sees.to(tl.int32), 0), 0)
    for begin in tl.range(0, channels, values):
        channel = begin + tl.arange(0, values)
        at = row[:, None] * channels + channel[None, :]
        sums = tl.load(total + at)
        at_end = tl.load(total + (length - 1) * channels + channel)
        tl.store(carried + tile * channels + channel, tl.where(seen > 0, tl.exp2(at_end), 0.0))
        since = tl.where(sees[:, None], tl.exp2(sums), 0.0)
        until = tl.where(stays[:, None], tl.exp2(at_end[None, :] - sums), 0.0)
        queries = load_rows(q, given, channel, inside) * by_query[:, None]
        keys = load_rows(k, given, channel, inside) * by_key[:, None]
        tl.store(entered + at, (queries * since).to(entered.dtype.element_ty))
        tl.store(left + at, (keys * until).to(left.dtype.element_ty))
        known = (keys * since * beta[:, None]).to(q.dtype.element_ty)
        tl.store(correction + at, tl.dot(solution, known).to(correction.dtype.element_ty))
        known = (load_rows(v, given, channel, inside) * beta[:, None]).to(q.dtype.element_ty)
        tl.store(value + at, tl.dot(solution, known).to(value.dtype.element_ty))


@triton.jit
def scan_kernel(
    correction, value, left, carried, before, states, fresh, after, heads, chunks, length: tl.constexpr,
    channels: tl.constexpr, values: tl.constexpr, goes_on: tl.constexpr,
):  # fmt: skip
    """The memory from chunk to chunk: [C V] of `values` channels of one head's value, in fp32.

    states  of each chunk the memory that enters it
    fresh   what its tokens write
    """
    blocks: tl.constexpr = channels // values
    pair = tl.program_id(0) // blocks
    b, h = (pair // heads).to(tl.int64), pair % heads
    column = tl.program_id(0) % blocks * values + tl.arange(0, values)
    own = tl.arange(0, channels)[:, None] * channels + column[None, :]
    inner = tl.arange(0, length)[:, None] * channels
    whole = pair.to(tl.int64) * (channels * channels)
    state = tl.zeros([channels, values], tl.float32)
    if goes_on:
        state += tl.load(before + whole + own)
    for n in tl.range(0, chunks):
        tile = (b * chunks + n) * heads + h
        at = tile * (length * channels)
        memory = state.to(states.dtype.element_ty)
        tl.store(states + tile * (channels * channels) + own, memory)
        taken = tl.dot(tl.load(correction + at + square(length, channels)), memory)
        written = (tl.load(value + at + inner + column[None, :]) - taken).to(fresh.dtype.element_ty)
        tl.store(fresh + at + inner + column[None, :], written)
        keeps = tl.load(carried + tile * channels + tl.arange(0, channels))
        keys = tl.load(left + at + square(length, channels))
        state = tl.dot(tl.trans(keys), written, state * keeps[:, None])
    tl.store(after + whole + own, state)


@triton.jit
def output_kernel(
    entered, states, weight, fresh, o, positions, heads, chunks, length: tl.constexpr, channels: tl.constexpr,
    values: tl.constexpr,
):  # fmt: skip
    """What a tile's queries read, of the memory that entered and of one another's values."""
    b, n, h, tile = placed(heads, chunks)
    column = tl.program_id(1) * values + tl.arange(0, values)
    row = tl.arange(0, length)
    states += tile * (channels * channels)
    memory = tl.load(states + tl.arange(0, channels)[:, None] * channels + column[None, :])
    entered, fresh = entered + tile * (length * channels), fresh + tile * (length * channels)
    read = tl.dot(tl.load(entered + square(length, channels)), memory)
    written = tl.load(fresh + row[:, None] * channels + column[None, :])
    weight += tile * (length * length)
    read = tl.dot(tl.load(weight + square(length, length)), written, read)
    o += outer(b, n, h, positions, heads, length) * channels
    at = (row * heads * channels)[:, None] + column[None, :]
    tl.store(o + at, read.to(o.dtype.element_ty), mask=(n * length + row < positions)[:, None])


@triton.jit
def scan_backward_kernel(
    entered, correction, left, carried, weight, do, dafter, dstates, dfresh, dbefore, positions, heads, chunks,
    length: tl.constexpr, channels: tl.constexpr, values: tl.constexpr, has_dafter: tl.constexpr, goes_on: tl.constexpr,
):  # fmt: skip
    """Gradient of the memory from the last chunk to the first.

    dstates  of each chunk the gradient of the memory that leaves it
    dfresh   of what its tokens write
    """
    blocks: tl.constexpr = channels // values
    pair = tl.program_id(0) // blocks
    b, h = (pair // heads).to(tl.int64), pair % heads
    column = tl.program_id(0) % blocks * values + tl.arange(0, values)
    own = tl.arange(0, channels)[:, None] * channels + column[None, :]
    row = tl.arange(0, length)
    inner = row[:, None] * channels
    whole = pair.to(tl.int64) * (channels * channels)
    state = tl.zeros([channels, values], tl.float32)
    if has_dafter:
        state += tl.load(dafter + whole + own)
    for back in tl.range(0, chunks):
        n = chunks - 1 - back
        tile = (b * chunks + n) * heads + h
        at = tile * (length * channels)
        full = square(length, channels)
        memory = state.to(dstates.dtype.element_ty)
        tl.store(dstates + tile * (channels * channels) + own, memory)
        rows = do + outer(b, n, h, positions, heads, length) * channels
        rows += (row * heads * channels)[:, None] + column[None, :]
        dy = tl.load(rows, mask=(n * length + row < positions)[:, None], other=0.0)
        written = tl.dot(tl.trans(tl.load(weight + tile * (length * length) + square(length, length))), dy)
        written = tl.dot(tl.load(left + at + full), memory, written).to(dfresh.dtype.element_ty)
        tl.store(dfresh + at + inner + column[None, :], written)
        keeps = tl.load(carried + tile * channels + tl.arange(0, channels))
        state = tl.dot(tl.trans(tl.load(entered + at + full)), dy, state * keeps[:, None])
        state -= tl.dot(tl.trans(tl.load(correction + at + full)), written)
    if goes_on:
        tl.store(dbefore + whole + own, state)


@triton.jit
def backward_kernel(
    q, k, v, total, step, start, inverse, states, fresh, o, do, dstates, dfresh, dq, dk, dv, dtotal, dstep, positions,
    heads, chunks, by_batch, by_position, scale, eps, length: tl.constexpr, channels: tl.constexpr,
    levels: tl.constexpr, values: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """All gradients of a tile, those of the memory before and after it given.

    With V what the tokens write, M the inverse and S the memory that enters: the gradient of β v is X = M' dV, and as
    V = M (β v - β k S), that of β k is -X S' and that of the matrix of corrections -X V', below the diagonal. What the
    scaling to unit length takes off is in closed form: q · dq = o · do, and k · dk = X · (2 V - β v), as a row of that
    matrix times V is β v - β k S - V.
    """
    b, n, h, tile = placed(heads, chunks)
    row = tl.arange(0, length)
    t = n * length + row
    inside = t < positions
    given = b.to(tl.int64) * by_batch + (n * length).to(tl.int64) * by_position + h * channels
    q, k, v = q + given, k + given, v + given
    given = row * by_position
    number = outer(b, n, h, positions, heads, length)
    step, dstep = step + number, dstep + number
    o, do = o + number * channels, do + number * channels
    dq, dk, dv = dq + number * channels, dk + number * channels, dv + number * channels
    number = row * heads
    total, dtotal = total + tile * (length * channels), dtotal + tile * (length * channels)
    fresh, dfresh = fresh + tile * (length * channels), dfresh + tile * (length * channels)
    states, dstates = states + tile * (channels * channels), dstates + tile * (channels * channels)
    beta = tl.load(step + number, mask=inside, other=0.0).to(tl.float32)
    first, sees, stays = reach(start, b, n, positions, length, documents)
    solution = tl.load(inverse + tile * (length * length) + row[None, :] * length + row[:, None])
    dweight = tl.zeros([length, length], tl.float32)
    dweight_t = tl.zeros([length, length], tl.float32)
    doverlap = tl.zeros([length, length], tl.float32)
    doverlap_t = tl.zeros([length, length], tl.float32)
    by_query = tl.zeros([length], tl.float32)
    by_key = tl.zeros([length], tl.float32)
    off_query = tl.zeros([length], tl.float32)
    off_key = tl.zeros([length], tl.float32)
    dbeta = tl.zeros([length], tl.float32)
    for begin in tl.range(0, channels, values):
        column = begin + tl.arange(0, values)
        at = row[:, None] * channels + column[None, :]
        out = number[:, None] * channels + column[None, :]
        dy = tl.load(do + out, mask=inside[:, None], other=0.0)
        written = tl.load(fresh + at)
        dvalue = tl.dot(solution, tl.load(dfresh + at))
        worth = load_rows(v, given, column, inside)
        dbeta += tl.sum(dvalue * worth, 1)
        off_key += tl.sum(dvalue * (2 * written.to(tl.float32) - beta[:, None] * worth), 1)
        off_query += tl.sum(load_rows(o, number * channels, column, inside) * dy.to(tl.float32), 1)
        queries = load_rows(q, given, column, inside)
        keys = load_rows(k, given, column, inside)
        by_query += tl.sum(queries * queries, 1)
        by_key += tl.sum(keys * keys, 1)
        tl.store(dv + out, (dvalue * beta[:, None]).to(dv.dtype.element_ty), mask=inside[:, None])
        dvalue = dvalue.to(q.dtype.element_ty)
        # transposes are products of their own: Triton 3.6 gets the transpose of a product wrong on sm_90
        dweight = tl.dot(dy, tl.trans(written), dweight)
        dweight_t = tl.dot(written, tl.trans(dy), dweight_t)
        doverlap = tl.dot(dvalue, tl.trans(written), doverlap)
        doverlap_t = tl.dot(written, tl.trans(dvalue), doverlap_t)
    by_query = tl.rsqrt(by_query + eps) * scale
    by_key = tl.rsqrt(by_key + eps)
    lower = row[:, None] >= row[None, :]
    upper = row[:, None] <= row[None, :]
    if documents:
        lower = lower & (first[:, None] <= t[None, :])
        upper = upper & (first[None, :] <= t[:, None])
    diagonal = row[:, None] == row[None, :]
    own = tl.sum(tl.where(diagonal, dweight, 0.0), 1)[:, None]
    # as they are, below the diagonal; transposed, above it
    dweight = tl.where(lower, dweight, tl.where(upper, dweight_t, 0.0)).to(q.dtype.element_ty)
    doverlap = tl.where(lower, -doverlap, tl.where(upper, -doverlap_t, 0.0)).to(q.dtype.element_ty)
    seen = tl.max(tl.where(row == length - 1, sees.to(tl.int32), 0), 0)

    for begin in tl.range(0, channels, values):
        channel = begin + tl.arange(0, values)
        dentered = tl.zeros([length, values], tl.float32)
        taken = tl.zeros([length, values], tl.float32)
        dleft = tl.zeros([length, values], tl.float32)
        kept = tl.zeros([values], tl.float32)
        for column in tl.range(0, channels, values):
            column = column + tl.arange(0, values)
            at = channel[:, None] * channels + column[None, :]
            memory = tl.load(states + at)
            dmemory = tl.load(dstates + at)
            kept += tl.sum(memory.to(tl.float32) * dmemory.to(tl.float32), 1)
            at = row[:, None] * channels + column[None, :]
            out = number[:, None] * channels + column[None, :]
            dy = tl.load(do + out, mask=inside[:, None], other=0.0)
            dentered = tl.dot(dy, tl.trans(memory), dentered)
            taken = tl.dot(tl.load(dfresh + at), tl.trans(memory), taken)
            dleft = tl.dot(tl.load(fresh + at), tl.trans(dmemory), dleft)
        own_rows = row[:, None] * channels + channel[None, :]
        sums = tl.load(total + own_rows)
        at_end = tl.load(total + (length - 1) * channels + channel)
        since = tl.where(sees[:, None], tl.exp2(sums), 0.0)
        until = tl.where(stays[:, None], tl.exp2(at_end[None, :] - sums), 0.0)
        queries = load_rows(q, given, channel, inside) * by_query[:, None]
        keys = load_rows(k, given, channel, inside) * by_key[:, None]
        # each sum of decays gets what a factor's operand times its gradient is
        gradient = dentered * since
        dsums = gradient * queries
        dqueries = gradient + own * keys
        dkeys = own * queries
        gradient = -tl.dot(solution, taken.to(q.dtype.element_ty)) * since
        dbeta += tl.sum(gradient * keys, 1)
        gradient *= beta[:, None]
        dsums += gradient * keys
        dkeys += gradient
        gradient = dleft * until
        dkeys += gradient
        gradient *= keys
        ending = tl.sum(gradient, 0) + tl.where(seen > 0, tl.exp2(at_end), 0.0) * kept
        dsums += tl.where(row[:, None] == length - 1, ending[None, :], 0.0) - gradient
        for level in tl.range(0, levels):
            odd = ((row >> level) & 1) == 1
            factor = half_way(total, channel, level, length, channels)
            queries = load_rows(q, given, channel, inside) * by_query[:, None] * factor
            keys = load_rows(k, given, channel, inside) * by_key[:, None] * factor
            scaled = tl.where(odd, beta, 1.0)[:, None]
            near = (keys * scaled).to(q.dtype.element_ty)
            far = queries.to(q.dtype.element_ty)
            pairs = across(level, length)
            mirrored = (row[:, None] >> level) + 1 == (row[None, :] >> level)
            mirrored = mirrored & ((row >> level) & 1 == 0)[:, None]
            # operands as they were rounded, so that what rows and keys give to sums of decays cancels between the two
            sign = tl.where(odd, 1.0, -1.0)[:, None]
            gradient = tl.dot(tl.where(pairs, dweight, 0.0).to(q.dtype.element_ty), near)
            dqueries += gradient * factor
            dsums += sign * gradient * far.to(tl.float32)
            gradient = tl.dot(tl.where(pairs | mirrored, doverlap, 0.0).to(q.dtype.element_ty), near)
            dbeta += tl.where(odd, tl.sum(gradient * keys, 1), 0.0)
            gradient = tl.dot(tl.where(mirrored, dweight, 0.0).to(q.dtype.element_ty), far, gradient)
            dkeys += gradient * scaled * factor
            dsums += sign * gradient * near.to(tl.float32)
        tl.store(dtotal + own_rows, dsums)
        queries = load_rows(q, given, channel, inside) * by_query[:, None]
        keys = load_rows(k, given, channel, inside) * by_key[:, None]
        # through the scaling to length one
        dqueries = by_query[:, None] * (dqueries - queries * (off_query / (scale * scale))[:, None])
        dkeys = by_key[:, None] * (dkeys - keys * off_key[:, None])
        out = number[:, None] * channels + channel[None, :]
        tl.store(dq + out, dqueries.to(dq.dtype.element_ty), mask=inside[:, None])
        tl.store(dk + out, dkeys.to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dstep + number, dbeta, mask=inside)
