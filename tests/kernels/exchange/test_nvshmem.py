"""The exchange among virtual ranks by NVSHMEM, whose functions are replaced by late copies: the bits of one rank."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmoe.effects.kernels.exchange import nvshmem as kernels
from nmoe.effects.kernels.exchange import push as moves
from nmoe.effects.parallel import exchange
from nmoe.effects.parallel.exchange import Exchange, arena, nvshmem
from nmoe.effects.parallel.exchange.device import PEER
from nmoe.errors import InputError
from tests.kernels.exchange.ranks import case, open_ranks, shared, single_rank
from tests.kernels.exchange.test_exchange import TILES, WIDE, differing

WORD = 4
FIRST = 5
"""What NVSHMEM calls the first rank; the next ones are two apart."""


class Memory:
    """Memory of ranks, which each names by addresses of its own. What is put arrives when somebody waits for it.

    per_host  ranks of a host, within which nothing is put; None: anything is
    """

    def __init__(self, ranks: list[Tensor], per_host: int | None = 1) -> None:
        self.ranks, self.per_host = ranks, per_host
        self.signals = 0
        self.messages: list[tuple[int, int, int]] = []  # target, source, bytes
        self.late: list[tuple[int, int, int]] = []

    def at(self, address: int, size: int, pe: int) -> int:
        """Where a rank has what another one names."""
        to = (pe - FIRST) // 2
        for own in self.ranks:
            offset = address - own.data_ptr()
            if 0 <= offset < own.nbytes:
                assert size > 0 and offset + size <= own.nbytes, (offset, size)
                return self.ranks[to].data_ptr() + offset
        raise AssertionError("a put names its own rank's memory")

    def put(self, target: object, source: object, size: object, pe: object) -> None:
        """`nvshmemx_putmem_nbi_block`: the source may be read until `quiet`."""
        there, here, number, to = map(scalar, (target, source, size, pe))
        (by,) = [
            rank
            for rank, own in enumerate(self.ranks)
            if own.data_ptr() <= here <= here + number <= own.data_ptr() + own.nbytes
        ]
        if self.per_host:
            assert (to - FIRST) // 2 // self.per_host != by // self.per_host, "a put within a host"
        message = (self.at(there, number, to), here, number)
        self.late.append(message)
        self.messages.append(message)

    def quiet(self) -> None:
        """`nvshmem_quiet`"""
        for message in self.late:
            ctypes.memmove(*message)
        self.late.clear()

    def signal(self, flag: object, value: object, how: object, pe: object) -> None:
        """`nvshmemx_signal_op`"""
        assert getattr(how, "value", how) == kernels.SET
        word = ctypes.c_int64.from_address(self.at(scalar(flag), 8, scalar(pe)))
        word.value = scalar(value)
        self.signals += 1

    def compared(self, flag: object, how: object, value: object) -> Any:
        """`nvshmem_int64_test`; a rank that is not there would be waited for without end."""
        assert getattr(how, "value", how) == kernels.AT_LEAST
        assert ctypes.c_int64.from_address(scalar(flag)).value >= scalar(value)
        return 1


def scalar(value: object) -> int:
    """A number in a kernel that is interpreted."""
    return int(value.handle.data.item()) if hasattr(value, "handle") else int(value)  # pyright: ignore


@contextmanager
def replaced(ranks: list[Tensor], per_host: int | None = 1) -> Iterator[Memory]:
    """NVSHMEM between these memories."""
    memory = Memory(ranks, per_host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_put_", memory.put)
        patch.setattr(kernels, "_quiet", memory.quiet)
        patch.setattr(kernels, "_signal_", memory.signal)
        patch.setattr(kernels, "_compared", memory.compared)
        yield memory


def numbers(ranks: int) -> list[int]:
    """What NVSHMEM calls each rank."""
    return [FIRST + 2 * rank for rank in range(ranks)]


def over(exchanges: tuple[Exchange, ...], per_host: int = 1) -> list[Exchange]:
    """The same ranks, joined by NVSHMEM, which hands out addresses within a host."""
    sizes, where = exchanges[0].sizes, torch.device("cpu")
    by = nvshmem.links(sizes, numbers(sizes.ranks), "", None, where)
    joined: list[Exchange] = []
    for e in exchanges:
        near = [rank // per_host == e.rank // per_host for rank in range(sizes.ranks)]
        addresses = [address if here else 0 for address, here in zip(e.addresses.tolist(), near, strict=True)]
        transport = nvshmem.over(by, PEER, addresses)
        joined.append(attrs.evolve(e, transport=transport, addresses=torch.tensor(addresses)))
    return joined


@pytest.mark.parametrize(
    ("kind", "parts", "per_host", "dedup"),
    [
        ("random", (12, 12), 1, True),
        ("ties", (9, 0, 2, 1), 2, False),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (
                ("random", (12, 12), 1, False),
                ("ties", (9, 0, 2, 1), 1, False),
                ("random", (6, 6, 6, 6), 1, True),
                ("random", (6, 6, 6, 6), 2, True),
                ("all to one", (6, 6), 1, True),
                ("none to the first half", (6, 6), 1, False),
            )
        ),
    ],
)
def test_the_bits_of_one_rank(kind: str, parts: tuple[int, ...], per_host: int, dedup: bool) -> None:
    """Twice over the same arenas; rows are not put one by one, and nothing is put within a host."""
    c = case(kind, sum(parts), 16, 16, 4, 3)  # with two ranks more choices than a token is sent to
    exchanges = over(open_ranks(c, parts, dedup=dedup, staged=True), per_host)
    wanted = single_rank(c, TILES)
    with replaced([e.raw for e in exchanges], per_host) as memory:
        for _ in range(2):
            assert differing(shared(c, exchanges, parts, TILES), wanted) == []
    assert memory.late == [] and max(size for _, _, size in memory.messages) > 16 * c.x.element_size()
    barriers = int(exchanges[0].epoch) * len(parts)
    assert memory.signals == barriers * (len(parts) - per_host)


def test_one_host_is_stored_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of NVSHMEM runs, products store their rows themselves, and the end waits for all ranks."""
    c, parts = case("random", 12, 16, 16, 4, 3), (6, 6)
    exchanges = over(open_ranks(c, parts, dedup=True, staged=True), per_host=2)
    for name in ("stage_kernel", "nvshmem_put_kernel", "nvshmem_barrier_kernel"):
        monkeypatch.setattr(kernels, name, None)
    assert differing(shared(c, exchanges, parts, TILES), single_rank(c, TILES)) == []
    assert exchanges[0].transport.direct
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *of: seen.append("device"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda **of: seen.append("ranks"))
    exchanges[0].transport.flush(exchanges[0])
    assert seen == ["device", "ranks"]


