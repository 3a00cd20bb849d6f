"""Push: store rows and words into the memory of other ranks; barrier: signal by flags, wait for the flags of all.

W ranks · E experts of all ranks · N tokens · K choices of a token · D hidden size · C rows a rank can hold
M rows or words pushed · P suffix of a size: padded to a power of two

A peer is an address in a table, 0 where stores do not reach it: nothing is written there. An arena's fields lie at the
same offsets everywhere. Slots are known before anything is sent, so no kernel of this file counts with atomics, and
what arrives first makes no difference. Where some rank would have to hold too much, the plan is all zero and nothing
is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from nmoe.pure.parallel.exchange_arena import Field

ROWS = 4
"""Rows a program of `push` moves at once."""

WORDS = 256
"""Words a program of `push_words_` moves."""


@triton.jit
def counts_kernel(
    count, tokens, addresses, OFFSET, ME, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    DEDUP: tl.constexpr,
):  # fmt: skip
    base = tl.load(addresses + tl.program_id(0))
    if base != 0:
        to = (base + OFFSET).to(tl.pointer_type(tl.int32)) + ME * (E + W)
        experts = tl.arange(0, EP)
        tl.store(to + experts, tl.load(count + experts, mask=experts < E, other=0), mask=experts < E)
        rank = tl.arange(0, WP)
        value = tl.zeros((WP,), tl.int32)
        if DEDUP:
            value = tl.load(tokens + rank, mask=rank < W, other=0)
        tl.store(to + E + rank, value, mask=rank < W)


@triton.jit
def signal(count, now, addresses, OFFSET, ME, W: tl.constexpr, WP: tl.constexpr, FLAG: tl.constexpr):
    """Store a count, which every thread has loaded, and store it into this rank's flag at every rank."""
    tl.debug_barrier()  # every thread has read the count before one writes it
    tl.store(count, now)
    rank = tl.arange(0, WP)
    base = tl.load(addresses + rank, mask=rank < W, other=0)
    flag = (base + OFFSET).to(tl.pointer_type(tl.int64)) + ME * FLAG
    # release, system scope: what earlier kernels and copies of the stream wrote is visible before the flag
    tl.atomic_xchg(flag, now, mask=base != 0, sem="release", scope="sys")


@triton.jit
def await_flags(arrived, wanted, missing, W: tl.constexpr, FLAG: tl.constexpr, LIMIT: tl.constexpr):
    """Wait until the flag of every rank has reached a number."""
    begin = wanted
    if LIMIT > 0:
        begin = globaltimer()
    for rank in range(W):
        # tl.load takes no memory order; adding 0 is an acquire at system scope
        received = tl.atomic_add(arrived + rank * FLAG, 0, sem="acquire", scope="sys")
        while received < wanted:
            if LIMIT > 0:
                if globaltimer() - begin > LIMIT:  # pyright: ignore[reportOperatorIssue]
                    tl.store(missing, rank + 1)
                    tl.inline_asm_elementwise(
                        "membar.sys; trap; mov.u32 $0, 0;", "=r,r", [rank], dtype=tl.int32, is_pure=False, pack=1
                    )
            received = tl.atomic_add(arrived + rank * FLAG, 0, sem="acquire", scope="sys")


