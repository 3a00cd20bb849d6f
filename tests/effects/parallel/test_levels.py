"""Sums in levels: one order for any hosts, and fewer bytes between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.effects.parallel.launch import from_environment
from nmoe.effects.parallel.ranks import Ranks, open_ranks
from nmoe.effects.train import zero
from nmoe.pure.parallel.levels import level_sizes
from tests.effects.parallel.cluster import SENT, on_hosts
from tests.effects.parallel.rank_runs import as_world, in_group
from tests.effects.train.tiny import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "found"), [(1, []), (2, [2]), (4, [2, 2]), (6, [2, 3]), (7, [7]), (12, [2, 2, 3]), (64, [2] * 6)]
)
def test_levels_are_prime_factors_and_the_smallest_come_first(size: int, found: list[int]) -> None:
    assert level_sizes(size) == found


def gradient(rank: int, size: int = 48) -> torch.Tensor:
    """Of a rank: sums of four of these depend on their order."""
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "experts"), [(4, 1), (6, 1), (8, 2)])
def test_a_sum_has_one_order_and_every_part_one_owner(
    tmp_path: Path, world: int, experts: int, dtype: torch.dtype
) -> None:
    """Pairs of neighbours first, then pairs of pairs; of replicas, which are every second rank, the same.

    Of bf16 in fp32, in memory of their own.
    """

    def check(ranks: Ranks) -> None:
        group = ranks.replicas
        mine = range(ranks.world.rank % experts, world, experts)
        terms = [gradient(rank).to(dtype).float() for rank in mine]
        for size in level_sizes(len(mine)):
            heads = [terms[index : index + size] for index in range(0, len(terms), size)]
            terms = [sum(head[1:], head[0]) for head in heads]
        flat = gradient(ranks.world.rank).to(dtype)
        length = 48 // group.size
        own = slice(group.part() * length, (group.part() + 1) * length)
        sums = None if dtype is torch.float32 else torch.full((length,), torch.nan)
        zero._reduce_scatter_(group, flat, sums).wait()
        if sums is not None:
            assert torch.equal(flat, gradient(ranks.world.rank).to(dtype))
            flat = torch.full((48,), torch.nan)
            flat[own] = sums
        if group.size == 4:
            assert torch.equal(flat[own], terms[0][own])
        assert torch.allclose(flat[own], terms[0][own])
        shown = torch.zeros(48)
        shown[own] = flat[own]
        zero.all_gather_(group, shown).wait()
        assert torch.allclose(shown, terms[0])
        texts = ranks.all_gather_text(f"{group.part()} {shown.tolist()}")
        assert sorted(texts[rank].split()[0] for rank in mine) == [str(part) for part in range(group.size)]
        assert len({texts[rank].split(" ", 1)[1] for rank in mine}) == 1
        assert ranks.experts.levels == ()

    in_group(as_world(tiny(), world, experts=experts), tmp_path, check)


def test_hosts_sum_within_themselves_before_anything_leaves_them(tmp_path: Path) -> None:
    """Two hosts of two: a third of the bytes between them less, by count of packets, and the bits of the one order."""
    length = 1 << 19

    def act(level: bool, folder: Path) -> Callable[[int], int]:
        def call(rank: int) -> int:
            with open_ranks(from_environment(os.environ), 1, CPU, 60.0) as ranks:
                group = ranks.world if level else attrs.evolve(ranks.world, levels=())
                flat = gradient(rank, length)
                zero._reduce_scatter_(group, flat, None).wait()
                zero.all_gather_(group, flat).wait()
                (folder / f"{rank}.bits").write_bytes(flat.numpy().tobytes())
            return 0

        return call

    sent: dict[bool, int] = {}
    for level in (False, True):
        folder = tmp_path / str(level)
        ends = on_hosts(2, 2, folder, act(level, folder))
        assert [end.code for end in ends] == [0] * 4, ends
        sent[level] = int((folder / SENT).read_text())
    assert 4 * length < sent[True] < 0.75 * sent[False], sent
    terms = [gradient(rank, length) for rank in range(4)]
    wanted = ((terms[0] + terms[1]) + (terms[2] + terms[3])).numpy().tobytes()
    assert {(tmp_path / "True" / f"{rank}.bits").read_bytes() == wanted for rank in range(4)} == {True}
