"""Collectives by copies into the memory of others, among virtual ranks of one process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import reduce
from itertools import count

import pytest
import torch
from torch import Tensor

from nmoe.effects.parallel.copies import Copies
from nmoe.effects.parallel.exchange.arena import view
from nmoe.effects.parallel.ranks import Group, Ranks
from nmoe.pure.parallel.levels import part_of
from nmoe.pure.parallel.slots import SLOTS, slots

BYTES = 4096
"""Of a slot: so little that a tensor is cut into more pieces than there are slots."""


def opened(ranks: int) -> list[Copies]:
    """Every rank, in memory of its own in which nobody has written but flags of zero."""
    layout = slots(ranks, BYTES)
    arenas = [torch.zeros(layout.size, dtype=torch.uint8) for _ in range(ranks)]
    for arena in arenas:
        view(arena, layout.areas).fill_(255)  # NaN
    addresses = [arena.data_ptr() for arena in arenas]
    shared: list[list[Tensor]] = []

    def sharing() -> Callable[[int], Sequence[Tensor]]:
        """What a rank calls for more: its first call gets the first memory of all ranks, and so on."""
        calls = count()

        def share(size: int) -> Sequence[Tensor]:
            call = next(calls)
            if call == len(shared):
                shared.append([torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)])
            return shared[call]

        return share

    return [Copies(rank, layout, arenas, addresses, sharing(), 0) for rank in range(ranks)]


def together(works: Sequence[Generator[None, None, None]]) -> None:
    """Run ranks side by side, each up to the next piece."""
    going = list(works)
    while going:
        going = [work for work in going if next(work, going) is None]


def drawn(ranks: int, size: int, seed: int) -> list[Tensor]:
    """Numbers of very different sizes for each rank, so that another order of sums has other bits."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator) * 10 ** torch.randint(-3, 4, (size,), generator=generator)
        for _ in range(ranks)
    ]


