"""Transposition between places of every layout."""

from __future__ import annotations

import pytest
import torch

from nmoe.effects.checkpoint.transpose import BLOCK, transpose_


@pytest.mark.parametrize("wide_out", (False, True))
@pytest.mark.parametrize("wide_in", (False, True))
@pytest.mark.parametrize(("rows", "columns"), ((3, 5), (BLOCK + 3, 2 * BLOCK + 1), (1, 7), (0, 4)))
def test_every_element_is_moved_as_bits(rows: int, columns: int, wide_in: bool, wide_out: bool) -> None:
    """What lies beside the columns that are written stays; NaNs keep their bits."""
    bits = torch.randint(-(1 << 15), 1 << 15, (rows, columns + 2 * wide_in), dtype=torch.int16)
    matrix = bits.view(torch.bfloat16)[:, :columns]
    place = torch.full((columns, rows + 3 * wide_out), 7, dtype=torch.int16)
    transpose_(place.view(torch.bfloat16)[:, :rows], matrix)
    expected = [[int(bits[row, column]) for row in range(rows)] for column in range(columns)]
    assert place[:, :rows].tolist() == expected
    assert place[:, rows:].eq(7).all()


def test_another_format_is_rounded_to() -> None:
    out = torch.empty(3, 2, dtype=torch.bfloat16)
    transpose_(out, torch.tensor([[1.0, 2.0, 3.001], [4.0, 5.0, 6.0]]))
    assert out.tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
