"""Spikes in the step and in a run: nothing moves, tokens count, it is reported, and a resume knows what came before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Config
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.train import resume, run
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.optim.spikes import nothing
from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.test_resume import checkpoint, same_end
from tests.effects.train.test_step import batches, same, start
from tests.effects.train.tiny import tiny
from tests.effects.train.trainings import changed, events, folder, train

DEVIATIONS = 20.0


def filled(state: Any, loss: float = 4.6, norm: float = 1.0) -> Any:
    """As after many steps of about this loss and gradient norm."""
    wave = 1 + 0.01 * torch.linspace(0, 40, state.recent.shape[1]).sin()
    return attrs.evolve(state, recent=torch.stack((loss * wave, norm * wave)))


def moved(state: Any, config: Config) -> list[Tensor]:
    """Copies of all that an update changes."""
    pieces = resume.pieces(state, make_blueprint(config))
    return [piece.tensor.clone() for piece in pieces if piece.name not in ("recent", "spikes")]


@pytest.mark.parametrize("row", ["loss", "norm"])
def test_a_spike_changes_nothing_but_is_counted(row: str) -> None:
    config = changed(tiny(), skip_spikes=DEVIATIONS)
    first, second = batches(config, 2)
    state, step = start(config)
    # the step's own loss is 4.6 and its norm 1 to 2: a window far below one of them
    state = filled(state, **({"loss": 1.0, "norm": 50.0} if row == "loss" else {"loss": 50.0, "norm": 0.01}))
    before = moved(state, config)
    state, metrics = step(state, first)
    assert same(before, moved(state, config)), "parameters, moments, bias and counters stay"
    assert (int(metrics.spikes), int(metrics.skipped), float(metrics.update_norm)) == (1, 0, 0.0)
    assert (state.step, state.tokens, state.cursor) == (1, 32, 2)
    seen = torch.stack((metrics.loss, metrics.grad_norm))
    assert torch.equal(state.recent[:, -1], seen), "remembered, so that another level becomes the usual one"
    state, metrics = step(filled(state, loss=50.0, norm=50.0), second)
    assert int(metrics.spikes) == 1 and float(metrics.update_norm) > 0


def test_without_the_key_and_before_enough_steps_nothing_is_skipped() -> None:
    config = tiny()
    state, step = start(config)
    assert state.recent == (), "norms round otherwise on other numbers of ranks, and a checkpoint without them does not"
    config = changed(tiny(), skip_spikes=0.001)
    state, step = start(config)
    for batch in batches(config, 5):
        state, metrics = step(state, batch)
        assert int(metrics.spikes) == 0 and float(metrics.update_norm) > 0


def test_a_step_that_is_not_finite_or_has_no_target_is_not_remembered() -> None:
    config = changed(tiny(), skip_spikes=DEVIATIONS)
    state, step = start(config)
    first, second = batches(config, 2)
    before = nothing()
    state.arenas[0].gradient[3] = float("nan")
    state, metrics = step(state, first)
    state, _ = step(state, attrs.evolve(second, targets=torch.full_like(second.targets, -1)))
    assert (
        isinstance(state.recent, Tensor)
        and torch.equal(state.recent, before)
        and int(metrics.spikes) == 0
        and int(metrics.skipped) == 1
    )


def test_a_gradient_that_is_infinite_is_no_spike_too() -> None:
    """However full the window: the step counts as one that is not finite, and alone as that."""
    config = changed(tiny(), skip_spikes=DEVIATIONS)
    state, step = start(config)
    state = filled(state)
    window = state.recent.clone()
    state.arenas[0].gradient[3] = float("inf")
    state, metrics = step(state, batches(config, 1)[0])
    assert (int(metrics.spikes), int(metrics.skipped)) == (0, 1) and torch.equal(state.recent, window)


def loud(step: int) -> Any:
    """The loss of one step, times 1000."""

    def change(env: Any) -> Any:
        calls = 0

        def loss(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            nonlocal calls
            total, nll = env.ops.linear_cross_entropy(*arguments, **named)
            calls += int(torch.is_grad_enabled())
            return total, nll * (1000.0 if calls == 2 * step else 1.0)  # two microbatches a step

        return attrs.evolve(env, ops=attrs.evolve(env.ops, linear_cross_entropy=loss))

    return run.World(env=change)


STEPS, SPIKE = 44, 40


def test_a_run_reports_it_and_resumes_bit_for_bit(sources: Path, tmp_path: Path) -> None:
    """From between the beginning and the spike: the window is in the checkpoint, and decides as it would have."""
    config = changed(trainings.config(tmp_path, "whole", sources, STEPS, every=20), skip_spikes=50.0)
    config = attrs.evolve(config, validation=attrs.evolve(config.validation, every=STEPS))
    code, told = train(config, world=loud(SPIKE))
    assert code == 0, told
    lines = [line for line in soak.metrics(folder(config)) if "loss" in line]
    assert [line["spike_steps"] for line in lines if line["step"] in (SPIKE - 1, SPIKE, STEPS)] == [0, 1, 1]
    (event,) = events(config, "spike")
    assert (event["step"], event["new"]) == (SPIKE, 1)
    assert [each["message"] for each in events(config, "alert") if each["rule"] == "skipped_spike"] == [
        "steps skipped as spikes: 1, so far 1"
    ]
    again = attrs.evolve(config, run=attrs.evolve(config.run, name="again"))
    again = changed(again, resume=str(checkpoint(config, 20)))
    code, told = train(again, world=loud(SPIKE - 20))
    assert code == 0, told
    same_end(again, config, after=20)


def test_a_checkpoint_from_before_spikes_goes_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched on in the middle, from a checkpoint without a window, and off again."""
    config = trainings.config(tmp_path, "old", sources, 3)
    pieces = resume.pieces

    def older(*given: Any, **named: Any) -> list[Any]:
        return [piece for piece in pieces(*given, **named) if piece.name not in resume.SPIKES]

    with monkeypatch.context() as patched:
        patched.setattr(resume, "pieces", older)
        code, told = train(config)
    assert code == 0, told
    (entry, *_) = reader.entries(Disk(), folder(config) / "checkpoints")
    assert entry.manifest is not None and "recent" not in entry.manifest.tensors
    new = changed(config, steps=5, skip_spikes=8.0)
    code, told = train(new, accept=["train.skip_spikes"])
    assert code == 0, told
    (entry, *_) = reader.entries(Disk(), folder(config) / "checkpoints")
    assert entry.manifest is not None and entry.manifest.step == 5 and "recent" in entry.manifest.tensors
    code, told = train(changed(config, steps=6), accept=["train.skip_spikes"])
    assert code == 0, told
    (entry, *_) = reader.entries(Disk(), folder(config) / "checkpoints")
    assert entry.manifest is not None and entry.manifest.step == 6 and "recent" not in entry.manifest.tensors
    assert json.loads((folder(config) / "run.json").read_text())["status"] == "finished"
