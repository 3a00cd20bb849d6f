"""Multi-token prediction in the step and in a run: weight, balance, metrics, checkpoints, validation, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file

from nmoe.cli import main
from nmoe.config.sections import Config, Mtp
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train import generate, resume
from nmoe.effects.train.build import fresh
from nmoe.effects.train.evaluate import evaluate
from nmoe.pure.core.key import Key
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.model import Batch
from nmoe.soak import soak
from tests.effects.train import trainings
from tests.effects.train.test_resume import checkpoint, same_end
from tests.effects.train.test_step import RT, batches, start
from tests.effects.train.tiny import tiny
from tests.effects.train.trainings import changed, folder, train


def with_mtp(config: Config, **mtp: Any) -> Config:
    return attrs.evolve(config, model=attrs.evolve(config.model, mtp=Mtp(**{"depth": 2, **mtp})))


def moment(config: Config, state: Any, path: str) -> torch.Tensor:
    pieces = {piece.name: piece.tensor for piece in resume.pieces(state, make_blueprint(config))}
    return pieces[f"param/{path}/first"].clone()


def test_the_weight_follows_the_tokens_of_the_run() -> None:
    """After the switch, to weight 0, no gradient reaches the further blocks: their moments only decay."""
    config = with_mtp(tiny(), weight=0.3, later_weight=0.0, switch_tokens=32)
    moe = attrs.evolve(config.model.moe, sequence_balance=0.0)
    config = attrs.evolve(config, model=attrs.evolve(config.model, moe=moe))
    assert config.model.mtp is not None
    assert [config.model.mtp.weight_at(tokens) for tokens in (1, 32, 33)] == [0.3, 0.3, 0.0]
    assert Mtp(depth=1).weight_at(10**15) == 0.3
    state, step = start(config)
    first, second = batches(config, 2)
    state, _ = step(state, first)
    before = moment(config, state, "mtp.1.project")
    state, _ = step(state, second)
    assert before.abs().max() > 1e-6
    beta = config.optim.dense.beta1
    torch.testing.assert_close(moment(config, state, "mtp.1.project"), before * beta, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recompute", ["none", "full", "cheap"])
def test_losses_of_each_depth_are_means_over_their_targets(recompute: Any) -> None:
    """In any split into microbatches."""
    seen: list[torch.Tensor] = []
    for size in (1, 4):
        config = changed(with_mtp(tiny(batch_size=4, microbatch_size=size)), recompute=recompute)
        (batch,) = batches(tiny(batch_size=4, microbatch_size=1), 1)
        targets = batch.targets.clone()
        targets[0] = -1
        targets[1, :, ::2] = -1
        shape = (4 // size, size, -1)
        state, step = start(config, torch.float64)
        state, metrics = step(state, Batch(batch.tokens.view(shape), targets.view(shape), ()))
        seen.append(torch.cat((metrics.mtp, metrics.loss[None], metrics.grad_norm[None])))
        assert metrics.load.shape == (4, 8) and (metrics.load.sum(1) == 4 * 16 * 2).all()
        assert (state.router_bias.abs().amax(1) > 0).all()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=0)
    # logits of deviation 1, so half a nat more than a uniform guess
    assert ((seen[0][:2] - torch.log(torch.tensor(61.0)) - 0.5).abs() < 0.15).all()


def test_validation_is_that_of_the_main_model() -> None:
    config = with_mtp(tiny())
    state, env = fresh(config, make_blueprint(config), RT)
    (batch,) = batches(config, 1)
    held = [Batch(batch.tokens[0], batch.targets[0], ())]
    lengths = torch.ones(61, dtype=torch.int64)
    bias = state.router_bias
    whole = evaluate(state.params, bias, env, config.model, held, lengths, chunk=64)
    plain = attrs.evolve(config.model, mtp=None)
    alone = evaluate(attrs.evolve(state.params, mtp=()), bias[:2], env, plain, held, lengths, chunk=64)
    assert whole == alone


def test_a_run_resumes_bit_for_bit_and_its_weights_generate_and_export(sources: Path, tmp_path: Path) -> None:
    whole = with_mtp(trainings.config(tmp_path, "whole", sources, 4), depth=1)
    whole = changed(whole, document_mask=True)
    code, told = train(whole)
    assert code == 0, told
    line = soak.metrics(folder(whole))[0]
    assert line["mtp/loss_1"] > 1 and line["experts"]["layer"] == [1, 2]
    again = changed(attrs.evolve(whole, run=attrs.evolve(whole.run, name="again")), resume=str(checkpoint(whole, 2)))
    code, told = train(again)
    assert code == 0, told
    same_end(again, whole, after=2)

    network, tokenizer = generate.open_network(folder(whole), "cpu")
    how: dict[str, Any] = {"num_tokens": 4, "sampling": Sampling(), "key": Key(0)}
    texts = [generate.texts(network, tokenizer, ["def"], **how, cached=cached) for cached in (True, False)]
    assert texts[0] == texts[1]
    paths = [str(tmp_path / name) for name in ("out", "back")]
    assert main(["export", "hf", str(folder(whole)), paths[0], "--no-verify"]) == 0
    assert main(["import", "hf", paths[0], paths[1]]) == 0
    ours, back = (load_file(path / WEIGHTS) for path in (folder(whole), tmp_path / "back"))
    assert ours.keys() == back.keys() and "mtp.0.block.attention.down" in ours
    assert all(torch.equal(ours[name], back[name]) for name in ours)

    # Another depth is another model, whatever is accepted.
    other = attrs.evolve(again, run=attrs.evolve(again.run, name="other"))
    for mtp, named in ((Mtp(depth=2), "model.mtp.depth"), (None, "model.mtp.depth")):
        code, told = train(attrs.evolve(other, model=attrs.evolve(other.model, mtp=mtp)), accept=[named])
        assert code == 2 and told.count("Traceback") == 0, told
        assert "model.mtp.depth: expected 1 as in " in told, told
