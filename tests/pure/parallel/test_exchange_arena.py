"""The arena's layout: sizes of the research notes, alignment, no overlap."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.parallel.exchange_arena import GRANULARITY, Fields, fields, sizes


@pytest.mark.parametrize(
    ("hidden", "ranks", "dedup", "capacity", "gigabytes"),
    # the research notes' table of landing rooms, of which the arena has two
    [
        (2048, 8, False, math.inf, 2.0),
        (2048, 2, False, math.inf, 0.5),
        (2048, 64, False, math.inf, 2.0),  # one expert a rank: a token sends it one row at most
        (2048, 8, False, 2.0, 0.5),
        (2048, 8, True, math.inf, 0.25),
        (2048, 2, True, math.inf, 0.0625),
        (7168, 8, False, math.inf, 7.0),
        (7168, 8, False, 2.0, 1.75),
        (7168, 8, True, 2.0, 0.875),
    ],
)
def test_landing_room_is_that_of_the_notes(
    hidden: int, ranks: int, dedup: bool, capacity: float, gigabytes: float
) -> None:
    placed = fields(
        sizes(
            tokens=8192,
            top_k=8,
            experts=64,
            hidden_size=hidden,
            dtype=torch.bfloat16,
            ranks=ranks,
            dedup=dedup,
            capacity=capacity,
        )
    )
    assert placed.land.size() + placed.land_gradient.size() == 2 * gigabytes * 2**30
    assert placed.back.size() == 8192 * 8 * hidden * 2
    assert placed.allocated() % GRANULARITY == 0 and 0 <= placed.allocated() - placed.size < GRANULARITY


@given(
    tokens=st.integers(1, 300),
    top_k=st.integers(1, 6),
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
    local=st.integers(1, 2),
    fp8=st.booleans(),
)
def test_fields_are_aligned_and_disjoint_and_dedup_never_lands_more(
    tokens: int, top_k: int, ranks: int, local: int, fp8: bool
) -> None:
    """But for rows in fp8, which land where other rows do at another time."""

    def placed(dedup: bool) -> Fields:
        return fields(
            sizes(
                tokens=tokens,
                top_k=top_k,
                experts=max(ranks * local, 16),
                hidden_size=128,
                dtype=torch.bfloat16,
                ranks=ranks,
                dedup=dedup,
                capacity=2.0,
                fp8=fp8,
            )
        )

    assert placed(True).land.size() <= placed(False).land.size()
    for dedup in (False, True):
        found = attrs.asdict(placed(dedup), recurse=False)
        size, codes, land = found.pop("size"), found.pop("land_codes"), found["land"]
        assert codes.offset == land.offset
        assert (0 < codes.size() <= land.size()) if fp8 else codes.size() == 0
        every = sorted(found.values(), key=lambda field: field.offset)
        ends = [field.offset for field in every[1:]] + [size]
        for field, end in zip(every, ends, strict=True):
            assert field.offset % 16 == 0 and field.offset + field.size() <= end
