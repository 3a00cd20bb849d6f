"""Sums over queries with one owner a key, in the order of the queries: of what pairs of a chunk of queries add to keys.

A chunk's parts lie in memory that is lent: that of gradients that are made later. Each is written where its key's owner
reads it: the parts of a key side by side, in the order of the queries. So long as much is lent chunks are large, and a
sum is read and written seldom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.attention.blocks import box
from nmoe.effects.kernels.tables import SparseTile
from nmoe.pure.model.attention.dsa import PAIRS

MOST = 1024
"""Queries of a chunk at most: more would save little of the sums' traffic."""

KEYS = 64
"""Keys of a program that counts, and queries of a step."""

SLOTS = 512
"""Slots of a step that marks them."""

WARPS = 4
"""Of a program that marks or counts."""


@triton.jit
def mark_kernel(chosen, ranks, first_query, positions, slots, block_n: tl.constexpr):
    """Marks [g T] with 1 the keys of each query."""
    g = tl.program_id(0)
    slot = tl.arange(0, block_n)
    for j in tl.range(0, slots, block_n):
        at = (first_query + g).to(tl.int64) * slots + j + slot
        key = tl.load(chosen + at, mask=j + slot < slots, other=-1)
        one = tl.full([block_n], 1, tl.int16)
        tl.store(ranks + g.to(tl.int64) * positions + key, one, mask=key >= 0)


@triton.jit
def rank_kernel(ranks, counts, number, positions, block: tl.constexpr):
    """Replaces marks [g T] by how many marks their key has before them, and counts those of each key."""
    key = tl.program_id(0) * block + tl.arange(0, block)
    before = tl.zeros([block], tl.int32)
    for g in tl.range(0, number, block):
        query = g + tl.arange(0, block)
        at = ranks + query.to(tl.int64)[:, None] * positions + key[None, :]
        inside = (query < number)[:, None] & (key < positions)[None, :]
        mark = tl.load(at, mask=inside, other=0).to(tl.int32)
        rank = before[None, :] + tl.cumsum(mark, 0) - mark
        tl.store(at, rank.to(tl.int16), mask=inside)
        before += tl.sum(mark, 0)
    tl.store(counts + key, before, mask=key < positions)


@triton.jit
def place_of(ranks, begins, g, key, there, positions):
    """Rows of the parts of some keys of a query."""
    rank = tl.load(ranks + g.to(tl.int64) * positions + key, mask=there, other=0)
    return tl.load(begins + key, mask=there, other=0) + rank.to(tl.int32)


@triton.jit
def gather_kernel(parts, begins, total, width: tl.constexpr, width_box: tl.constexpr, block_n: tl.constexpr):
    """Adds its parts to one key's sums, `block_n` together, in their order."""
    key = tl.program_id(0)
    channel = tl.arange(0, width_box)
    begin = tl.load(begins + key)
    end = tl.load(begins + key + 1)
    if begin < end:
        to = total + key.to(tl.int64) * width + channel
        acc = tl.load(to, mask=channel < width, other=0.0)
        for i in tl.range(begin, end, block_n):
            row = i + tl.arange(0, block_n)
            at = parts + row.to(tl.int64)[:, None] * width + channel[None, :]
            inside = (row < end)[:, None] & (channel < width)[None, :]
            acc += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
        # Of few channels every warp reads all sums, and one writes them: no other may come later.
        tl.debug_barrier()
        tl.store(to, acc, mask=channel < width)


@attrs.frozen(kw_only=True)
class Parts:
    """What the pairs of a chunk add, and whether that lies in lent memory."""

    rows: Tensor  # [g·S C], those of a key together
    ranks: Tensor  # [g T] i16, which of its key's parts a query's is
    begins: Tensor  # [T + 1] i32, where a key's parts begin
    lent: bool

    def places(self, behind: int) -> dict[str, Tensor]:
        """What a kernel is given that writes parts of queries so many behind the first."""
        return {"parts": self.rows, "ranks": self.ranks[behind:], "begins": self.begins}


@attrs.frozen(kw_only=True)
class Sums:
    """Gradients of one sequence's keys in fp32."""

    total: Tensor  # [T C] f32
    borrowed: Tensor  # [B·T ...]
    kept: int  # queries whose part of the borrowed memory the totals leave alone
    chosen: Tensor  # [B T S] i32
    tile: SparseTile

    @classmethod
    def of(cls, k: Tensor, chosen: Tensor, *, borrowed: Tensor, tile: SparseTile) -> Sums:
        """Sums without values, of as many keys as `k` [B T C] has, of queries that read those `chosen`.

        borrowed  [B T ...], contiguous: a query's part is not used before the chunk of that query is summed, and that
                  of the last queries not before all are; or sums have memory of their own, where they need more
        """
        batch, length, width = k.shape
        lent = borrowed.view(batch * length, -1)
        number = 4 // k.element_size() * length * width
        begin = (lent.numel() - number) // 16 * 16  # on a step that wide loads take
        if begin < 0:
            total, kept = torch.empty(length, width, dtype=torch.float32, device=k.device), batch * length
        else:
            total = lent.view(-1)[begin : begin + number].view(torch.float32).view(length, width)
            kept = begin // lent.shape[1]
        return cls(total=total, borrowed=lent, kept=kept, chosen=chosen, tile=tile)

    def chunks(self, b: int, *, beside: int) -> Iterator[tuple[int, int, Parts]]:
        """First query, counted over all sequences, and number of each chunk of a sequence, and where its parts go.

        beside  bytes a query that the caller holds besides, where parts are not in lent memory
        """
        (length, width), slots = self.total.shape, self.chosen.shape[-1]
        size, a_row = self.borrowed.element_size(), self.borrowed.shape[1]
        a_query = slots * width + -(-length * 2 // size)  # parts, and ranks behind all parts
        own = min(MOST, max(1, PAIRS // (a_query * size + beside)))
        first, end = b * length, (b + 1) * length
        mine = self.borrowed.new_empty(0)
        while first < end:
            lent = ((self.kept - first) * a_row - 16) // (a_query + a_row)
            number = min(end - first, max(own, min(lent, MOST)))
            if number > own:
                begin = -(-(first + number) * a_row // 16) * 16
                memory = self.borrowed.view(-1)[begin : begin + number * a_query]
            else:
                mine = mine if len(mine) else self.borrowed.new_empty(own * a_query)
                memory = mine[: number * a_query]
            yield first, number, self._places(memory, first, number, lent=number > own)
            first += number

    def _places(self, memory: Tensor, first: int, number: int, *, lent: bool) -> Parts:
        """Where a chunk's parts go."""
        (length, width), slots = self.total.shape, self.chosen.shape[-1]
        rows = memory[: number * slots * width]
        ranks = memory[len(rows) :].view(torch.int16)[: number * length].view(number, length).zero_()
        begins = torch.zeros(length + 1, dtype=torch.int32, device=memory.device)
        mark_kernel[(number,)](self.chosen, ranks, first, length, slots, block_n=SLOTS, num_warps=WARPS)
        rank_kernel[(triton.cdiv(length, KEYS),)](ranks, begins[1:], number, length, block=KEYS, num_warps=WARPS)
        return Parts(rows=rows.view(-1, width), ranks=ranks, begins=begins.cumsum(0, dtype=torch.int32), lent=lent)

    def add_(self, parts: Parts) -> None:
        """Add what a chunk has.

        Writes:  total.
        """
        length, width = self.total.shape
        told: dict[str, Any] = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        gather_kernel[(length,)](
            parts.rows, parts.begins, self.total, width=width, width_box=box(width), block_n=self.tile.block_n, **told
        )
