"""Where each (token, chosen expert) pair goes, and tokens brought there: `pure.experts.dispatch` on the device.

A counting sort in three launches, all sizes known beforehand, no atomics, no host synchronisation: a histogram of every
stretch of pairs, a running sum over the stretches, and the places. Equal experts keep the order of their pairs.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 128
"""Pairs one program places, comparing each with each."""

CHUNK = 32
"""Pairs that a stretch is compared with at once: 73 registers of a thread with 256 pairs, 254 for twice as many."""

TILES = 128
"""Tiles one program describes."""


@attrs.frozen(kw_only=True)
class Places:
    """Rows sorted by expert: row `p` belongs to pair `slot[p]` of token `source[p]`."""

    source: Tensor  # [P] i32, row -> token
    slot: Tensor  # [P] i32, row -> pair
    place: Tensor  # [N K] i32, pair -> row
    count: Tensor  # [E] i32, rows of each expert
    end: Tensor  # [E] i32, one past the last row of each expert


@triton.jit
def count_kernel(expert, histogram, P, STRETCH: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    stretch = tl.program_id(0)
    pair = stretch * STRETCH + tl.arange(0, STRETCH)
    chosen = tl.load(expert + pair, mask=pair < P, other=-1).to(tl.int32)
    experts = tl.arange(0, EP)
    hits = (chosen[:, None] == experts[None, :]).to(tl.int32)
    tl.store(histogram + stretch * E + experts, tl.sum(hits, 0), mask=experts < E)


@triton.jit
def scan_kernel(histogram, count, S, E, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for begin in range(0, S, BLOCK):
        stretch = begin + tl.arange(0, BLOCK)
        here = histogram + stretch * E + expert
        hits = tl.load(here, mask=stretch < S, other=0)
        tl.store(here, total + tl.cumsum(hits, 0) - hits, mask=stretch < S)
        total += tl.sum(hits, 0)
    tl.store(count + expert, total)


@triton.jit
def place_kernel(
    expert, before, count, source, slot, place, end, P, K,
    STRETCH: tl.constexpr, CHUNK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(0)
    pair = stretch * STRETCH + tl.arange(0, STRETCH)
    real = pair < P
    chosen = tl.load(expert + pair, mask=real, other=-1).to(tl.int32)
    experts = tl.arange(0, EP)
    counts = tl.load(count + experts, mask=experts < E, other=0)
    ends = tl.cumsum(counts, 0)
    if stretch == 0:
        tl.store(end + experts, ends, mask=experts < E)
    first = ends - counts + tl.load(before + stretch * E + experts, mask=experts < E, other=0)
    index = tl.arange(0, STRETCH)
    row = tl.gather(first, tl.maximum(chosen, 0), 0)
    # CHUNK pairs at a time: all comparisons of 256 pairs at once spill, 54 instructions at 64 experts, 3,158 at 256
    for begin in range(0, tl.minimum(P - stretch * STRETCH, STRETCH), CHUNK):
        other = begin + tl.arange(0, CHUNK)
        its = tl.load(expert + stretch * STRETCH + other, mask=stretch * STRETCH + other < P, other=-1).to(tl.int32)
        earlier = (chosen[:, None] == its[None, :]) & (other[None, :] < index[:, None])
        row += tl.sum(earlier.to(tl.int32), 1)
    tl.store(place + pair, row, mask=real)
    tl.store(source + row, pair // K, mask=real)
    tl.store(slot + row, pair, mask=real)


@triton.jit
def tiles_kernel(
    count, tile_expert, tile_row, num_needed, T, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EP)
    counts = tl.load(count + experts, mask=experts < E, other=0)
    first = tl.cumsum(counts, 0) - counts
    needed = (counts + M - 1) // M
    ends = tl.cumsum(needed, 0)
    expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = tl.minimum(expert, EP - 1)  # beyond the last tile there is no expert
    row = tl.gather(first - (ends - needed) * M, mine, 0) + tile * M
    total = tl.sum(needed, 0)
    if tl.program_id(0) == 0:
        tl.store(num_needed, total)
    real = tile < total
    tl.store(tile_expert + tile, tl.where(real, expert, -1), mask=tile < T)
    tl.store(tile_row + tile, tl.where(real, row, 0), mask=tile < T)


@triton.jit
def spread_kernel(x, place, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * D + column, mask=column < D)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        tl.store(out + row * D + column, value, mask=column < D)


@attrs.frozen(kw_only=True)
class RowTiles:
    """Which rows each tile of a grouped GEMM has, T = ceil(P / tile) + E tiles at most; those needed come first."""

    expert: Tensor  # [T] i32, -1: not needed
    row: Tensor  # [T] i32, first of the tile
    needed: Tensor  # [1] i32


def dispatch(expert: Tensor, num_experts: int) -> Places:
    """Sort pairs by expert, as `pure.experts.dispatch` does, without copying a row.

    expert   [N K] integers, 0 <= expert < num_experts
    """
    expert = expert.contiguous()  # the router hands over a slice of wider rows
    pairs = expert.numel()
    stretches = triton.cdiv(pairs, STRETCH)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert.device)

    histogram, count, end = empty(stretches, num_experts), empty(num_experts), empty(num_experts)
    source, slot, place = empty(pairs), empty(pairs), empty(*expert.shape)
    padded = max(16, triton.next_power_of_2(num_experts))
    count_kernel[(stretches,)](expert, histogram, pairs, STRETCH, num_experts, padded, num_warps=8)
    scan_kernel[(num_experts,)](histogram, count, stretches, num_experts, 1024)
    place_kernel[(stretches,)](
        expert, histogram, count, source, slot, place, end, pairs, expert.shape[-1], STRETCH, CHUNK,
        num_experts, padded, num_warps=8,
    )  # fmt: skip
    return Places(source=source, slot=slot, place=place, count=count, end=end)


def tiles(count: Tensor, pairs: int, m: int) -> RowTiles:
    """Which rows each tile of `m` has: as many tiles as there can ever be, those not needed marked by expert -1.

    count    [E] i32
    """
    experts = count.shape[0]
    num = triton.cdiv(pairs, m) + experts
    expert = torch.empty(num, dtype=torch.int32, device=count.device)
    row = torch.empty(num, dtype=torch.int32, device=count.device)
    needed = torch.empty(1, dtype=torch.int32, device=count.device)
    padded = max(16, triton.next_power_of_2(experts))
    tiles_kernel[(triton.cdiv(num, TILES),)](count, expert, row, needed, num, m, experts, padded, TILES)
    return RowTiles(expert=expert, row=row, needed=needed)


def spread(x: Tensor, place: Tensor) -> Tensor:
    """Every token's vector at each of its rows: a token is read once.

    x        [N D]
    place    [N K] i32   pair -> row
    returns  [N·K D]
    """
    tokens, k = place.shape
    d = x.shape[1]
    out = torch.empty(tokens * k, d, dtype=x.dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(d))
    spread_kernel[(tokens, triton.cdiv(d, block))](x, place, out, d, k, block, num_warps=8)
    return out
