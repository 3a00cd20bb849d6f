"""QK-clip in the step: it holds the limit, changes nothing below it, and is the same over microbatches and ranks."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from nmoe.config.sections import Config, Mtp
from nmoe.effects.train import resume
from nmoe.effects.train.build import fresh
from nmoe.effects.train.qk_clip import Scores
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch, objective
from tests.effects.train.test_muon import by_muon
from tests.effects.train.test_step import RT, batches, same, snapshot, start
from tests.effects.train.tiny import tiny
from tests.effects.train.trainings import changed


def limited(limit: float | None, **sizes: Any) -> Config:
    """Learning rates that move nothing, so that only the clip does."""
    config = tiny(lr=1e-30, **sizes)
    config = attrs.evolve(config, model=attrs.evolve(config.model, mtp=Mtp(depth=1)))
    return attrs.evolve(config, optim=attrs.evolve(config.optim, qk_clip=limit, weight_decay=0.0))


def scores(config: Config, state: Any, batch: Batch) -> torch.Tensor:
    """[L H], of the state's weights."""
    _, env = fresh(config, make_blueprint(config), RT)
    seen = Scores()
    env = attrs.evolve(env, ops=seen.noting(env.ops))
    numbers: dict[str, Any] = {"num_targets": torch.tensor(1), "num_sequences": 1, "chunk": 64}
    for index in range(batch.tokens.shape[0]):
        seen.begin(first=index == 0)
        one = Batch(batch.tokens[index], batch.targets[index], ())
        objective(state.params, one, state.router_bias, env, config.model, **numbers)
        seen.end()
    assert seen._largest is not None
    return seen._largest.detach()


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize(("size", "recompute"), [(4, "none"), (1, "full")])
def test_the_first_layer_holds_the_limit(compute: str, rank: int | None, size: int, recompute: Any) -> None:
    sizes: dict[str, Any] = {"compute": compute, "q_lora_rank": rank, "batch_size": 4, "microbatch_size": size}
    config = changed(limited(0.5, **sizes), recompute=recompute)
    (batch,) = batches(config, 1)
    state, step = start(config)
    before = scores(config, state, batch)
    assert before.shape == (4, 2) and (before[0] > 0.6).all()
    state, _ = step(state, batch)
    after = scores(config, state, batch)
    torch.testing.assert_close(after[0], torch.full((2,), 0.5), rtol=1e-4 if compute == "fp32" else 2e-2, atol=0)
    assert (after[1:] < before[1:]).all(), "later layers and the block of multi-token prediction too"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_below_the_limit_no_bit_changes_and_a_skipped_step_clips_nothing(compute: str) -> None:
    states: list[Any] = []
    for limit in (None, 1e6):
        config = by_muon(limited(limit, compute=compute, q_lora_rank=12))
        state, step = start(attrs.evolve(config, optim=attrs.evolve(config.optim, dense=by_muon(tiny()).optim.dense)))
        for batch in batches(config, 2):
            state, _ = step(state, batch)
        states.append(snapshot(state))
    assert same(*states)
    config = limited(0.1, compute=compute)
    state, step = start(config)
    before = [piece.tensor.clone() for piece in resume.pieces(state, make_blueprint(config)) if "/" in piece.name]
    state.arenas[0].gradient[3] = float("nan")
    state, metrics = step(state, batches(config, 1)[0])
    assert int(metrics.skipped) == 1
    after = [piece.tensor for piece in resume.pieces(state, make_blueprint(config)) if "/" in piece.name]
    assert same(before, after)
