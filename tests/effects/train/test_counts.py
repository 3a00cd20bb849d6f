"""Tokens are counted, not computed from settings that a resumed run may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config.sections import Config, Schedule
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.train import resume
from nmoe.pure.optim.schedule import factor
from nmoe.soak import soak
from tests.effects.parallel import rank_runs
from tests.effects.train import trainings
from tests.effects.train.trainings import changed, folder, train

STEPS, MORE = 4, 6
LENGTH = 16


def config_of(sources: Path, work: Path, **train: Any) -> Config:
    """Four sequences of 16 tokens a step; the rate falls from the first step on, and every count has another one."""
    config = changed(
        trainings.config(work, "counts", sources, STEPS), **{"batch_size": 4, "microbatch_size": 1, **train}
    )
    schedule = Schedule(warmup_tokens=0, hold_tokens=0, decay_tokens=4096, floor=0.0)
    log = attrs.evolve(config.log, every=1)
    return attrs.evolve(config, schedule=schedule, log=log, checkpoint=attrs.evolve(config.checkpoint, every=2))


def steps_of(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics that tell a step."""
    return [line for line in soak.metrics(folder(config)) if "loss" in line]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"batch_size": 8}, [64, 128, 192, 256, 384, 512]),
        ({"batch_size": 2}, [64, 128, 192, 256, 288, 320]),
        ({"sequence_length": 8}, [64, 128, 192, 256, 288, 320]),
        ({"sequence_length": 8, "batch_size": 12}, [64, 128, 192, 256, 352, 448]),
    ],
)
def test_tokens_and_rate_follow_what_was_read(
    sources: Path, tmp_path: Path, change: dict[str, int], counts: list[int]
) -> None:
    config = config_of(sources, tmp_path)
    assert train(config)[0] == 0
    longer = changed(config, steps=MORE, **change)
    code, output = train(longer, accept=[f"train.{key}" for key in change])
    assert code == 0, output
    lines = steps_of(config)
    assert [line["tokens_global"] for line in lines] == counts
    assert [line["tokens_local"] for line in lines] == counts
    assert [line["lr/dense"] for line in lines] == [config.optim.dense.lr * factor(n, config.schedule) for n in counts]
    assert soak.newest(folder(config)).meta[resume.TOKENS] == [counts[-1]]

    # and once more, with the settings of the beginning: what was counted under the others stays counted
    code, output = train(changed(config, steps=MORE + 1), accept=[f"train.{key}" for key in change])
    assert code == 0, output
    assert steps_of(config)[-1]["tokens_global"] == counts[-1] + 4 * LENGTH


def test_each_rank_counts_what_it_read(sources: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then two again; every rank's count goes on where it was."""
    config = config_of(sources, tmp_path)
    found: list[tuple[list[int], list[int]]] = []
    for steps, world in ((4, 2), (6, 1), (8, 2)):
        part = changed(config, steps=steps)
        done = rank_runs.train(rank_runs.as_world(part, world, experts=1), tmp_path / f"{steps}.out")
        assert [code for code, _ in done] == [0] * world, done
        counts = soak.newest(folder(config)).meta[resume.TOKENS]
        last = steps_of(config)[-1]
        found.append((counts, [last["tokens_global"], last["tokens_local"]]))
    assert found == [([128, 128], [256, 128]), ([256, 128], [384, 256]), ([320, 192], [512, 320])]
    own = map(json.loads, (folder(config) / "metrics.rank1.jsonl").read_text().splitlines())
    assert [line["tokens_local"] for line in own] == [32, 64, 96, 128, 160, 192]


def test_ranks_of_an_attempt_share_what_it_reads() -> None:
    assert resume.count_tokens((), 96, 2) == (48, 48)
    assert resume.count_tokens((48, 48), 128, 1) == (80, 48)
    assert resume.count_tokens((80, 48), 168, 4) == (90, 58, 10, 10)


@pytest.mark.parametrize("counts", [None, 64, [64, -1], [64.0], [True]])
def test_a_checkpoint_without_the_count_is_refused(sources: Path, tmp_path: Path, counts: Any) -> None:
    """An older one has `tokens`, computed from the settings of its last attempt: it may be wrong."""
    config = config_of(sources, tmp_path)
    assert train(changed(config, steps=2))[0] == 0
    (path,) = (folder(config) / "checkpoints").glob("step-00000002.*")
    manifest = soak.newest(folder(config))
    meta = {key: value for key, value in manifest.meta.items() if key != resume.TOKENS}
    meta |= {"tokens": 128} if counts is None else {resume.TOKENS: counts}
    (path / manifests.FILE).write_bytes(manifests.to_bytes(attrs.evolve(manifest, meta=meta)))
    code, output = train(config)
    assert code == 2 and "step 2: expected 'tokens_by_rank' in the checkpoint of a training, got" in output
    assert "train.warm_start" in output
