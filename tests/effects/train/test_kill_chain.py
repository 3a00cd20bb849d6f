"""Kills inside saves and between them, one after the other: the end is that of a training nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config.sections import Config
from nmoe.pure.watch.metrics import is_timed
from nmoe.soak import soak
from tests.effects.parallel import rank_runs
from tests.effects.train import trainings
from tests.effects.train.kill_chain import chain
from tests.effects.train.trainings import folder

EVERY = {"inside": 1, "between": 3}  # steps between two saves


@pytest.mark.parametrize(
    ("where", "world", "kills"),
    [
        ("inside", 1, 3),
        ("between", 2, 3),
        *(pytest.param(where, world, 200, marks=pytest.mark.long) for where in EVERY for world in (1, 2)),
    ],
)
def test_killed_again_and_again(sources: Path, tmp_path: Path, where: Any, world: int, kills: int) -> None:
    steps = 2 * kills + 8
    rough = trainings.config(tmp_path, "rough", sources, steps, every=EVERY[where], keep_last=2)
    rough = rank_runs.as_world(rough, world)
    calm = attrs.evolve(rough, run=attrs.evolve(rough.run, name="calm"))
    calm = attrs.evolve(calm, checkpoint=attrs.evolve(calm.checkpoint, every=0))
    chain(calm, tmp_path, where, kills=0, seed=0)
    counts = chain(rough, tmp_path, where, kills, seed=world)
    print(f"{where} saves, {world} ranks: {counts}")
    assert counts.hit == kills and counts.late <= kills
    assert soak.differences(folder(calm), folder(rough)) == []
    for rank in range(1, world):
        assert untimed(calm, rank) == untimed(rough, rank)


def untimed(config: Config, rank: int) -> list[dict[str, Any]]:
    """What a rank other than the first logs of itself, without what a clock measured."""
    lines = (folder(config) / f"metrics.rank{rank}.jsonl").read_text().splitlines()
    return [{key: value for key, value in each.items() if not is_timed(key)} for each in map(json.loads, lines)]
