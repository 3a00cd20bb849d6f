"""Rows and words written into the memory of other ranks, and the flags that say they are there.

A peer is an address in a table; an arena's fields lie at the same offsets everywhere. Slots are known before anything is
sent, so no kernel of this file counts with atomics, and what arrives first makes no difference. Where some rank would
have to hold too much, the plan is all zero and nothing is written.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

__all__ = ["Plan", "Way", "expand", "homes", "meet_", "owners", "pad_", "plan_", "push", "push_words", "ways"]

ROWS = 4
"""Rows a program of `push` moves at once."""

WORDS = 256
"""Words a program moves."""

RUNS = 64
"""Runs a program of `homes` looks through at once."""


@attrs.frozen(kw_only=True)
class Plan:
    """`pure.exchange.Plan` as 32-bit integers on the device."""

    shift: Tensor  # [E]
    token_shift: Tensor  # [R]
    count: Tensor  # [E/R]
    end: Tensor  # [E/R]
    home_end: Tensor  # [E/R·R]
    home_shift: Tensor  # [E/R·R]
    live: Tensor  # [3]
    traffic: Tensor  # [3]


@attrs.frozen(kw_only=True)
class Way:
    """Where items go."""

    to: Tensor  # [M K] i32, rank; no rank of the exchange: nowhere
    at: Tensor  # [M K] i32, place in the field


@triton.jit
def owners_kernel(expert, owner, N, LOCAL, R, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    choice = tl.arange(0, KP)[None, :]
    inside = (token < N) & (choice < K)
    mine = tl.load(expert + token * K + choice, mask=inside, other=0).to(tl.int32) // LOCAL
    earlier = tl.zeros((BLOCK, KP), tl.int32)
    for other in tl.static_range(K):
        its = tl.load(expert + token * K + other, mask=token < N, other=0).to(tl.int32) // LOCAL
        earlier += ((its == mine) & (choice > other)).to(tl.int32)
    tl.store(owner + token * K + choice, tl.where(earlier > 0, R, mine), mask=inside)


@triton.jit
def counts_kernel(
    count, tokens, addresses, OFFSET, ME, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    DEDUP: tl.constexpr,
):  # fmt: skip
    peer = tl.program_id(0)
    to = (tl.load(addresses + peer) + OFFSET).to(tl.pointer_type(tl.int32)) + ME * (E + R)
    each = tl.arange(0, EP)
    tl.store(to + each, tl.load(count + each, mask=each < E, other=0), mask=each < E)
    rank = tl.arange(0, RP)
    value = tl.zeros((RP,), tl.int32)
    if DEDUP:
        value = tl.load(tokens + rank, mask=rank < R, other=0)
    tl.store(to + E + rank, value, mask=rank < R)


@triton.jit
def meet_kernel(
    epoch, addresses, arrived, missing, OFFSET, ME, R: tl.constexpr, RP: tl.constexpr, FLAG: tl.constexpr,
    TELL: tl.constexpr, WAIT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    now = tl.load(epoch)
    if TELL:
        now += 1
        tl.debug_barrier()  # every thread has read the epoch before one writes it
        tl.store(epoch, now)
        rank = tl.arange(0, RP)
        base = tl.load(addresses + rank, mask=rank < R, other=0) + OFFSET
        flag = base.to(tl.pointer_type(tl.int64)) + ME * FLAG
        tl.atomic_xchg(flag, now, mask=rank < R, sem="release", scope="sys")
    if WAIT:
        begin = now
        if LIMIT > 0:
            begin = globaltimer()
        for rank in range(R):
            seen = tl.atomic_add(arrived + rank * FLAG, 0, sem="acquire", scope="sys")
            while seen < now:
                if LIMIT > 0:
                    if globaltimer() - begin > LIMIT:
                        tl.store(missing, rank + 1)
                        tl.inline_asm_elementwise(
                            "membar.sys; trap; mov.u32 $0, 0;", "=r,r", [rank], dtype=tl.int32, is_pure=False, pack=1
                        )
                seen = tl.atomic_add(arrived + rank * FLAG, 0, sem="acquire", scope="sys")


@triton.jit
def plan_kernel(
    counts, shift, token_shift, count, end, home_end, home_shift, live, traffic, needed, ME, CAPACITY,
    R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    LOCAL: tl.constexpr = E // R
    rank = tl.arange(0, RP)[:, None]
    each = tl.arange(0, EP)
    other = tl.arange(0, RP)[None, :]
    at = counts + rank * (E + R)
    pairs = tl.load(at + each[None, :], mask=(rank < R) & (each < E)[None, :], other=0)
    tokens = tl.load(at + E + other, mask=(rank < R) & (other < R), other=0)
    total = tl.sum(pairs, 0)
    held_by = (each // LOCAL)[None, :] == rank  # [RP EP]
    held = tl.sum(tl.where(held_by, total[None, :], 0), 1)  # [RP]
    first = tl.cumsum(held, 0) - held
    start = tl.cumsum(total, 0) - total - tl.sum(tl.where(held_by, first[:, None], 0), 0)
    most = tl.max(held, 0)
    fits = (most <= CAPACITY).to(tl.int32)
    base = start[None, :] + tl.cumsum(pairs, 0) - pairs
    number = tl.cumsum(pairs, 1) - pairs
    mine = rank == ME
    tl.store(shift + each, tl.sum(tl.where(mine, base - number, 0), 0) * fits, mask=each < E)
    skip = tl.cumsum(tokens, 0) - tl.cumsum(tokens, 1)
    to = tl.arange(0, RP)
    tl.store(token_shift + to, tl.sum(tl.where(mine, skip, 0), 0) * fits, mask=to < R)
    here = each - ME * LOCAL
    local = (here >= 0) & (here < LOCAL)
    tl.store(count + here, total * fits, mask=local)
    tl.store(end + here, (start + total) * fits, mask=local)
    run = here[None, :] * R + rank
    inside = local[None, :] & (rank < R)
    tl.store(home_end + run, (base + pairs) * fits, mask=inside)
    tl.store(home_shift + run, (number - base) * fits, mask=inside)
    out = tl.sum(tl.sum(tl.where(mine, pairs, 0), 1), 0)
    places = tl.sum(tl.sum(tl.where(mine, tokens, 0), 1), 0)
    rows = tl.sum(tl.where(local, total, 0), 0)
    stay = tl.sum(tl.sum(tl.where(mine & local[None, :], pairs, 0), 1), 0)
    place = tl.sum(tl.sum(tl.where(mine & (other == ME), tokens, 0), 1), 0)
    tl.store(live, out * fits)
    tl.store(live + 1, places * fits)
    tl.store(live + 2, rows * fits)
    tl.store(traffic, (out - stay) * fits)
    tl.store(traffic + 1, (places - place) * fits)
    tl.store(traffic + 2, (rows - stay) * fits)
    before = tl.load(needed)
    tl.debug_barrier()
    tl.store(needed, tl.maximum(before, most * (1 - fits)))


@triton.jit
def ways_kernel(
    expert, place, shift, owner, token_place, token_shift, to, at, landing, N, LOCAL, R,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, DEDUP: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    choice = tl.arange(0, KP)[None, :]
    inside = (token < N) & (choice < K)
    pair = token * K + choice
    chosen = tl.load(expert + pair, mask=inside, other=0).to(tl.int32)
    mine = chosen // LOCAL
    tl.store(to + pair, mine, mask=inside)
    tl.store(at + pair, tl.load(place + pair, mask=inside, other=0) + tl.load(shift + chosen), mask=inside)
    if DEDUP:
        found = tl.zeros((BLOCK, KP), tl.int32)
        for other in tl.static_range(K):
            its = tl.load(owner + token * K + other, mask=token < N, other=R)
            there = tl.load(token_place + token * K + other, mask=token < N, other=0)
            there += tl.load(token_shift + its, mask=its < R, other=0)
            found += tl.where(its == mine, there, 0)
        tl.store(landing + pair, found, mask=inside)


@triton.jit
def homes_kernel(home_end, home_shift, live, to, at, R, RUNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(live + 2)
    if tl.program_id(0) * BLOCK < rows:
        run = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, RUNS, CHUNK):
            each = begin + tl.arange(0, CHUNK)
            ends = tl.load(home_end + each, mask=each < RUNS, other=2147483647)
            run += tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
        real = row < rows
        tl.store(to + row, run % R, mask=real)
        tl.store(at + row, row + tl.load(home_shift + run, mask=real, other=0), mask=real)


@triton.jit
def push_kernel(
    x, to, at, addresses, live, OFFSET, D, R, PROGRAMS, LIVE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(live + LIVE) // K
    for begin in range(tl.program_id(0) * ROWS, count, PROGRAMS * ROWS):
        item = begin + tl.arange(0, ROWS)
        real = item < count
        for first in range(0, D, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = real[:, None] & (column < D)[None, :]
            value = tl.load(x + item.to(tl.int64)[:, None] * D + column[None, :], mask=inside)
            for k in tl.static_range(K):
                peer = tl.load(to + item * K + k, mask=real, other=R)
                sent = peer < R
                there = tl.load(at + item * K + k, mask=sent, other=0).to(tl.int64)
                base = (tl.load(addresses + peer, mask=sent, other=0) + OFFSET).to(tl.pointer_type(x.dtype.element_ty))
                # the cast loses what is known of the address: without this the stores are of two bytes
                row = tl.multiple_of(base + there * D, 16)
                tl.store(row[:, None] + column[None, :], value, mask=inside & sent[:, None])


@triton.jit
def words_kernel(
    value, item, to, at, addresses, live, OFFSET, LIVE: tl.constexpr, INDIRECT: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(live + LIVE)
    if tl.program_id(0) * BLOCK < count:
        real = number < count
        which = number
        if INDIRECT:
            which = tl.load(item + number, mask=real, other=0)
        peer = tl.load(to + which, mask=real, other=0)
        there = tl.load(at + which, mask=real, other=0)
        base = (tl.load(addresses + peer) + OFFSET).to(tl.pointer_type(value.dtype.element_ty))
        tl.store(base + there, tl.load(value + which, mask=real, other=0), mask=real)


@triton.jit
def expand_kernel(x, source, out, live, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.load(live + 2)
    first = tl.program_id(0) * ROWS
    if first < rows:
        row = first + tl.arange(0, ROWS)
        real = row < rows
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (column < D)[None, :]
        from_row = tl.load(source + row, mask=real, other=0).to(tl.int64)
        value = tl.load(x + from_row[:, None] * D + column[None, :], mask=inside)
        tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)


@triton.jit
def pad_kernel(x, live, D, SIZE, BLOCK: tl.constexpr):
    row = tl.load(live + 2) + tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), x.dtype.element_ty)
    tl.store(x + row.to(tl.int64) * D + column, zero, mask=(column < D) & (row < SIZE))


def owners(expert: Tensor, ranks: int, experts: int) -> Tensor:
    """`pure.exchange.owners`: the rank of each choice, `ranks` where an earlier choice goes there already.

    expert   [N K] integers
    returns  [N K] i32
    """
    tokens, k = expert.shape
    owner = torch.empty(tokens, k, dtype=torch.int32, device=expert.device)
    if tokens:
        width = triton.next_power_of_2(k)
        owners_kernel[(triton.cdiv(tokens, WORDS // width),)](
            expert, owner, tokens, experts // ranks, ranks, k, width, WORDS // width
        )
    return owner


def push_counts(count: Tensor, tokens: Tensor | None, addresses: Tensor, offset: int, rank: int) -> None:
    """This rank's row of the matrix of counts, written to every rank.

    count      [E] i32     pairs of each expert
    tokens     [R+1] i32   tokens for each rank; None: zeros
    addresses  [R] i64     of the arenas
    offset     bytes from an arena's beginning to the matrix

    Writes:  that row in every arena.
    """
    experts, ranks = count.shape[0], addresses.shape[0]
    counts_kernel[(ranks,)](
        count, count if tokens is None else tokens, addresses, offset, rank,
        experts, triton.next_power_of_2(experts), ranks, triton.next_power_of_2(ranks), tokens is not None,
    )  # fmt: skip


def meet_(
    epoch: Tensor,
    arrived: Tensor,
    missing: Tensor,
    addresses: Tensor,
    offset: int,
    rank: int,
    *,
    tell: bool,
    wait: bool,
    limit_ns: int,
) -> None:
    """Tell every rank that what was launched before is written; wait until every rank has said so. One program.

    epoch      [1] i64     phases told so far
    arrived    [R W] i64   this rank's flags, a cache line each
    missing    [1] i32     on the host: gets the number of a rank that did not come, and one, before the device traps
    offset     bytes from an arena's beginning to its flags
    limit_ns   how long one is waited for; 0: for ever, which the interpreter needs

    Writes:  epoch and flags of every arena, or `missing`.
    """
    ranks, flag = arrived.shape
    meet_kernel[(1,)](
        epoch, addresses, arrived, missing, offset, rank, ranks, triton.next_power_of_2(ranks), flag, tell, wait,
        limit_ns, num_warps=1,
    )  # fmt: skip


def plan_(counts: Tensor, needed: Tensor, rank: int, capacity: int) -> Plan:
    """`pure.exchange.plan` in one program.

    counts   [R E+R] i32
    needed   [1] i32   the most rows a rank would have had to hold in this or an earlier plan, 0 if each fitted

    Writes:  needed.
    """
    ranks = counts.shape[0]
    experts = counts.shape[1] - ranks
    local = experts // ranks

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=counts.device)

    p = Plan(
        shift=empty(experts),
        token_shift=empty(ranks),
        count=empty(local),
        end=empty(local),
        home_end=empty(experts),
        home_shift=empty(experts),
        live=empty(3),
        traffic=empty(3),
    )
    plan_kernel[(1,)](
        counts, p.shift, p.token_shift, p.count, p.end, p.home_end, p.home_shift, p.live, p.traffic, needed, rank,
        capacity, ranks, triton.next_power_of_2(ranks), experts, triton.next_power_of_2(experts), num_warps=8,
    )  # fmt: skip
    return p


def ways(
    expert: Tensor, place: Tensor, p: Plan, owner: Tensor | None, token_place: Tensor | None
) -> tuple[Way, Tensor | None]:
    """Where every pair has its row, and with dedup its token's place in that rank's landing buffer.

    expert       [N K] integers
    place        [N K] i32   number of each pair
    owner        [N K] i32   `owners`; None: no dedup
    token_place  [N K] i32   number of each token among all that are sent
    returns      rank and row of each pair; [N K] i32 or None
    """
    tokens, k = expert.shape
    ranks = p.token_shift.shape[0]
    to, at = torch.empty_like(place), torch.empty_like(place)
    landing = None if owner is None else torch.empty_like(place)
    if tokens:
        width = triton.next_power_of_2(k)
        block = WORDS // width
        ways_kernel[(triton.cdiv(tokens, block),)](
            expert, place, p.shift, owner, token_place, p.token_shift, to, at, landing, tokens,
            p.shift.shape[0] // ranks, ranks, k, width, block, owner is not None,
        )  # fmt: skip
    return Way(to=to, at=at), landing


def homes(p: Plan, capacity: int) -> Way:
    """`pure.exchange.homes`: where each row this rank holds came from; undefined for those it does not hold."""
    runs, ranks = p.home_end.shape[0], p.token_shift.shape[0]
    to = torch.empty(capacity, dtype=torch.int32, device=p.live.device)
    at = torch.empty_like(to)
    homes_kernel[(triton.cdiv(capacity, WORDS),)](
        p.home_end, p.home_shift, p.live, to, at, ranks, runs, min(RUNS, triton.next_power_of_2(runs)), WORDS
    )
    return Way(to=to, at=at)


def push(x: Tensor, way: Way, addresses: Tensor, offset: int, live: Tensor, programs: int, *, home: bool) -> None:
    """Rows into a field of other ranks' arenas, 16 bytes at a time.

    x         [M D]       a row is read once and written to each of its places
    way       [M K]
    addresses [R] i64     of the arenas
    offset    bytes from an arena's beginning to the field
    live      [3] i32     `Plan.live`
    programs  that share the rows out
    home      whether these are rows that go back, of which the third of `live` counts, or tokens

    Writes:  that field.
    """
    k = 1 if home else way.to.shape[1]
    d = x.shape[1]
    if not x.shape[0]:
        return
    grid = min(programs, triton.cdiv(x.shape[0], ROWS))
    push_kernel[(grid,)](
        x, way.to, way.at, addresses, live, offset, d, addresses.shape[0], grid, 2 if home else 0, k, ROWS, _block(d),
        num_warps=8,
    )  # fmt: skip


def push_words(
    value: Tensor, item: Tensor | None, way: Way, addresses: Tensor, offset: int, live: Tensor, *, home: bool
) -> None:
    """Numbers of 4 bytes into a field of other ranks' arenas.

    value  [M ...]
    item   [M] i32   in which order to send them, so that neighbours are written side by side; None: as they are

    Writes:  that field.
    """
    if value.numel():
        words_kernel[(triton.cdiv(value.numel(), WORDS),)](
            value, item, way.to, way.at, addresses, live, offset, 2 if home else 0, item is not None, WORDS
        )


def expand(x: Tensor, source: Tensor, live: Tensor) -> Tensor:
    """Every row this rank holds, from the place where its token landed; undefined beyond those.

    x        [landing D]
    source   [C] i32   row -> place
    returns  [C D]
    """
    capacity, d = source.shape[0], x.shape[1]
    out = torch.empty(capacity, d, dtype=x.dtype, device=x.device)
    block = _block(d)
    expand_kernel[(triton.cdiv(capacity, ROWS), triton.cdiv(d, block))](
        x, source, out, live, d, ROWS, block, num_warps=8
    )
    return out


def pad_(x: Tensor, live: Tensor, num: int) -> None:
    """Zeros after the last row, so that a product over rows that reads past it meets numbers.

    x    [C D]
    num  rows to write

    Writes:  x.
    """
    capacity, d = x.shape
    block = _block(d)
    pad_kernel[(num, triton.cdiv(d, block))](x, live, d, capacity, block)


def _block(width: int) -> int:
    """Columns a program moves at once: as many of 2048 as divide the width, if that is a good number."""
    divisor = width & -width
    return min(2048, divisor if divisor >= 512 else triton.next_power_of_2(width))
