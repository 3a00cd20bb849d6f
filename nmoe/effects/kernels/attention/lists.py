"""Sums over queries with one owner a key, in the order of the queries: of what pairs of a chunk of queries add to keys.

A chunk's parts lie in memory that is lent: that of gradients that are made later. The lists of the chunk's queries,
sorted by key, say which parts are a key's. So long as much is lent chunks are large, and a sum is read and written
seldom.
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

ENTRIES = 7 * 2**17
"""Pairs of a chunk at most: sorting them takes 32 bytes each."""


@triton.jit
def gather_kernel(
    parts, order, begins, total, width: tl.constexpr, width_box: tl.constexpr, block_n: tl.constexpr
):  # fmt: skip
    """Adds to one key's sums the parts that its list has, `block_n` together, in the order of the list."""
    key = tl.program_id(0)
    channel = tl.arange(0, width_box)
    begin = tl.load(begins + key)
    end = tl.load(begins + key + 1)
    if begin < end:
        to = total + key.to(tl.int64) * width + channel
        acc = tl.load(to, mask=channel < width, other=0.0)
        for i in tl.range(begin, end, block_n):
            entry = i + tl.arange(0, block_n)
            row = tl.load(order + entry, mask=entry < end, other=0)
            inside = (entry < end)[:, None] & (channel < width)[None, :]
            acc += tl.sum(
                tl.load(parts + row[:, None] * width + channel[None, :], mask=inside, other=0.0).to(tl.float32), 0
            )
        tl.store(to, acc, mask=channel < width)


@attrs.frozen(kw_only=True)
class Parts:
    """What the pairs of a chunk add, and whether that lies in lent memory."""

    rows: Tensor  # [g S C]
    lent: bool


@attrs.frozen(kw_only=True)
class Sums:
    """Gradients of one sequence's keys in fp32."""

    total: Tensor  # [T C] f32
    borrowed: Tensor  # [B·T ...]
    kept: int  # queries whose part of the borrowed memory the totals leave alone
    slots: int
    tile: SparseTile

    @classmethod
    def of(cls, k: Tensor, slots: int, *, borrowed: Tensor, tile: SparseTile) -> Sums:
        """Sums without values, of as many keys as `k` [B T C] has, of queries that read `slots` keys each.

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
        return cls(total=total, borrowed=lent, kept=kept, slots=slots, tile=tile)

    def chunks(self, b: int, *, beside: int) -> Iterator[tuple[int, int, Parts]]:
        """First query, counted over all sequences, and number of each chunk of a sequence, and memory for its parts.

        beside  bytes a query that the caller holds besides, where parts are not in lent memory
        """
        length, width = self.total.shape
        a_query, a_row = self.slots * width, self.borrowed.shape[1]
        own = max(1, PAIRS // (a_query * self.borrowed.element_size() + beside))
        first, end = b * length, (b + 1) * length
        mine = self.borrowed.new_empty(0)
        while first < end:
            lent = (self.kept - first) * a_row // (a_query + a_row)
            number = min(end - first, max(own, min(lent, ENTRIES // self.slots)))
            if number > own:
                begin = (first + number) * a_row
                rows = self.borrowed.view(-1)[begin : begin + number * a_query]
            else:
                mine = mine if len(mine) else self.borrowed.new_empty(own * a_query)
                rows = mine[: number * a_query]
            yield first, number, Parts(rows=rows.view(number, self.slots, width), lent=number > own)
            first += number

    def add_(self, parts: Tensor, chosen: Tensor, first: int, number: int) -> None:
        """Add what a chunk has.

        Writes:  total.
        """
        length, width = self.total.shape
        key, order = chosen.view(-1, self.slots)[first : first + number].flatten().sort(stable=True)
        begins = torch.searchsorted(key, torch.arange(length + 1, dtype=key.dtype, device=key.device))
        told: dict[str, Any] = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        gather_kernel[(length,)](
            parts, order, begins, self.total, width=width, width_box=box(width), block_n=self.tile.block_n, **told
        )
