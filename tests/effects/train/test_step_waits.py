"""A step neither reads a value from the device nor speaks to the other ranks more often than it has to."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmoe.config.sections import Config, Mtp
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.train import run
from nmoe.effects.train.step import make_step
from nmoe.pure.optim import clip
from tests.effects.parallel.rank_runs import as_world, in_group, state_of
from tests.effects.train import trainings
from tests.effects.train.test_step import batches, start
from tests.effects.train.tiny import tiny

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of a tensor that wait until the host has its value."""

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
"""Ops that a GPU does not begin before the host has a value."""


class Ops(TorchDispatchMode):
    """Calls `note` with the namespace and name of every op; one with a mask as an index is a `nonzero` as well."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(func.namespace, func._schema.name.rpartition("::")[2])
        if "index" in func._schema.name:
            leaves = tree_leaves((args, kwargs))
            if any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in leaves[1:]):
                self._note(func.namespace, "nonzero")
        return func(*args, **(kwargs or {}))


@contextmanager
def value_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What asked for a tensor's value inside the block, and where."""
    found: list[str] = []

    def note(name: str) -> None:
        found.append(f"{name}\n{''.join(traceback.format_stack(limit=8))}")

    def noting(name: str) -> Any:
        method = getattr(Tensor, name)

        def call(*arguments: Any, **named: Any) -> Any:
            note(name)
            return method(*arguments, **named)

        return call

    with monkeypatch.context() as patch, Ops(lambda _, name: note(name) if name in WAITS else None):
        for name in READS:
            patch.setattr(Tensor, name, noting(name))
        yield found


def with_choices(config: Config) -> Config:
    """Everything that a config may choose to do in a step: quantiles, Muon, further tokens, spikes and large scores."""
    model, optim, train = config.model, config.optim, config.train
    groups: dict[str, Any] = {
        name: attrs.evolve(getattr(optim, name), optimizer="muon") for name in ("dense", "expert")
    }
    moe = attrs.evolve(model.moe, balance="quantile")
    return attrs.evolve(
        config,
        model=attrs.evolve(model, moe=moe, mtp=Mtp(depth=2)),
        optim=attrs.evolve(optim, qk_clip=1.0, **groups),
        train=attrs.evolve(train, skip_spikes=8.0),
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("chosen", [False, True])
def test_a_step_reads_no_value(monkeypatch: pytest.MonkeyPatch, compute: str, chosen: bool) -> None:
    """On a GPU each would wait for the device; the CPU's ops read none either, so that all of a step is seen."""
    config = tiny(batch_size=4, microbatch_size=2, compute=compute)
    config = with_choices(config) if chosen else config
    state, step = start(config)
    first, second = batches(config, 2)
    state, _ = step(state, first)
    with value_reads(monkeypatch) as found:
        step(state, second)
    assert found == [], found[0]


@pytest.mark.parametrize(
    "read",
    [
        lambda scale: scale if scale.item() > 0 else scale,
        lambda scale: scale if bool(scale > 0) else scale,
        lambda scale: scale.reshape(1)[scale.reshape(1) > 0].sum(),
        lambda scale: scale * scale.new_tensor(scale.tolist()),
        lambda scale: scale.cpu(),
    ],
)
def test_a_step_that_reads_a_value_is_seen(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    """The test above, tested: each way to read a value, put into the clip of a step."""
    from nmoe.effects.train import step as module

    monkeypatch.setattr(module, "clip_scale", lambda norm, limit: read(clip.clip_scale(norm, limit)))
    config = tiny()
    state, step = start(config)
    with value_reads(monkeypatch) as found:
        step(state, batches(config, 1)[0])
    assert found


def test_the_loop_reads_no_value_between_two_reports(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the head of step 3 to that of step 6, with nothing to report, validate or save."""
    config = trainings.config(tmp_path, "quiet", sources, 8, every=0)
    config = attrs.evolve(
        config,
        log=attrs.evolve(config.log, every=100),
        validation=attrs.evolve(config.validation, every=100),
        data=attrs.evolve(config.data, prefetch=0),
    )
    batch, reading = config.train.batch_size, value_reads(monkeypatch)

    def noting(inner: Any) -> Any:
        kept: list[list[str]] = []

        def read(cursor: int) -> Any:
            if cursor == 3 * batch:
                kept.append(reading.__enter__())
            if cursor == 6 * batch:
                reading.__exit__(None, None, None)
                (tmp_path / "found.json").write_text(json.dumps(kept[0]))
            return inner(cursor)

        return read

    code, output = trainings.train(config, world=run.World(read=noting))
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [], found[0]


@pytest.mark.parametrize("microbatch", [2, 1])
def test_a_microbatch_adds_no_collective(tmp_path: Path, microbatch: int) -> None:
    """Two ranks, with one microbatch or two each: three all-reduces, a reduce-scatter and an all-gather a bucket."""
    config = as_world(tiny(batch_size=4, microbatch_size=microbatch), 2, experts=1)

    def count(ranks: Ranks) -> None:
        blueprint, state, (env, rt) = state_of(config, ranks, bucket=2048)
        step = make_step(config, blueprint, env, rt, mark=lambda name: None)
        calls: Counter[str] = Counter()
        whole = batches(config, 1)[0]
        half = slice(ranks.world.rank * 2 // microbatch, (ranks.world.rank + 1) * 2 // microbatch)
        mine = attrs.evolve(whole, tokens=whole.tokens[half], targets=whole.targets[half])
        with Ops(lambda namespace, name: calls.update([name] if namespace == "c10d" else [])):
            step(state, mine)
        buckets = sum(len(list(layout.buckets())) for layout in blueprint.layouts)
        assert calls == {
            "allreduce_": 3,  # targets; loss, loads and norm; norm of the update
            "_reduce_scatter_base_": buckets,
            "_allgather_base_": buckets,
        }, calls

    in_group(config, tmp_path, count)
