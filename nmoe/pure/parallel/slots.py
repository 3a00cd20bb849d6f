"""The symmetric memory in which copies of gradients land, with flags for them and for parameters.

W ranks
"""

from __future__ import annotations

import attrs
import torch

from nmoe.pure.parallel.exchange_arena import FIELD_BYTES, FLAG_BYTES, GRANULARITY, Field

SLOTS = 4
"""Copies on the way at once: one is made, one is summed, and two more take up what ranks wait for each other."""

SLOT_BYTES = 64 * 2**20
"""Of a slot, for all ranks together. Two ranks send 32 MiB at a time, 85 us on NVLink, which launches do not delay."""


@attrs.frozen(kw_only=True)
class Slots:
    """Offsets and shapes. Comments name who writes; the owner of the memory reads."""

    landed: Field  # [S W FLAG] i64, source: copies it has made into a slot; the first word of a line counts
    freed: Field  # [S W FLAG] i64, reader: copies of which it needs a slot no more
    opened: Field  # [W FLAG] i64, reader: times that it has read all it will of the parameters others are to replace
    stored: Field  # [W FLAG] i64, source: times that it has replaced some
    areas: Field  # [S W bytes] u8, source: what it has copied
    size: int  # bytes

    def allocated(self) -> int:
        """Bytes on a GPU, which allocates whole granules."""
        return -(-self.size // GRANULARITY) * GRANULARITY


def slots(ranks: int, slot_bytes: int = SLOT_BYTES) -> Slots:
    """Lay out the memory of one of so many ranks.

    slot_bytes  of a slot, for all ranks together
    """
    flags = (SLOTS, ranks, FLAG_BYTES // 8)
    landed = Field(offset=0, shape=flags, dtype=torch.int64)
    freed = Field(offset=landed.size(), shape=flags, dtype=torch.int64)
    opened = Field(offset=freed.offset + freed.size(), shape=flags[1:], dtype=torch.int64)
    stored = Field(offset=opened.offset + opened.size(), shape=flags[1:], dtype=torch.int64)
    begin = -(-(stored.offset + stored.size()) // FIELD_BYTES) * FIELD_BYTES
    area = max(1, slot_bytes // ranks // FIELD_BYTES) * FIELD_BYTES
    areas = Field(offset=begin, shape=(SLOTS, ranks, area), dtype=torch.uint8)
    size = begin + areas.size()
    return Slots(landed=landed, freed=freed, opened=opened, stored=stored, areas=areas, size=size)
