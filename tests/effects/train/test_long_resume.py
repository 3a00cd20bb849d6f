"""What takes minutes: every step as a place to go on from, hundreds of kills, a thousand faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from nmoe.effects.record.names import WEIGHTS
from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.trainings import changed, folder, train

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
STEPS = 64


def test_from_every_step_of_a_run(sources: Path, tmp_path: Path) -> None:
    whole = trainings.config(tmp_path, "whole", sources, STEPS)
    assert train(whole)[0] == 0
    lines = soak.metrics(folder(whole))
    end = soak.newest(folder(whole))
    for step in range(1, STEPS):
        source = next((folder(whole) / "checkpoints").glob(f"step-{step:08d}.*"))
        again = attrs.evolve(whole, run=attrs.evolve(whole.run, name=f"from-{step}"))
        again = attrs.evolve(again, checkpoint=attrs.evolve(again.checkpoint, every=0))
        code, told = train(changed(again, resume=str(source)))
        assert code == 0, told
        assert soak.metrics(folder(again)) == [line for line in lines if line["step"] > step], step
        assert soak.newest(folder(again)).tensors == end.tensors, step
        assert (folder(again) / WEIGHTS).read_bytes() == (folder(whole) / WEIGHTS).read_bytes()


def test_from_every_step_of_a_run_that_two_processes_save(tmp_path: Path) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.effects.parallel.two_ranks"]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [each.communicate(timeout=600)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    assert all(each.endswith("held\n") for each in told), told


def test_two_hundred_kills(tmp_path: Path) -> None:
    kinds = ("kill", "kill in a save", "terminate", "user signal")
    outcome = soak.soak(tmp_path, steps=320, faults=200, seed=3, kinds=kinds)
    assert outcome.problems == ()
    assert outcome.struck == {kind: 50 for kind in kinds}


def test_a_thousand_faults(tmp_path: Path) -> None:
    outcome = soak.soak(tmp_path, steps=2000, faults=1234, seed=7)
    assert outcome.problems == ()
    assert sum(outcome.struck.values()) >= 1200 and len(outcome.struck) == 19