def pairs(terms: Sequence[Tensor]) -> Tensor:
    """Neighbours first, then their sums."""
    return terms[0] if len(terms) == 1 else pairs(terms[: len(terms) // 2]) + pairs(terms[len(terms) // 2 :])


def in_turn(terms: Sequence[Tensor]) -> Tensor:
    """From the first to the last."""
    return reduce(torch.add, terms)


def threes(terms: Sequence[Tensor]) -> Tensor:
    """Pairs, and of their sums one after another."""
    return in_turn([terms[first] + terms[first + 1] for first in range(0, len(terms), 2)])


@pytest.mark.parametrize(
    ("ranks", "order"), [(2, pairs), (3, in_turn), (4, pairs), (6, threes), (8, pairs)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_part_is_the_sum_of_all_ranks(
    ranks: int, order: Callable[[Sequence[Tensor]], Tensor], dtype: torch.dtype
) -> None:
    """Three tensors one after another, through the same slots; nothing but the own part is written.

    Sums of 16 bits, of bf16 on a GPU, are fp32, in memory of their own.
    """
    copies, apart = opened(ranks), dtype is torch.float16
    for seed, size in enumerate((ranks * 7, (SLOTS + 2) * BYTES // 4, ranks * BYTES // 8)):
        given = [flat.to(dtype) for flat in drawn(ranks, size, seed)]
        flats = [flat.clone() for flat in given]
        parts = [flat.view(ranks, -1)[part_of(rank, ranks)] for rank, flat in enumerate(flats)]
        sums = [torch.full((part.numel() + 1,), torch.nan)[:-1] if apart else part for part in parts]
        works = zip(copies, flats, sums, strict=True)
        together([copy.scattering_(flat, out) for copy, flat, out in works])
        wanted = order([flat.float() for flat in given]).view(ranks, -1)
        for rank, flat in enumerate(flats):
            mine = part_of(rank, ranks)
            assert torch.equal(sums[rank], wanted[mine])
            assert not apart or torch.equal(parts[rank], given[rank].view(ranks, -1)[mine])
            others = [part for part in range(ranks) if part != mine]
            assert torch.equal(flat.view(ranks, -1)[others], given[rank].view(ranks, -1)[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_all_parts(ranks: int, dtype: torch.dtype) -> None:
    """Stretches of two symmetric buffers, one after another, and one again when its values have changed."""
    copies = opened(ranks)
    buffers = [[copy.symmetric(ranks * size, dtype) for copy in copies] for size in (3, BYTES + 64)]
    for seed, (buffer, begin, end) in enumerate([(0, 0, 3), (1, 0, BYTES), (1, BYTES, BYTES + 64), (1, 0, BYTES)]):
        whole = (drawn(1, ranks * (end - begin), seed)[0] * 100).to(dtype)
        for rank, flat in enumerate(buffers[buffer]):
            mine = part_of(rank, ranks)
            flat[ranks * begin : ranks * end].view(ranks, -1)[mine] = whole.view(ranks, -1)[mine]
        flats = [flat[ranks * begin : ranks * end] for flat in buffers[buffer]]
        rest = [torch.cat((flat[: ranks * begin], flat[ranks * end :])) for flat in buffers[buffer]]
        together([copy.gathering_(flat) for copy, flat in zip(copies, flats, strict=True)])
        assert all(torch.equal(flat, whole) for flat in flats)
        after = [torch.cat((flat[: ranks * begin], flat[ranks * end :])) for flat in buffers[buffer]]
        assert all(torch.equal(one, other) for one, other in zip(rest, after, strict=True))


def test_nothing_is_replaced_before_all_have_read_it() -> None:
    """A rank that has come to its all-gather copies nothing while the other has not."""
    first, second = opened(2)
    own, other = first.symmetric(4, torch.float32), second.symmetric(4, torch.float32)
    own.fill_(1)
    ahead, behind = first.gathering_(own), second.gathering_(other)
    next(ahead)
    assert other.tolist() == [0, 0, 0, 0]
    next(behind)
    next(ahead)
    assert other.tolist() == [1, 1, 0, 0]


def test_a_gather_waits_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank alone would have to wait for: that the other has read the old values, and stored the new ones."""
    rank, _ = opened(2)
    waits: list[int] = []

    def passing(count: Tensor, flags: Tensor, missing: Tensor, *, ahead: int, limit_ns: int) -> None:
        waits.append(int(count) + ahead - int(flags[:, 0].min()))

    monkeypatch.setattr("nmoe.effects.kernels.exchange.push.await_flags_", passing)
    flat = rank.symmetric(4, torch.float32)
    for _ in range(2):
        for _ in rank.gathering_(flat):
            pass
    assert waits == [1, 1, 2, 2]


def test_memory_that_two_groups_share_is_counted_once() -> None:
    world, replicas = opened(2)[0], opened(3)[0]
    world.symmetric(5, torch.float32)
    for group, num_bytes in ((world, 0), (replicas, slots(3, BYTES).size)):
        ranks = Ranks(world=Group(copies=world), replicas=Group(copies=group))
        assert ranks.symmetric_bytes() == slots(2, BYTES).size + 20 + num_bytes
    assert Ranks().symmetric_bytes() == 0


def test_a_tensor_that_others_do_not_see_is_refused() -> None:
    rank, _ = opened(2)
    with pytest.raises(ValueError, match=r"^copies: expected a tensor in memory that `symmetric` gave"):
        next(rank.gathering_(torch.zeros(4)))


def test_parts_are_those_of_levels() -> None:
    """The first level, neighbours, cuts the tensor in two, the second each half."""
    assert [part_of(rank, 4) for rank in range(4)] == [0, 2, 1, 3]
    assert [part_of(rank, 6) for rank in range(6)] == [0, 3, 1, 4, 2, 5]
    assert [part_of(rank, 3) for rank in range(3)] == [0, 1, 2]


def test_a_slot_is_written_when_all_have_freed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank goes through all pieces while the other does nothing: what it would have had to wait for."""
    rank, _ = opened(2)
    waits: list[str] = []

    def passing(count: Tensor, flags: Tensor, missing: Tensor, *, ahead: int, limit_ns: int) -> None:
        if int(flags[:, 0].min()) < int(count) + ahead:
            waits.append("landed" if ahead else "freed")

    monkeypatch.setattr("nmoe.effects.kernels.exchange.push.await_flags_", passing)
    (flat,) = drawn(1, 2 * (SLOTS + 2) * BYTES // 8, 0)
    for _ in rank.scattering_(flat, flat.view(2, -1)[0]):
        pass
    assert waits == ["landed"] * SLOTS + ["freed", "landed"] * 2
