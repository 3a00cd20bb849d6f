"""What a plan says of memory is what a training allocates, for every shipped config and any number of ranks."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config import load
from nmoe.effects.device import buffers
from nmoe.pure.cost.plan import plan
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.parallel.slots import slots
from tests.configs import ROOT

PRESETS = ("dsv2", "dsv3", "gpt-oss-20b", "moonlet", "moonlet-16b", "moonlight", "quickstart")


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize(("world", "expert_ranks"), [(1, 1), (8, 1), (8, 8), (256, 2), (256, 32)])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_is_what_a_training_allocates(preset: str, world: int, expert_ranks: int, batch: int) -> None:
    """A step of 256 microbatches sums its gradients in fp32 also where 256 ranks compute one each."""
    config = load(ROOT / "configs" / f"{preset}.toml", {}, ()).config
    train = attrs.evolve(config.train, microbatch_size=1, batch_size=batch)
    config = attrs.evolve(config, train=train, precision=attrs.evolve(config.precision, compute="bf16"))
    blueprint = make_blueprint(config, world, expert_ranks if config.model.moe.num_experts % expert_ranks == 0 else 2)
    arenas = buffers.allocate(blueprint, torch.device("meta"))
    memory = plan(config, blueprint, mfu=0.4).memory
    assert memory.parameters == sum(arena.value.nbytes for arena in arenas)
    assert memory.gradients == sum(arena.gradient.nbytes for arena in arenas)
    assert memory.moments == sum(moment.nbytes for arena in arenas for moment in arena.moments)
    assert memory.remainders == sum(arena.remainder.nbytes for arena in arenas if isinstance(arena.remainder, Tensor))
    if batch > 1:
        assert all(arena.gradient.dtype is torch.float32 for arena in arenas)
        assert memory.gradients == 4 * sum(arena.value.numel() for arena in arenas)


@pytest.mark.parametrize(
    ("ranks", "experts", "groups"), [(1, 1, []), (2, 2, [2]), (2, 1, [2]), (4, 2, [4, 2]), (16, 8, [])]
)
def test_memory_to_land_in_is_that_of_the_groups_of_one_host(ranks: int, experts: int, groups: list[int]) -> None:
    """Of all ranks, and of those with the same experts where they are fewer."""
    override = [f"--parallel.ranks={ranks}", "--train.batch_size=128"]
    config = load(ROOT / "configs" / "moonlet.toml", {}, override).config
    memory = plan(config, make_blueprint(config, ranks, experts), mfu=0.4).memory
    assert memory.landing == sum(slots(size).allocated() for size in groups)
    assert all(slots(size).allocated() > slots(size).areas.size() == 4 * 2**26 for size in groups)


def test_deepseek_v3_on_256_gpus() -> None:
    """93.0 GB of gradients, where a plan that counted the microbatches of one rank said 46.7 GB and "fits"."""
    config = load(ROOT / "configs" / "dsv3.toml", {}, ()).config
    memory = plan(config, make_blueprint(config, 256, 128), mfu=0.4).memory
    assert memory.gradients == 93_022_978_048
    assert memory.total() == pytest.approx(171.1e9, rel=1e-3)
