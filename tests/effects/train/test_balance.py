"""Quantile balancing in the step: the global batch, skipped steps, and a load that is evener than by sign steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

from nmoe.config.sections import Config
from nmoe.effects.train.build import fresh
from nmoe.effects.train.evaluate import evaluate
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch, objective
from nmoe.pure.model.route import health
from tests.effects.train.test_step import RT, batches, start
from tests.effects.train.tiny import tiny


def balanced(balance: Any, rate: float | None = None, **sizes: Any) -> Config:
    config = tiny(**sizes)
    moe = attrs.evolve(config.model.moe, balance=balance, bias_update_rate=rate)
    return attrs.evolve(config, model=attrs.evolve(config.model, moe=moe))


def chain(config: Config, num: int) -> Iterator[Batch]:
    """Batches of one microbatch from a fixed Markov chain over the vocabulary, which a router can tell apart."""
    generator = torch.Generator().manual_seed(0)
    size, train = config.model.vocab_size, config.train
    table = torch.randn(size, size, generator=generator).mul(2).softmax(-1)
    for _ in range(num):
        rows = [torch.randint(size, (train.batch_size,), generator=generator)]
        for _ in range(train.sequence_length):
            rows.append(torch.multinomial(table[rows[-1]], 1, generator=generator)[:, 0])
        drawn = torch.stack(rows, 1)[None]
        yield Batch(drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous(), ())


def busiest(balance: str, rate: float | None = None) -> float:
    """Load of the busiest expert over the mean in the worse layer, mean over the last 20 of 30 steps."""
    config = balanced(balance, rate, batch_size=32, microbatch_size=32, lr=8e-3, steps=30, sequence_length=32)
    state, step = start(config)
    seen: list[float] = []
    for batch in chain(config, 30):
        state, metrics = step(state, batch)
        seen.append(float(health(metrics.load).max_over_mean.max()))
    return sum(seen[10:]) / 20


def test_load_is_evener_than_by_sign_steps_of_a_long_run() -> None:
    """By quantiles, and by sign steps of a run as short as this one."""
    assert busiest("quantile") < 1.4 and busiest("sign") < 1.5
    assert busiest("sign", 0.001) > 1.7


@pytest.mark.parametrize(
    ("steps", "given", "wanted"),
    [(20, None, 0.01), (350, None, 0.01), (700, None, 0.005), (3500, None, 0.001), (10**6, None, 0.001)]
    + [(700, 0.0, 0.0), (700, 0.02, 0.02)],
)
def test_a_sign_step_is_that_of_the_run_unless_the_config_has_one(
    steps: int, given: float | None, wanted: float
) -> None:
    """After one step the biases of the least and the most loaded expert are two steps apart."""
    config = balanced("sign", given, steps=steps)
    state, step = start(config)
    (batch,) = batches(config, 1)
    state, _ = step(state, batch)
    apart = state.router_bias.amax(-1) - state.router_bias.amin(-1)
    assert apart.tolist() == pytest.approx([2 * wanted] * len(apart), rel=1e-5)


def test_the_bias_is_that_of_the_whole_batch_however_it_is_cut() -> None:
    """Counts are integers; the first step's scores are those of the same parameters."""
    whole = balanced("quantile", batch_size=4, microbatch_size=4)
    parts = balanced("quantile", batch_size=4, microbatch_size=1)
    (batch,) = batches(whole, 1)
    rows = Batch(batch.tokens[0][:, None], batch.targets[0][:, None], ())
    found = []
    for config, given in ((whole, batch), (parts, rows)):
        state, step = start(config, torch.float64)
        found.append(step(state, given)[0].router_bias)
    assert found[0].abs().max() > 0.001
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrong", ["nan", "targets"])
def test_a_step_that_is_skipped_leaves_the_bias(wrong: str) -> None:
    config = balanced("quantile")
    state, step = start(config)
    first, second = batches(config, 2)
    state, _ = step(state, first)
    before = state.router_bias.clone()
    if wrong == "nan":
        state.arenas[0].gradient[3] = float("nan")
    else:
        second = attrs.evolve(second, targets=torch.full_like(second.targets, -1))
    state, _ = step(state, second)
    assert torch.equal(state.router_bias, before) and before.abs().max() > 0
    state, _ = step(state, first)
    assert not torch.equal(state.router_bias, before)


@pytest.mark.parametrize("balance", ["sign", "quantile"])
def test_a_validation_chooses_by_the_bias_of_the_training_and_leaves_it(balance: str) -> None:
    """Its loss is that of a step with the same bias, and not that of a step without one."""
    config = balanced(balance)
    state, env = fresh(config, make_blueprint(config), RT)
    (batch,) = batches(config, 1)
    one = Batch(batch.tokens[0], batch.targets[0], ())
    lengths = torch.ones(config.model.vocab_size, dtype=torch.int64)
    numbers: dict[str, Any] = {"num_targets": torch.tensor(one.targets.numel()), "num_sequences": 2, "chunk": 64}
    losses: list[float] = []
    for bias in (torch.zeros_like(state.router_bias), torch.linspace(-1, 1, 16).view(2, 8)):
        kept = bias.clone()
        held = evaluate(state.params, bias, env, config.model, [one], lengths, chunk=64)
        _, nll, _ = objective(state.params, one, bias, env, config.model, **numbers)
        assert torch.equal(bias, kept) and held.loss == pytest.approx(nll.item() / one.targets.numel(), rel=1e-6)
        losses.append(held.loss)
    assert abs(losses[0] - losses[1]) > 1e-4
