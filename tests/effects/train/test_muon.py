"""Muon in the step: over arenas as over a tree, skipped, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Config
from nmoe.effects.device import ops
from nmoe.effects.train import resume
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import State
from nmoe.pure.core import tree
from nmoe.pure.core.spec import Role
from nmoe.pure.model import model
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import objective
from nmoe.pure.optim.schedule import factor
from nmoe.pure.optim.update import tree_state, tree_update
from tests.effects.train import trainings
from tests.effects.train.test_resume import checkpoint, same_end
from tests.effects.train.test_step import RT, batches, same, start
from tests.effects.train.tiny import tiny
from tests.effects.train.trainings import changed, train


def by_muon(config: Config) -> Config:
    groups: dict[str, Any] = {
        name: attrs.evolve(getattr(config.optim, name), optimizer="muon") for name in ("dense", "expert")
    }
    return attrs.evolve(config, optim=attrs.evolve(config.optim, **groups))


@pytest.mark.parametrize("heads", [None, "apart"])
def test_arenas_are_updated_as_the_tree_is(heads: Any) -> None:
    """The gradient of each step from the parameters of the arenas; three steps, with clip and decay."""
    config = by_muon(tiny(clip_norm=0.5, q_lora_rank=None if heads else 12, lr=1e-2))
    config = attrs.evolve(config, optim=attrs.evolve(config.optim, muon_heads=heads))
    blueprint = make_blueprint(config)
    state, step = start(config)
    ours = tree.map(lambda _, leaf: leaf.detach().clone(), state.params)
    theirs = tree_state(ours, blueprint.specs, config.optim)
    _, env = fresh(config, blueprint, RT)
    for index, batch in enumerate(batches(config, 3)):
        leaves = tree.map(lambda _, leaf: leaf.clone().requires_grad_(), ours)
        flat = model.Batch(batch.tokens.flatten(0, 1), batch.targets.flatten(0, 1), ())
        loss, _, _ = objective(
            leaves,
            flat,
            state.router_bias,
            env,
            config.model,
            num_targets=torch.tensor(flat.targets.numel()),
            num_sequences=config.train.batch_size,
            chunk=config.train.loss_chunk,
        )
        loss.backward()
        grads = tree.map(lambda _, leaf: leaf.grad, leaves)
        share = factor((index + 1) * config.train.batch_size * config.train.sequence_length, config.schedule)
        ours, theirs = tree_update(ours, grads, theirs, blueprint.specs, config.optim, share=share, dims=blueprint.dims)
        state, _ = step(state, batch)
        for (path, leaf), (_, other) in zip(tree.leaves(state.params), tree.leaves(ours), strict=True):
            torch.testing.assert_close(
                leaf.detach(), other, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: path + text
            )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_parameters_updated_together_are_those_updated_one_by_one(
    monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    """Bit for bit: as kernels take all of an arena at once, here by the rule itself."""
    config = by_muon(tiny(compute=compute, lr=1e-2))

    def trained() -> list[Tensor]:
        state, step = start(config)
        for batch in batches(config, 2):
            state, _ = step(state, batch)
        return kept(state)

    alone, names = trained(), []
    one_by_one = ops.arena_ops(RT.device)

    def update_(name: str) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Tensor:
            names.append(name)
            return one_by_one.update_(name)(*arguments, **keywords)

        return run

    together = attrs.evolve(one_by_one, update_=update_, joint=True)
    monkeypatch.setattr(ops, "arena_ops", lambda *_: together)
    assert same(trained(), alone)
    assert names.count("muon") == 2 * 2, "two arenas, two steps"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_it_learns_with_one_moment_a_hidden_matrix(compute: str) -> None:
    config = by_muon(tiny(compute=compute, lr=1e-2))
    blueprint = make_blueprint(config)
    state, step = start(config)
    names = {piece.name for piece in resume.pieces(state, blueprint)}
    for path, spec in tree.leaves(blueprint.specs):
        hidden = spec.role in (Role.MATRIX, Role.SHARED, Role.EXPERT)
        kinds = {name.removeprefix(f"param/{path}/") for name in names if name.startswith(f"param/{path}/")}
        assert kinds - {"value", "remainder"} == ({"momentum"} if hidden else {"first", "second"}), path
    losses: list[float] = []
    for batch in batches(config, 1) * 12:
        state, metrics = step(state, batch)
        losses.append(metrics.loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    config = by_muon(tiny())
    state, step = start(config)
    first, second = batches(config, 2)
    state, _ = step(state, first)
    before = kept(state)
    state.arenas[0].gradient[3] = float("nan")
    state, metrics = step(state, second)
    assert int(metrics.skipped) == 1
    assert same(kept(state), before)


def kept(state: State) -> list[Tensor]:
    """Copies of what an update changes."""
    moved = (state.router_bias, *(moment for arena in state.arenas for moment in arena.moments))
    return [leaf.detach().clone() for leaf in (*(leaf for _, leaf in tree.leaves(state.params)), *moved)]


def test_a_resumed_training_ends_as_one_that_never_stopped(sources: Path, tmp_path: Path) -> None:
    """And with another update rule it is another training, whatever is accepted."""
    whole = by_muon(trainings.config(tmp_path, "whole", sources, 6))
    assert train(whole)[0] == 0
    again = attrs.evolve(whole, run=attrs.evolve(whole.run, name="again"))
    again = changed(again, resume=str(checkpoint(whole, 3)))
    code, told = train(again)
    assert code == 0, told
    same_end(again, whole, after=3)
    plain = attrs.evolve(again, optim=trainings.config(tmp_path, "plain", sources, 6).optim)
    code, told = train(attrs.evolve(plain, run=attrs.evolve(plain.run, name="plain")))
    assert code == 2 and 'optim.dense.optimizer: expected "muon" as in ' in told, told
