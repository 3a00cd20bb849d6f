"""The plan's arena is, to the byte, the one that a run of the same config allocates."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from nmoe.effects.parallel.exchange.opening import virtual
from nmoe.effects.parallel.ranks import Group, Ranks
from nmoe.effects.train import build
from nmoe.pure.cost.plan import plan
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.parallel.exchange_arena import GRANULARITY, Sizes
from tests.effects.train.tiny import tiny


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("capacity", [0.0, 1.25, 2.0])
@pytest.mark.parametrize(
    ("dedup", "transport"), [(False, "peer"), (True, "peer"), (False, "nvshmem"), (True, "nvshmem")]
)
def test_the_plan_is_the_arena(
    ranks: int, capacity: float, dedup: bool, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    parallel = attrs.evolve(config.parallel, ranks=ranks, capacity=capacity, dedup=dedup, transport=transport)
    config = attrs.evolve(config, parallel=parallel)
    opened: list[Sizes] = []
    monkeypatch.setattr(build, "open_exchange", lambda *, sizes, **rest: opened.append(sizes))
    here: Any = Group(rank=0, size=ranks, handle=object())
    build.exchanging(config, Ranks(world=here, experts=here), torch.device("cpu"))
    (sizes,) = opened
    assert sizes.staged == (transport == "nvshmem")
    blueprint = make_blueprint(config, ranks, ranks)
    planned = plan(config, blueprint, mfu=0.4, dedup=dedup, capacity=parallel.room())
    assert planned.arena is not None
    for e in virtual(sizes, torch.device("cpu")):
        assert planned.arena == e.fields and planned.arena.size == e.raw.numel()
    assert planned.memory.exchange == -(-planned.arena.size // GRANULARITY) * GRANULARITY
