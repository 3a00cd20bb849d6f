"""Tasks that are scored while a model trains: when, where the scores go, and that the training does not notice."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config.sections import Config, Eval
from nmoe.effects.data import stdlib
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.effects.evals import suite
from nmoe.effects.record.names import EVALS, METRICS, WEIGHTS
from nmoe.effects.train import run
from nmoe.effects.train.generate import Network
from nmoe.effects.train.world import Judge, World
from nmoe.pure.evals.score import Score
from tests.effects.evals.test_suite import SOURCES
from tests.effects.parallel import rank_runs
from tests.effects.train import trainings
from tests.effects.train.trainings import changed, events, folder, train


def config_of(sources: Path, work: Path, name: str, steps: int, **keys: Any) -> Config:
    config = trainings.config(work, name, sources, steps)
    settings: dict[str, Any] = {"every": 2, "limit": 6, **keys}
    return attrs.evolve(config, eval=Eval(**settings))


@pytest.fixture(autouse=True)
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "held_out", lambda: SOURCES)


def judged(config: Config, how: Judge | None = None) -> World:
    return World(judge=how or suite.judging(config.eval))


def evaluations(config: Config) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder(config) / METRICS).read_text().splitlines())
    return [line for line in lines if any(name.startswith("evaluation/") for name in line)]


def test_scores_at_a_cadence_change_no_bit(sources: Path, tmp_path: Path) -> None:
    """Each two steps and at the end: in metrics with their errors, as events, and the newest in the file of scores."""
    without = config_of(sources, tmp_path, "without", 5, every=0)
    config = config_of(sources, tmp_path, "with", 5, suite="all")
    assert train(without)[0] == 0
    code, output = train(config, world=judged(config))
    assert code == 0, output
    assert (folder(config) / WEIGHTS).read_bytes() == (folder(without) / WEIGHTS).read_bytes()
    told = events(config, "evaluation")
    assert [event["step"] for event in told] == [line["step"] for line in evaluations(config)] == [2, 4, 5]
    assert not evaluations(without) and not (folder(without) / EVALS).exists()
    last, line = told[-1]["scores"], evaluations(config)[-1]
    assert {"bits/code", "choices/doctests", "probes/copy", "syntax/functions", "programs/passed"} <= set(last)
    for task, score in last.items():
        assert line[f"evaluation/{task}"] == score["value"] and line[f"evaluation_error/{task}"] == score["error"]
    kept = json.loads((folder(config) / EVALS).read_text())
    assert {task: (x["value"], x["error"], x["step"]) for task, x in kept.items()} == {
        task: (score["value"], score["error"], 5) for task, score in last.items()
    }
    assert told[0]["scores"]["bits/code"] != last["bits/code"], "of the model as it stands"
    assert "step 5" in output and "programs/passed" in output


def test_a_run_that_goes_on_has_the_scores_and_bits_of_one_that_was_never_cut(sources: Path, tmp_path: Path) -> None:
    whole, cut = (config_of(sources, tmp_path, name, 6, suite="bits") for name in ("whole", "cut"))
    assert train(whole, world=judged(whole))[0] == 0
    for steps in (4, 6):
        code, output = train(changed(cut, steps=steps), world=judged(cut))
        assert code == 0, output
    assert (folder(cut) / WEIGHTS).read_bytes() == (folder(whole) / WEIGHTS).read_bytes()
    one, two = (
        [{name: value for name, value in line.items() if name.startswith("eval")} for line in evaluations(config)]
        for config in (whole, cut)
    )
    assert one == two and [line["step"] for line in evaluations(cut)] == [2, 4, 6], "that of step 4 once"


def test_a_signal_ends_an_evaluation_and_the_next_attempt_makes_up_for_it(sources: Path, tmp_path: Path) -> None:
    config = config_of(sources, tmp_path, "stopped", 4)

    def interrupted(network: Network, tokenizer: Tokenizer, between: Callable[[], None]) -> dict[str, Score]:
        os.kill(os.getpid(), signal.SIGTERM)
        between()
        raise AssertionError("expected the signal to end the evaluation")

    code, output = train(config, world=judged(config, interrupted))
    assert code == 75, output
    assert not events(config, "evaluation") and not evaluations(config)
    assert train(config, world=judged(config))[0] == 0
    assert [line["step"] for line in evaluations(config)] == [2, 4]


def test_ranks_share_out_the_rows(sources: Path, tmp_path: Path) -> None:
    """Two ranks that hold half of the experts each have the scores of one."""
    one, two = (config_of(sources, tmp_path, name, 2, suite="bits", limit=5) for name in ("one", "two"))
    assert train(changed(one, microbatch_size=2), world=judged(one))[0] == 0
    told = rank_runs.train(rank_runs.as_world(two, 2), tmp_path / "out", dict.fromkeys(range(2), judged(two)))
    assert [code for code, _ in told] == [0, 0], told
    (mine,), (its,) = events(two, "evaluation"), events(one, "evaluation")
    assert mine["step"] == its["step"] == 2
    for task, score in its["scores"].items():
        assert math.isclose(mine["scores"][task]["value"], score["value"], rel_tol=1e-3), task
        assert mine["scores"][task]["count"] == score["count"]


def test_a_config_that_nobody_evaluates_is_refused(sources: Path, tmp_path: Path) -> None:
    config = config_of(sources, tmp_path, "nobody", 2)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="expected World.judge for a config with eval.every, got None"):
        run.main(config, {}, ("nmoe", "run"), "x")
