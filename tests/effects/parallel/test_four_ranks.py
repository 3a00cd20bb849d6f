"""One, two and four ranks train with the same bits: Muon, quantile balancing and multi-token prediction together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nmoe.config.sections import Config, Mtp
from nmoe.effects.train import run
from nmoe.pure.model.model import Batch
from tests.effects.parallel.rank_runs import as_world, train
from tests.effects.parallel.test_ranks import STEPS, config_of, digests, losses

SEQUENCES = 4


def whole(sources: Path, work: Path, name: str, **balance: Any) -> Config:
    """Everything that ranks share out: matrices, histograms, further blocks. No loss but those of the targets."""
    config = config_of(sources, work, name)
    moe = attrs.evolve(config.model.moe, sequence_balance=0.0, **balance)
    group = attrs.evolve(config.optim.dense, optimizer="muon")
    return attrs.evolve(
        config,
        model=attrs.evolve(config.model, moe=moe, mtp=Mtp(depth=1)),
        optim=attrs.evolve(config.optim, dense=group, expert=group),
    )


def halved(rank: int, world: int) -> run.World:
    """Every other sequence of a step has no target, so that a gradient is a sum of two: rounded once in any order."""

    def wrapped(read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        def half(cursor: int) -> Batch:
            batch = read(cursor)
            own = batch.targets.shape[0]
            number = torch.arange(rank * own, (rank + 1) * own)
            return attrs.evolve(batch, targets=batch.targets.masked_fill((number % 2 == 0)[:, None, None], -1))

        return half

    return run.World(read=wrapped)


@pytest.mark.parametrize("balance", ["quantile", "sign"])
def test_one_two_and_four_ranks_have_the_same_bits(balance: str, sources: Path, tmp_path: Path) -> None:
    folders: list[Path] = []
    for world in (1, 2, 4):
        config = whole(sources, tmp_path, f"of-{world}", balance=balance)
        worlds = {rank: halved(rank, world) for rank in range(world)}
        told = train(as_world(config, world, experts=1), tmp_path / f"{world}.out", worlds)
        assert [code for code, _ in told] == [0] * world, told
        folders.append(tmp_path / "runs" / f"of-{world}")
    one, *others = folders
    assert len(losses(one)) == STEPS
    for other in others:
        assert losses(other) == losses(one)
        for step in range(1, STEPS + 1):
            assert digests(other, step) == digests(one, step), (other.name, step)
    moved = {name for name, digest in digests(one, 1).items() if digest != digests(one, STEPS)[name]}
    assert {"router_bias", "param/blocks.1.ffn.up/momentum", "param/mtp.0.project/value"} <= moved
