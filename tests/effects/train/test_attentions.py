"""Runs of every kind of attention: a checkpoint resumes bit for bit, stages of the run included."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.test_resume import checkpoint, same_end
from tests.effects.train.tiny import with_attention
from tests.effects.train.trainings import changed, folder, train


@pytest.mark.parametrize("attention", ["kda, nsa, dsa", "gqa, kda"])
def test_a_run_resumes_bit_for_bit(attention: str, sources: Path, tmp_path: Path) -> None:
    """Steps 1 and 2 are the dense stage of the sparse kind; the resumed attempt begins in it and leaves it."""
    config = changed(trainings.config(tmp_path, "whole", sources, 4), document_mask=True)
    model = attrs.evolve(config.model, num_layers=3)
    whole = with_attention(attrs.evolve(config, model=model), attention)
    code, told = train(whole)
    assert code == 0, told
    for step in (1, 3):
        name = f"from {step}"
        again = attrs.evolve(whole, run=attrs.evolve(whole.run, name=name))
        code, told = train(changed(again, resume=str(checkpoint(whole, step))))
        assert code == 0, told
        same_end(again, whole, after=step)
    assert len({line["loss"] for line in soak.metrics(folder(whole)) if "loss" in line}) == 4
