"""A training whose routed experts multiply in fp8, MXFP8 or NVFP4: it learns as in bf16, and nothing else changes."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from nmoe.config import sections as s
from nmoe.effects.data.loader import open_stream
from nmoe.effects.device.process import Runtime
from nmoe.effects.train.build import emulated, fresh
from nmoe.effects.train.step import State, make_step
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.data.stages import single_source
from nmoe.pure.model.blueprint import make_blueprint
from tests.effects.train.tiny import tiny
from tests.golden.curve import Tokens

STEPS = 20


def config(compute: Any) -> s.Config:
    """One block of experts, whose sizes every format takes."""
    c = tiny(batch_size=8, microbatch_size=4, lr=3e-3, steps=STEPS)
    moe = attrs.evolve(c.model.moe, num_experts=4, intermediate_size=128)
    model = attrs.evolve(c.model, hidden_size=128, num_layers=1, num_dense_layers=0, moe=moe)
    schedule = s.Schedule(warmup_tokens=256, hold_tokens=100_000, decay_tokens=0)
    return attrs.evolve(
        c,
        model=model,
        schedule=schedule,
        precision=s.Precision(compute=compute, emulate=compute not in ("fp32", "bf16")),
    )


@functools.lru_cache(8)
def train(compute: str, steps: int = STEPS) -> tuple[tuple[float, ...], State]:
    """Loss of every step, and the last state."""
    c = config(compute)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(c)
    state, env = fresh(c, blueprint, rt)
    stream = np.resize(np.arange(60, dtype=np.uint16) * 7 % 60, 4000)  # a token says the next one
    source = Tokens(tokens=(stream,), num_tokens=len(stream))
    windows = (source.num_tokens - 1) // c.train.sequence_length
    read = open_stream(
        [source],
        single_source(windows, 8 * STEPS, content=""),
        batch_size=8,
        microbatch_size=4,
        sequence_length=c.train.sequence_length,
        rank=0,
        world=1,
        key=Key(c.run.seed).fold("data"),
    )
    step = make_step(c, blueprint, env, rt, mark=lambda name: None)
    losses: list[float] = []
    for _ in range(steps):
        state, metrics = step(state, read(state.cursor))
        losses.append(metrics.loss.item())
    return tuple(losses), state


@pytest.mark.parametrize(("compute", "bar"), [("fp8", 0.04), ("mxfp8", 0.04), ("nvfp4", 0.08)])
def test_the_loss_follows_bf16(compute: str, bar: float) -> None:
    losses, _ = train(compute)
    wide, _ = train("bf16")
    assert wide[-1] < 0.1 * wide[0], "it learns"
    assert losses != wide, "it is not the same computation"
    assert sum(abs(low - high) for low, high in zip(losses, wide, strict=True)) / STEPS < bar, "nats, on average"


def test_the_same_training_twice_has_the_same_bits() -> None:
    """Stochastic rounding comes from a key: there is no generator to restore."""
    first, state = train("nvfp4", 5)
    train.cache_clear()
    again, other = train("nvfp4", 5)
    assert first == again
    for (path, one), (_, two) in zip(tree.leaves(state.params), tree.leaves(other.params), strict=True):
        assert torch.equal(one, two), path


def test_the_noise_follows_the_seed_of_the_run() -> None:
    def drawn(seed: int) -> torch.Tensor:
        c = config("nvfp4")
        low = emulated(attrs.evolve(c, run=attrs.evolve(c.run, seed=seed)))
        assert low is not None
        generator = torch.Generator().manual_seed(0)
        x, up, down = (torch.randn(*shape, generator=generator) for shape in ((32, 128), (128, 2, 128), (128, 128)))
        y = low.shared(x.requires_grad_(), up, down)
        return torch.autograd.grad(y, x, torch.ones_like(y) / 3)[0]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert emulated(config("bf16")) is None


def test_parameters_lie_in_memory_as_in_bf16() -> None:
    """So checkpoints, weights files and the optimizer are the same."""
    assert make_blueprint(config("fp8")).layouts == make_blueprint(config("bf16")).layouts
    one, two = (fresh_values(compute) for compute in ("nvfp4", "bf16"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def fresh_values(compute: str) -> list[torch.Tensor]:
    c = config(compute)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    state, _ = fresh(c, make_blueprint(c), rt)
    return [leaf for _, leaf in tree.leaves(state.params)]