@pytest.mark.parametrize("dedup", [True, pytest.param(False, marks=pytest.mark.long)])
def test_fp8_has_the_bits_of_one_rank(dedup: bool) -> None:
    """Codes are staged where rows are, which are wider."""
    c, parts = case("random", 16, 128, 128, 4, 3), (8, 8)
    exchanges = over(open_ranks(c, parts, dedup=dedup, staged=True, fp8=True))
    with replaced([e.raw for e in exchanges]) as memory:
        assert differing(shared(c, exchanges, parts, WIDE), single_rank(c, WIDE, fp8=True)) == []
    assert memory.late == []


@pytest.mark.parametrize("dedup", [False, True])
def test_too_many_rows(dedup: bool) -> None:
    """Every rank knows how many it takes, and nothing but counts and signals is sent."""
    c = case("random", 24, 16, 16, 4, 2)
    parts = [12, 12]
    enough = open_ranks(c, parts, dedup=dedup)[0].sizes.capacity
    exchanges = over(open_ranks(c, parts, dedup=dedup, capacity=enough - 1, staged=True))
    row = exchanges[0].fields.counts.size() // 2
    with replaced([e.raw for e in exchanges]) as memory:
        shared(c, exchanges, parts, TILES)
    assert [size for _, _, size in memory.messages] == [row] * 2
    assert [int(e.needed) for e in exchanges] == [enough] * 2
    with pytest.raises(InputError, match=rf"expected at most {enough - 1} rows .* got {enough} on"):
        exchange.check(exchanges[0])