@triton.jit
def barrier_kernel(
    epoch, addresses, arrived, missing, OFFSET, ME, W: tl.constexpr, WP: tl.constexpr, FLAG: tl.constexpr,
    SIGNAL: tl.constexpr, WAIT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    now = tl.load(epoch)
    if SIGNAL:
        now += 1
        signal(epoch, now, addresses, OFFSET, ME, W, WP, FLAG)
    if WAIT:
        await_flags(arrived, now, missing, W, FLAG, LIMIT)


@triton.jit
def signal_kernel(count, addresses, OFFSET, ME, W: tl.constexpr, WP: tl.constexpr, FLAG: tl.constexpr):
    signal(count, tl.load(count) + 1, addresses, OFFSET, ME, W, WP, FLAG)


@triton.jit
def await_flags_kernel(
    count, arrived, missing, AHEAD: tl.constexpr, W: tl.constexpr, FLAG: tl.constexpr, LIMIT: tl.constexpr
):
    await_flags(arrived, tl.load(count) + AHEAD, missing, W, FLAG, LIMIT)


@triton.jit
def ring_kernel(epoch, word):
    # release, system scope: copies and launches before this one on the stream are visible to the host before the word
    tl.inline_asm_elementwise(
        "st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0;", "=r,l,l", [word, tl.load(epoch)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def await_kernel(epoch, word, missing, RANK, LIMIT: tl.constexpr):
    # A load, not an atomic addition of 0: on PCIe that could write an old value over one the host has just written.
    now = tl.load(epoch)
    begin = globaltimer()
    received = tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1
    )
    while received < now:
        if globaltimer() - begin > LIMIT:  # pyright: ignore[reportOperatorIssue]
            tl.store(missing, RANK + 1)
            tl.inline_asm_elementwise(
                "membar.sys; trap; mov.u32 $0, 0;", "=r,r", [RANK], dtype=tl.int32, is_pure=False, pack=1
            )
        received = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def pass_on_kernel(epoch, addresses, OFFSET, RANK, W: tl.constexpr, WP: tl.constexpr, FLAG: tl.constexpr):
    rank = tl.arange(0, WP)
    base = tl.load(addresses + rank, mask=rank < W, other=0)
    flag = (base + OFFSET).to(tl.pointer_type(tl.int64)) + RANK * FLAG
    tl.atomic_xchg(flag, tl.load(epoch), mask=base != 0, sem="release", scope="sys")


@triton.jit
def push_kernel(
    x, to, at, addresses, valid, OFFSET, D, W, PROGRAMS, VALID: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(valid + VALID) // K
    for begin in range(tl.program_id(0) * ROWS, count, PROGRAMS * ROWS):
        item = begin + tl.arange(0, ROWS)
        real = item < count
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = real[:, None] & (column < D)[None, :]
            # read once, stored to each of its K destinations
            value = tl.load(x + item.to(tl.int64)[:, None] * D + column[None, :], mask=inside)
            for k in tl.static_range(K):
                peer = tl.load(to + item * K + k, mask=real, other=W)
                sent = peer < W
                there = tl.load(at + item * K + k, mask=sent, other=0).to(tl.int64)
                address = tl.load(addresses + peer, mask=sent, other=0)
                base = (address + OFFSET).to(tl.pointer_type(x.dtype.element_ty))
                # the cast loses what is known of the address: without this the stores are of two bytes
                row = tl.multiple_of(base + there * D, 16)
                tl.store(row[:, None] + column[None, :], value, mask=inside & (address != 0)[:, None])


@triton.jit
def words_kernel(
    value, item, to, at, addresses, valid, OFFSET, VALID: tl.constexpr, INDIRECT: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(valid + VALID)
    if tl.program_id(0) * BLOCK < count:
        real = number < count
        which = number
        if INDIRECT:
            which = tl.load(item + number, mask=real, other=0)
        peer = tl.load(to + which, mask=real, other=0)
        there = tl.load(at + which, mask=real, other=0)
        address = tl.load(addresses + peer)
        base = (address + OFFSET).to(tl.pointer_type(value.dtype.element_ty))
        tl.store(base + there, tl.load(value + which, mask=real, other=0), mask=real & (address != 0))


@triton.jit
def expand_kernel(x, source, out, end, count, D, E, PROGRAMS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Neighbouring programs take the same share of each expert's rows, so nearly the same tokens: a token is read from
    # memory once, and from the L2 cache for its other rows.
    expert = tl.program_id(0) % E
    stop = tl.load(end + expert)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for first in range(stop - tl.load(count + expert) + tl.program_id(0) // E * ROWS, stop, PROGRAMS * ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < stop
        inside = real[:, None] & (column < D)[None, :]
        from_row = tl.load(source + row, mask=real, other=0).to(tl.int64)
        value = tl.load(x + from_row[:, None] * D + column[None, :], mask=inside)
        tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)


@triton.jit
def pad_kernel(x, valid, D, SIZE, BLOCK: tl.constexpr):
    row = tl.load(valid + 2) + tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), x.dtype.element_ty)
    tl.store(x + row.to(tl.int64) * D + column, zero, mask=(column < D) & (row < SIZE))


@triton.jit
def bytes_kernel(crossing, sent, PAIR, PLACE, ROW, FIXED):
    added = tl.load(crossing).to(tl.int64) * PAIR + tl.load(crossing + 1).to(tl.int64) * PLACE
    added += tl.load(crossing + 2).to(tl.int64) * ROW + FIXED
    before = tl.load(sent)
    tl.debug_barrier()  # every thread has read `sent` before one writes it
    tl.store(sent, before + added)


def push_counts_(count: Tensor, tokens: Tensor | None, addresses: Tensor, offset: int, rank: int) -> None:
    """Push this rank's row of the matrix of counts to every rank.

    count      [E] i32     pairs of each expert
    tokens     [W+1] i32   tokens for each rank; None: zeros
    addresses  [W] i64     of the arenas; 0: stores do not reach it
    offset     bytes from an arena's beginning to the matrix

    Writes:  that row in every arena.
    """
    experts, ranks = count.shape[0], addresses.shape[0]
    counts_kernel[(ranks,)](
        count, count if tokens is None else tokens, addresses, offset, rank,
        experts, triton.next_power_of_2(experts), ranks, triton.next_power_of_2(ranks), tokens is not None,
    )  # fmt: skip


def barrier_(
    epoch: Tensor,
    arrived: Tensor,
    missing: Tensor,
    addresses: Tensor,
    offset: int,
    rank: int,
    *,
    signal: bool,
    wait: bool,
    limit_ns: int,
) -> None:
    """Barrier in one program: signal every rank that earlier launches are written; wait for the signals of all.

    epoch      [1] i64     barriers this rank has entered
    arrived    [W FLAG] i64   this rank's flags, a cache line each
    missing    [1] i32     on the host: gets the number of a rank that did not come, and one, before the device traps
    offset     bytes from an arena's beginning to its flags
    limit_ns   how long one is waited for; 0: for ever, which the interpreter needs

    Writes:  epoch and flags of every arena, or `missing`.
    """
    ranks, flag = arrived.shape
    barrier_kernel[(1,)](
        epoch, addresses, arrived, missing, offset, rank, ranks, triton.next_power_of_2(ranks), flag, signal, wait,
        limit_ns, num_warps=1,
    )  # fmt: skip


def signal_(count: Tensor, addresses: Tensor, offset: int, rank: int, flag: int) -> None:
    """Count one more, and tell every rank: earlier launches and copies of the stream are written before it is seen.

    count      [1] i64
    addresses  [W] i64   of the arenas
    offset     bytes from an arena's beginning to its flags
    flag       words of a flag

    Writes:  count, and this rank's flag in every arena.
    """
    ranks = addresses.shape[0]
    signal_kernel[(1,)](count, addresses, offset, rank, ranks, triton.next_power_of_2(ranks), flag, num_warps=1)


def await_flags_(count: Tensor, flags: Tensor, missing: Tensor, *, ahead: int, limit_ns: int) -> None:
    """Hold the stream until the flags of all ranks have reached a count.

    count    [1] i64
    flags    [W FLAG] i64   this rank's, a cache line each
    missing  [1] i32        on the host: gets the number of a rank that did not come, and one, before the device traps
    ahead    to add to the count
    limit_ns how long one is waited for; 0: for ever, which the interpreter needs

    Writes:  nothing, or `missing`.
    """
    ranks, flag = flags.shape
    await_flags_kernel[(1,)](count, flags, missing, ahead, ranks, flag, limit_ns, num_warps=1)


def ring_(epoch: Tensor, word: Tensor) -> None:
    """Write the epoch into a word of the host, which sees all earlier work of the stream with it.

    epoch    [1] i64
    word     [1] i64     pinned
    Writes:  word.
    """
    ring_kernel[(1,)](epoch, word, num_warps=1)


def await_(epoch: Tensor, word: Tensor, missing: Tensor, rank: int, *, limit_ns: int) -> None:
    """Hold the stream until a word of the host has reached the epoch.

    epoch    [1] i64
    word     [1 ...] i64   pinned
    missing  [1] i32       on the host
    rank     that `missing` gets, and one, before the device traps

    Writes:  nothing, or `missing`.
    """
    await_kernel[(1,)](epoch, word, missing, rank, limit_ns, num_warps=1)


def pass_on_(epoch: Tensor, addresses: Tensor, arrived: Field, rank: int) -> None:
    """Write the epoch into a rank's flag of every arena, in its place.

    epoch      [1] i64
    addresses  [W] i64     of the arenas

    Writes:  that flag.
    """
    ranks, flag = arrived.shape
    pass_on_kernel[(1,)](
        epoch, addresses, arrived.offset, rank, ranks, triton.next_power_of_2(ranks), flag, num_warps=1
    )


def push_(
    x: Tensor, to: Tensor, at: Tensor, addresses: Tensor, offset: int, valid: Tensor, programs: int, *, back: bool
) -> None:
    """Push rows into a field of other ranks' arenas, in stores of 16 bytes.

    x         [M D]       a row is read once and written to each of its places
    to        [M K] i32   rank for each place; no rank of the exchange: nowhere
    at        [M K] i32   place in the field
    addresses [W] i64     of the arenas
    offset    bytes from an arena's beginning to the field
    valid      [3] i32     `plan.Plan.valid`
    programs  that share the rows out
    back      whether these are rows that go back, of which the third of `valid` counts, or tokens

    Writes:  that field.
    """
    k = 1 if back else to.shape[1]
    d = x.shape[1]
    if not x.shape[0]:
        return
    grid = min(programs, triton.cdiv(x.shape[0], ROWS))
    push_kernel[(grid,)](
        x, to, at, addresses, valid, offset, d, addresses.shape[0], grid, 2 if back else 0, k, ROWS, block_of(d),
        num_warps=8,
    )  # fmt: skip


def at_once(x: Tensor) -> tuple[int, int]:
    """Rows that a program of `push_` has on the way at once, and the bytes of these.

    x        [M D]
    """
    return ROWS, ROWS * block_of(x.shape[1]) * x.itemsize


def push_words_(
    value: Tensor,
    item: Tensor | None,
    to: Tensor,
    at: Tensor,
    addresses: Tensor,
    offset: int,
    valid: Tensor,
    *,
    back: bool,
) -> None:
    """Push words of 4 bytes into a field of other ranks' arenas.

    value  4 bytes each, counted through; so are `to` and `at`
    item   [M] i32   in which order to send them, so that neighbours are written side by side; None: as they are
    to     [M] i32   rank of each
    at     [M] i32   place in the field

    Writes:  that field.
    """
    if value.numel():
        words_kernel[(triton.cdiv(value.numel(), WORDS),)](
            value, item, to, at, addresses, valid, offset, 2 if back else 0, item is not None, WORDS
        )


def expand(x: Tensor, source: Tensor, end: Tensor, count: Tensor) -> Tensor:
    """Every row this rank holds, from the place its token was written to; undefined beyond those.

    x        [landing D]
    source   [C] i32   row -> place
    end      [E/W] i32   one past an expert's last row
    count    [E/W] i32   its rows
    returns  [C D]
    """
    capacity, d, experts = source.shape[0], x.shape[1], end.shape[0]
    out = torch.empty(capacity, d, dtype=x.dtype, device=x.device)
    block, programs = block_of(d), triton.cdiv(triton.cdiv(capacity, ROWS), experts)
    expand_kernel[(programs * experts, triton.cdiv(d, block))](
        x, source, out, end, count, d, experts, programs, ROWS, block, num_warps=8
    )
    return out


def pad_(x: Tensor, valid: Tensor, num: int) -> None:
    """Zero the rows after the last, so that a GEMM that sums over whole tiles of rows adds zeros, not NaN.

    x    [C D]
    num  rows to write

    Writes:  x.
    """
    capacity, d = x.shape
    block = block_of(d)
    pad_kernel[(num, triton.cdiv(d, block))](x, valid, d, capacity, block)


def count_bytes_(sent: Tensor, crossing: Tensor, *, pair: int, place: int, row: int, fixed: int) -> None:
    """Add what crosses to other ranks: so many bytes for each pair, place and row, and some always.

    sent     [1] i64
    crossing  [3] i32   `plan.Plan.crossing`

    Writes:  sent.
    """
    bytes_kernel[(1,)](crossing, sent, pair, place, row, fixed, num_warps=1)


def block_of(width: int) -> int:
    """Columns a program moves at once: as many of 2048 as divide the width, if that is a good number."""
    divisor = width & -width
    return min(2048, divisor if divisor >= 512 else triton.next_power_of_2(width))
