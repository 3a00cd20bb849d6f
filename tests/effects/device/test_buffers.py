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
    """Gradients are fp32 where a rank has several microbatches; else the sums over ranks are."""
    config = load(ROOT / "configs" / f"{preset}.toml", {}, ()).config
    train = attrs.evolve(config.train, microbatch_size=1, batch_size=batch)
    config = attrs.evolve(config, train=train, precision=attrs.evolve(config.precision, compute="bf16"))
    blueprint = make_blueprint(config, world, expert_ranks if config.model.moe.num_experts % expert_ranks == 0 else 2)
    arenas = buffers.allocate(blueprint, torch.device("meta"))
    memory = plan(config, blueprint, mfu=0.4).memory
    assert memory.parameters == sum(arena.value.nbytes for arena in arenas)
    sums = [arena.sums for arena in arenas if isinstance(arena.sums, Tensor)]
    assert memory.gradients == sum(flat.nbytes for flat in (*sums, *(arena.gradient for arena in arenas)))
    assert memory.moments == sum(moment.nbytes for arena in arenas for moment in arena.moments)
    assert memory.remainders == sum(arena.remainder.nbytes for arena in arenas if isinstance(arena.remainder, Tensor))
    if batch > world:
        assert not sums
        assert memory.gradients == 4 * sum(arena.value.numel() for arena in arenas)
    else:
        assert all(arena.gradient.dtype is arena.value.dtype for arena in arenas)
        assert all(flat.dtype is torch.float32 for flat in sums)
        assert sum(map(Tensor.numel, sums)) == sum(
            layout.held() for layout in blueprint.layouts if layout.parts > 1 and layout.storage is torch.bfloat16
        )


@pytest.mark.parametrize(
    ("ranks", "experts", "groups"), [(1, 1, []), (2, 2, [2]), (2, 1, [2]), (4, 2, [4, 2]), (16, 8, [])]
)
def test_memory_to_land_in_is_that_of_the_groups_of_one_host(ranks: int, experts: int, groups: list[int]) -> None:
    """Of all ranks, and of those with the same experts where they are fewer; among hosts, two buckets in fp32."""
    override = [f"--parallel.ranks={ranks}", "--train.batch_size=128"]
    config = load(ROOT / "configs" / "moonlet.toml", {}, override).config
    memory = plan(config, make_blueprint(config, ranks, experts), mfu=0.4).memory
    # microbatches of 8 sequences: 16 ranks have one each, and the embedding and the head are the largest buckets
    widened = 2 * 4 * config.model.vocab_size * config.model.hidden_size if ranks == 16 else 0
    assert memory.landing == widened + sum(slots(size).allocated() for size in groups)
    assert all(slots(size).allocated() > slots(size).areas.size() == 4 * 2**26 for size in groups)


def test_deepseek_v3_on_256_gpus() -> None:
    """A microbatch a rank: 46.7 GB of gradients in bf16, and 10.5 of sums over ranks in fp32."""
    config = load(ROOT / "configs" / "dsv3.toml", {}, ()).config
    memory = plan(config, make_blueprint(config, 256, 128), mfu=0.4).memory
    assert memory.gradients == 57_225_575_424
    assert memory.total() == pytest.approx(146.8e9, rel=1e-3)