@settings(max_examples=25)
@given(data=st.data())
def test_neighbours_leave_in_one_message(data: st.DataObject) -> None:
    """Words in any order, some to nowhere or to ranks that stores reach, of which the first count: the places of
    `push_words_`, in as few messages as programs and runs leave."""
    ranks, most = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    near = [False, *(data.draw(st.booleans()) for _ in range(ranks - 1))]
    run = st.tuples(st.integers(0, ranks), st.integers(1, 9))
    to = [rank for rank, length in data.draw(st.lists(run, min_size=1, max_size=12)) for _ in range(length)][:most]
    places = data.draw(st.permutations(range(len(to)))) if data.draw(st.booleans()) else list(range(len(to)))
    order = data.draw(st.permutations(range(len(to))))
    counted, programs = data.draw(st.integers(0, len(to))), data.draw(st.sampled_from([1, 2, 5]))
    sent = [(to[n], places[n]) for n in range(counted)]

    def ordered(values: list[int]) -> Tensor:
        out = torch.empty(len(values), dtype=torch.int32)
        out[torch.tensor(order)] = torch.tensor(values, dtype=torch.int32)
        return out

    words = torch.arange(1000, 1000 + len(to), dtype=torch.int32)
    item, valid = torch.tensor(order, dtype=torch.int32), torch.tensor([counted, 0, 0], dtype=torch.int32)
    memory = [torch.zeros(2 * most, dtype=torch.int32) for _ in range(ranks)]
    memory[0][most : most + len(to)] = words
    stage, target = memory[0][most : most + len(to)], memory[0].data_ptr()
    pes = torch.tensor(numbers(ranks), dtype=torch.int32)
    stored = torch.tensor([own.data_ptr() if here else 0 for own, here in zip(memory, near, strict=True)])
    with replaced(memory, per_host=None) as network:
        kernels.put_(stage, target, item, ordered(to), ordered(places), stored, valid, pes, "", programs, back=False)
        network.quiet()

    wanted = [torch.zeros(2 * most, dtype=torch.int32) for _ in range(ranks + 1)]
    wanted[0][most : most + len(to)] = words
    addresses = torch.tensor([0 if here else own.data_ptr() for own, here in zip(wanted, [*near, False], strict=True)])
    moves.push_words_(words, None, torch.tensor(to), torch.tensor(places), addresses, 0, valid, back=False)
    assert all(map(torch.equal, memory, wanted[:-1]))
    heads = [n for n, (rank, at) in enumerate(sent) if not n or sent[n - 1] != (rank, at - 1)]
    share = min(kernels.BLOCK, -(-len(to) // programs))
    cuts = {*heads, *range(0, counted, share)}
    assert len(network.messages) == sum(sent[n][0] < ranks and not near[sent[n][0]] for n in cuts)


def test_a_signal_follows_what_it_signals_and_replaces_each_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """By NVSHMEM, or stored where a rank has an address."""
    seen: list[object] = []
    monkeypatch.setattr(kernels, "_quiet", lambda: seen.append("quiet"))
    monkeypatch.setattr(kernels, "_signal_", lambda *of: seen.append(tuple(map(constant, of))))
    epoch, arrived = torch.tensor([6]), torch.zeros(3, 16, dtype=torch.int64)
    pes, missing = torch.tensor(numbers(3), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    near = torch.zeros(3, 18, dtype=torch.int64)
    addresses = torch.tensor([0, near.data_ptr(), 0])
    kernels.barrier_(epoch, addresses, arrived, missing, pes, 16, 2, "", signal=True, wait=False, limit_ns=0)
    flag = arrived[2].data_ptr()
    assert seen == ["quiet", *((flag, 7, kernels.SET, pe) for pe in numbers(3)[::2])]
    assert epoch.tolist() == [7] and near.flatten().nonzero().tolist() == [[2 + 2 * 16]] and int(near.sum()) == 7


def constant(value: object) -> int:
    """A number, or a constant of the kernel."""
    return scalar(getattr(value, "value", value) if not hasattr(value, "handle") else value)


def test_what_a_rank_sends_has_room_in_its_arena() -> None:
    """Each field of `sent` is as long as the most that leaves at once, and only where it is staged."""
    c = case("random", 24, 16, 16, 8, 3)
    for dedup, rows in ((True, 12 * 2), (False, 12 * 3)):
        f = open_ranks(c, [12, 12], dedup=dedup, capacity=50, staged=True)[0].fields
        assert (f.sent.shape, f.sent_back.shape) == ((rows, 16), (50, 16))
        assert open_ranks(c, [12, 12], dedup=dedup, capacity=50)[0].fields.sent.size() == 0
    assert arena.view(torch.zeros(f.size, dtype=torch.uint8), f.sent_words).shape == (36,)
