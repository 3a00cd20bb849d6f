"""Exchange plan: `pure.parallel.exchange_plan` on the device, so that the host waits for nothing.

W ranks · E experts of all ranks · N tokens · K choices of a token · C rows a rank can hold
P suffix of a size: padded to a power of two, as Triton needs
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Pairs or rows a program handles."""


@attrs.frozen(kw_only=True)
class Plan:
    """`exchange_plan.Plan` as 32-bit integers on the device."""

    shift: Tensor  # [E]
    token_shift: Tensor  # [W]
    count: Tensor  # [E/W]
    end: Tensor  # [E/W]
    origin_end: Tensor  # [E/W·W]
    origin_shift: Tensor  # [E/W·W]
    valid: Tensor  # [3]
    crossing: Tensor  # [3]


@attrs.frozen(kw_only=True)
class Destination:
    """Rank and place that each item goes to."""

    to: Tensor  # [M K] i32, rank; no rank of the exchange: nowhere
    at: Tensor  # [M K] i32, place in the field


@triton.jit
def owners_kernel(expert, owner, N, LOCAL, W, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    choice = tl.arange(0, KP)[None, :]
    inside = (token < N) & (choice < K)
    mine = tl.load(expert + token * K + choice, mask=inside, other=0).to(tl.int32) // LOCAL
    earlier = tl.zeros((BLOCK, KP), tl.int32)
    for other in tl.static_range(K):
        its = tl.load(expert + token * K + other, mask=token < N, other=0).to(tl.int32) // LOCAL
        earlier += ((its == mine) & (choice > other)).to(tl.int32)
    tl.store(owner + token * K + choice, tl.where(earlier > 0, W, mine), mask=inside)


@triton.jit
def plan_kernel(
    counts, shift, token_shift, count, end, origin_end, origin_shift, valid, crossing, needed, ME, CAPACITY,
    W: tl.constexpr, WP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    LOCAL: tl.constexpr = E // W
    rank = tl.arange(0, WP)[:, None]
    experts = tl.arange(0, EP)
    other = tl.arange(0, WP)[None, :]
    at = counts + rank * (E + W)
    pairs = tl.load(at + experts[None, :], mask=(rank < W) & (experts < E)[None, :], other=0)
    tokens = tl.load(at + E + other, mask=(rank < W) & (other < W), other=0)
    total = tl.sum(pairs, 0)
    held_by = (experts // LOCAL)[None, :] == rank  # [WP EP]
    held = tl.sum(tl.where(held_by, total[None, :], 0), 1)  # [WP]
    first = tl.cumsum(held, 0) - held
    start = tl.cumsum(total, 0) - total - tl.sum(tl.where(held_by, first[:, None], 0), 0)
    most = tl.max(held, 0)
    # one rank over capacity zeroes the plan on every rank: all see the same counts, so none writes out of bounds
    fits = (most <= CAPACITY).to(tl.int32)
    base = start[None, :] + tl.cumsum(pairs, 0) - pairs
    number = tl.cumsum(pairs, 1) - pairs
    mine = rank == ME
    tl.store(shift + experts, tl.sum(tl.where(mine, base - number, 0), 0) * fits, mask=experts < E)
    skip = tl.cumsum(tokens, 0) - tl.cumsum(tokens, 1)
    to = tl.arange(0, WP)
    tl.store(token_shift + to, tl.sum(tl.where(mine, skip, 0), 0) * fits, mask=to < W)
    here = experts - ME * LOCAL
    local = (here >= 0) & (here < LOCAL)
    tl.store(count + here, total * fits, mask=local)
    tl.store(end + here, (start + total) * fits, mask=local)
    run = here[None, :] * W + rank
    inside = local[None, :] & (rank < W)
    tl.store(origin_end + run, (base + pairs) * fits, mask=inside)
    tl.store(origin_shift + run, (number - base) * fits, mask=inside)
    out = tl.sum(tl.sum(tl.where(mine, pairs, 0), 1), 0)
    places = tl.sum(tl.sum(tl.where(mine, tokens, 0), 1), 0)
    rows = tl.sum(tl.where(local, total, 0), 0)
    stay = tl.sum(tl.sum(tl.where(mine & local[None, :], pairs, 0), 1), 0)
    place = tl.sum(tl.sum(tl.where(mine & (other == ME), tokens, 0), 1), 0)
    tl.store(valid, out * fits)
    tl.store(valid + 1, places * fits)
    tl.store(valid + 2, rows * fits)
    tl.store(crossing, (out - stay) * fits)
    tl.store(crossing + 1, (places - place) * fits)
    tl.store(crossing + 2, (rows - stay) * fits)
    before = tl.load(needed)
    tl.debug_barrier()  # every thread has read `needed` before one writes it
    tl.store(needed, tl.maximum(before, most * (1 - fits)))


@triton.jit
def destinations_kernel(
    expert, place, shift, owner, token_place, token_shift, to, at, landing, N, LOCAL, W,
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
        places = tl.zeros((BLOCK, KP), tl.int32)
        for other in tl.static_range(K):
            its = tl.load(owner + token * K + other, mask=token < N, other=W)
            there = tl.load(token_place + token * K + other, mask=token < N, other=0)
            there += tl.load(token_shift + its, mask=its < W, other=0)
            places += tl.where(its == mine, there, 0)
        tl.store(landing + pair, places, mask=inside)


@triton.jit
def origins_kernel(
    origin_end, origin_shift, valid, to, at, W, RUNS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(valid + 2)
    if tl.program_id(0) * BLOCK < rows:
        real = row < rows
        # how many runs end at or before the row, by bisection: comparing with all of 256 spilled, 1,192 instructions
        run = tl.zeros((BLOCK,), tl.int32)
        step = HALF
        while step > 0:
            probe = run + step - 1
            ends = tl.load(origin_end + probe, mask=real & (probe < RUNS), other=2147483647)  # beyond any row
            run += tl.where(ends <= row, step, 0)
            step //= 2
        tl.store(to + row, run % W, mask=real)
        tl.store(at + row, row + tl.load(origin_shift + run, mask=real, other=0), mask=real)


def owners(expert: Tensor, ranks: int, experts: int) -> Tensor:
    """`exchange_plan.owners`: the rank of each choice, `ranks` where an earlier choice goes there already.

    expert   [N K] integers
    returns  [N K] i32
    """
    tokens, k = expert.shape
    owner = torch.empty(tokens, k, dtype=torch.int32, device=expert.device)
    if tokens:
        width = triton.next_power_of_2(k)
        owners_kernel[(triton.cdiv(tokens, BLOCK // width),)](
            expert, owner, tokens, experts // ranks, ranks, k, width, BLOCK // width
        )
    return owner


def plan_(counts: Tensor, needed: Tensor, rank: int, capacity: int) -> Plan:
    """`exchange_plan.plan` in one program.

    counts   [W E+W] i32
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
        origin_end=empty(experts),
        origin_shift=empty(experts),
        valid=empty(3),
        crossing=empty(3),
    )
    plan_kernel[(1,)](
        counts, p.shift, p.token_shift, p.count, p.end, p.origin_end, p.origin_shift, p.valid, p.crossing, needed, rank,
        capacity, ranks, triton.next_power_of_2(ranks), experts, triton.next_power_of_2(experts), num_warps=8,
    )  # fmt: skip
    return p


def destinations(
    expert: Tensor, place: Tensor, p: Plan, owner: Tensor | None, token_place: Tensor | None
) -> tuple[Destination, Tensor | None]:
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
        block = BLOCK // width
        destinations_kernel[(triton.cdiv(tokens, block),)](
            expert, place, p.shift, owner, token_place, p.token_shift, to, at, landing, tokens,
            p.shift.shape[0] // ranks, ranks, k, width, block, owner is not None,
        )  # fmt: skip
    return Destination(to=to, at=at), landing


def origins(p: Plan, capacity: int) -> Destination:
    """`exchange_plan.origins`: where each row this rank holds came from; undefined for those it does not hold."""
    runs, ranks = p.origin_end.shape[0], p.token_shift.shape[0]
    to = torch.empty(capacity, dtype=torch.int32, device=p.valid.device)
    at = torch.empty_like(to)
    origins_kernel[(triton.cdiv(capacity, BLOCK),)](
        p.origin_end, p.origin_shift, p.valid, to, at, ranks, runs, triton.next_power_of_2(runs) // 2, BLOCK
    )
    return Destination(to=to, at=at)
