"""Tile tables: what is called measured was measured, and what is no table is refused."""

from __future__ import annotations

from typing import Any

import pytest

from nmoe.effects.kernels import tables


def test_no_entry_claims_a_measurement_on_a_b200() -> None:
    entries = tables.load((10, 0)).entries
    assert [entry.measured for sizes in entries.values() for entry in sizes.values()].count(True) == 0


def test_a_size_without_an_entry_is_not_measured() -> None:
    table = tables.load((9, 0))
    assert tables.find(table, "moe", 2048, 1408).measured and tables.find(table, "attention", 128, 64, 128).measured
    other = tables.find(table, "moe", 64, 64)
    assert not other.measured and other.size == tables.DEFAULT and other.group == 8


GEMM = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"up": GEMM},
        {"measured": 1, "up": GEMM},
        {"measured": True, "group": 0, "up": GEMM},
        {"measured": True, "up": {**GEMM, "block_k": 0}},
        {"measured": True, "up": {**GEMM, "heads": 2}},
        {"measured": True, "up": [16, 16, 16, 4, 2]},
    ],
)
def test_what_is_no_entry(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError, KeyError)):
        tables.entry(tables.GemmTile, "default", fields)
