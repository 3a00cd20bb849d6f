"""Stores reach the ranks that have an address: to one without, nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.exchange import push as moves
from nmoe.pure.parallel.exchange_arena import Field

RANKS, EXPERTS, WIDTH = 3, 4, 8

Store = Callable[[Tensor, int], None]
"""Writes to all ranks, to arenas at these addresses and an offset."""


def rows(addresses: Tensor, offset: int) -> None:
    to = torch.arange(RANKS, dtype=torch.int32).repeat(2, 1)
    at = torch.tensor([[0], [1]], dtype=torch.int32).expand(2, RANKS).contiguous()
    valid = torch.full((3,), 2 * RANKS, dtype=torch.int32)
    moves.push_(torch.ones(2, WIDTH), to, at, addresses, offset, valid, 2, back=False)


def words(addresses: Tensor, offset: int) -> None:
    to = torch.arange(RANKS, dtype=torch.int32)
    valid = torch.full((3,), RANKS, dtype=torch.int32)
    moves.push_words_(torch.ones(RANKS), None, to, torch.zeros_like(to), addresses, offset, valid, back=False)


def counts(addresses: Tensor, offset: int) -> None:
    moves.push_counts_(torch.ones(EXPERTS, dtype=torch.int32), None, addresses, offset, 0)


def signals(addresses: Tensor, offset: int) -> None:
    moves.signal_(torch.zeros(1, dtype=torch.int64), addresses, offset, 0, WIDTH)


def passed_on(addresses: Tensor, offset: int) -> None:
    flags = Field(offset=offset, shape=(RANKS, WIDTH), dtype=torch.int64)
    moves.pass_on_(torch.ones(1, dtype=torch.int64), addresses, flags, 1)


@pytest.mark.parametrize("store", [rows, words, counts, signals, passed_on])
@pytest.mark.parametrize("far", [0, 1, 2])
def test_nothing_is_written_where_there_is_no_address(store: Store, far: int) -> None:
    """The offset is where other memory begins, which a store to address 0 would hit."""
    memory = torch.zeros(RANKS, 64, dtype=torch.int64)
    beyond = memory[far].data_ptr()
    addresses = torch.tensor([0 if rank == far else memory[rank].data_ptr() - beyond for rank in range(RANKS)])
    store(addresses, beyond)
    assert memory.any(1).tolist() == [rank != far for rank in range(RANKS)]
