"""Runs of rows among virtual ranks, NVSHMEM's functions replaced by copies: the places of `push_`, interpreted."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nmoe.effects.kernels.exchange import nvshmem
from nmoe.effects.kernels.exchange import plan as plans
from nmoe.effects.kernels.exchange import push as moves

WIDTH = 4
ROW = 4 * WIDTH
"""fp32 of a row, and bytes."""

NOBODY = -1.0
"""In every field, where no row is written."""

PARTS = 3
"""Programs of a run: few enough that interpreting them takes seconds."""


class Memory:
    """Fields of ranks, which a rank names by addresses of its own, as in a symmetric heap."""

    def __init__(self, fields: list[Tensor], rank: int) -> None:
        self.fields = fields
        self.rank = rank  # whose kernel runs
        self.messages: list[tuple[int, int]] = []  # address of the source, bytes

    def put(self, target: object, source: object, size: object, peer: object) -> None:
        """`nvshmemx_putmem_nbi_block`, within the field or not at all."""
        there, here, number, to = map(scalar, (target, source, size, peer))
        at = there - self.fields[self.rank].data_ptr()
        assert number > 0 and 0 <= at <= at + number <= self.fields[to].nbytes, (at, number, self.fields[to].nbytes)
        ctypes.memmove(self.fields[to].data_ptr() + at, here, number)
        self.messages.append((here, number))


def scalar(value: object) -> int:
    """A number in a kernel that is interpreted."""
    return int(value.handle.data.item())  # pyright: ignore[reportAttributeAccessIssue]


def fields(ranks: int, rows: int) -> list[Tensor]:
    """A field a rank, in which nobody has written."""
    return [torch.full((rows, WIDTH), NOBODY) for _ in range(ranks)]


def addresses(of: list[Tensor]) -> Tensor:
    """[W]"""
    return torch.tensor([each.data_ptr() for each in of])


def numbered(rows: int, rank: int) -> Tensor:
    """[rows D], no two alike on any rank."""
    return (1000.0 * rank + torch.arange(max(rows, 1)))[:, None] + torch.arange(WIDTH) / 8


@st.composite
def routings(draw: st.DrawFn) -> Tensor:
    """[W E]: rows of each rank for each expert; fewer than programs of a run, none, and no multiple."""
    ranks, local = draw(st.sampled_from([(1, 3), (2, 1), (2, 3), (3, 2), (4, 1)]))
    some = st.sampled_from([0, 0, 1, PARTS - 1, PARTS, PARTS + 1, 4 * PARTS - 2])
    number = ranks * ranks * local
    return torch.tensor(draw(st.lists(some, min_size=number, max_size=number))).view(ranks, -1)


@settings(max_examples=12)
@example(of=torch.zeros(2, 2, dtype=torch.int64))
@example(of=torch.tensor([[0, 0, 0, 7], [0, 0, 0, 1]]))
@given(of=routings())
def test_runs_lie_where_rows_pushed_one_by_one_do(of: Tensor) -> None:
    """Out to the experts and back again; each row goes in one message, of no more than `PARTS` for a run."""
    ranks, experts = of.shape
    most = int(of.sum(0).view(ranks, -1).sum(1).max())
    counts = torch.cat([of, of.new_zeros(ranks, ranks)], 1).int()
    needed = torch.zeros(1, dtype=torch.int32)
    made = [plans.plan_(counts, needed, rank, most) for rank in range(ranks)]
    sent = [numbered(int(each.sum()), rank) for rank, each in enumerate(of)]

    landed, land = fields(ranks, most), fields(ranks, most)
    for rank, put in enumerate(every(landed)):
        end = of[rank].cumsum(0).int()
        put(sent[rank], end, made[rank].shift, False)
        expert = torch.arange(experts).repeat_interleave(of[rank])
        to = (expert // (experts // ranks)).int()[:, None]
        at = (torch.arange(len(expert)) + made[rank].shift[expert]).int()[:, None]
        moves.push_(sent[rank][: len(to)], to, at, addresses(land), 0, made[rank].valid, 2, back=False)
    assert all(map(torch.equal, landed, land))

    returned, back = fields(ranks, int(of.sum(1).max())), fields(ranks, int(of.sum(1).max()))
    for rank, put in enumerate(every(returned)):
        put(land[rank], made[rank].origin_end, made[rank].origin_shift, True)
        origin = plans.origins(made[rank], max(most, 1))
        to, at = origin.to[:, None], origin.at[:, None]
        moves.push_(land[rank], to[:most], at[:most], addresses(back), 0, made[rank].valid, 2, back=True)
    assert all(map(torch.equal, returned, back))
    for rank, rows in enumerate(of.sum(1).tolist()):
        assert torch.equal(returned[rank][:rows], sent[rank][:rows]), "what went out came back"


def every(of: list[Tensor]) -> list[Callable[[Tensor, Tensor, Tensor, bool], None]]:
    """For each rank, a put of its rows by the kernel."""

    def make(rank: int) -> Callable[[Tensor, Tensor, Tensor, bool], None]:
        def put(rows: Tensor, end: Tensor, shift: Tensor, back: bool) -> None:
            memory = Memory(of, rank)
            with pytest.MonkeyPatch.context() as patch:
                load = InterpreterBuilder.create_masked_load

                def zero(self: InterpreterBuilder, ptrs: TensorHandle, mask: Any, other: Any, *rest: Any) -> Any:
                    # `tl.load` forgets a single `other` that is false, as 0 is here: in the interpreter alone
                    instead = TensorHandle(np.zeros_like(ptrs.data, np.int32), ptrs.get_element_ty())
                    return load(self, ptrs, mask, instead if other is None else other, *rest)

                patch.setattr(InterpreterBuilder, "create_masked_load", zero)
                patch.setattr(nvshmem, "PARTS", PARTS)
                patch.setattr(nvshmem, "_put_", memory.put)
                nvshmem.put_runs_(rows.data_ptr(), of[rank].data_ptr(), end, shift, ROW, len(of), "", back=back)
            messages = sorted((here - rows.data_ptr(), size) for here, size in memory.messages)
            begins = [begin // ROW for begin, _ in messages]
            assert [0, *(begin + size for begin, size in messages)] == [
                *(begin for begin, _ in messages),
                ROW * end[-1],
            ]
            runs = torch.searchsorted(end, torch.tensor(begins, dtype=torch.int32), right=True)
            assert not begins or int(runs.bincount().max()) <= PARTS

        return put

    return [make(rank) for rank in range(len(of))]


def test_a_signal_follows_what_it_signals_and_replaces_each_word(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(nvshmem, "_quiet", lambda: seen.append("quiet"))
    monkeypatch.setattr(nvshmem, "_signal_", lambda *of: seen.append(tuple(map(scalar_or_own, of))))
    epoch = torch.tensor([6])
    nvshmem.signal_(epoch, 1 << 40, 3, "")
    assert seen == ["quiet", *((1 << 40, 7, nvshmem.SET, peer) for peer in range(3))]
    assert epoch.tolist() == [7]


def scalar_or_own(value: object) -> object:
    """A number, or a constant of the kernel."""
    return scalar(value) if hasattr(value, "handle") else getattr(value, "value", value)
