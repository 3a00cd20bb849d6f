"""The all-gather of updated parameters beside the next step's forward pass: waited for where it is read, no earlier."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.parallel import ranks as meeting
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.train import loop, run, zero
from nmoe.effects.train.step import make_step
from nmoe.pure.core import tree
from nmoe.pure.model.model import Batch
from tests.effects.parallel.rank_runs import as_world, in_group, state_of, train
from tests.effects.parallel.test_ranks import config_of
from tests.effects.train.test_step import batches
from tests.effects.train.tiny import tiny


class Late:
    """An all-gather that writes nothing before someone waits for it: what does not wait reads old values."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start

    def wait(self) -> None:
        self._start().wait()


def trained(config: Any, ranks: Ranks, late: bool) -> list[Tensor]:
    """Losses and norms of three steps of half the batch, and the parameters that every rank has in the end."""
    blueprint, state, (env, rt) = state_of(config, ranks, bucket=256)
    step = make_step(config, blueprint, env, rt, mark=lambda name: None)
    shipped = zero.all_gather_

    def gather_(group: meeting.Group, flat: Tensor) -> Any:
        if late:
            return Late(lambda: shipped(group, flat))
        work = shipped(group, flat)
        work.wait()
        return work

    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "all_gather_", gather_)
        for batch in batches(config, 3):
            rank = ranks.world.rank
            mine = attrs.evolve(batch, tokens=batch.tokens[rank::2], targets=batch.targets[rank::2])
            state, metrics = step(state, mine)
            found += [metrics.loss, metrics.grad_norm, metrics.update_norm]
        before = [arena.value.clone() for arena in state.arenas]
        zero.gather_(blueprint.layouts, state.arenas, state.params, ranks)
        after = [arena.value for arena in state.arenas]
    assert not all(map(torch.equal, before, after)), "between steps a rank has old values of what others update"
    return [*found, *(leaf.detach().clone() for _, leaf in tree.leaves(state.params))]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_parameter_is_waited_for_before_it_is_read(tmp_path: Path, recompute: Any) -> None:
    config = as_world(tiny(batch_size=4, microbatch_size=1, lr=3e-2), 2, experts=1)
    config = attrs.evolve(config, train=attrs.evolve(config.train, recompute=recompute))

    def check(ranks: Ranks) -> None:
        wanted, found = trained(config, ranks, late=False), trained(config, ranks, late=True)
        assert all(map(torch.equal, wanted, found))

    in_group(config, tmp_path, check)


def test_blocks_do_not_wait_for_later_ones(tmp_path: Path) -> None:
    """All are started first, in the order of the model; a block then waits for its own buckets alone."""
    config = as_world(tiny(batch_size=4, microbatch_size=2), 2, experts=1)

    def check(ranks: Ranks) -> None:
        blueprint, state, _ = state_of(config, ranks, bucket=256)
        started: list[int] = []
        waited: list[int] = []
        place = {leaf.data_ptr(): number for number, (_, leaf) in enumerate(tree.leaves(state.params))}

        class Noted:
            def __init__(self, first: int) -> None:
                self._first = first

            def wait(self) -> None:
                waited.append(self._first)

        def gather_(group: meeting.Group, flat: Tensor) -> Noted:
            low, high = flat.data_ptr(), flat.data_ptr() + flat.nbytes
            started.append(min(number for at, number in place.items() if low <= at < high))
            return Noted(started[-1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero, "all_gather_", gather_)
            need = zero.gathering_(blueprint.layouts, state.arenas, state.params, ranks)
            assert started == sorted(started) and len(started) > 8 and waited == []
            need(state.params.blocks[0])
            last = max(place[leaf.data_ptr()] for _, leaf in tree.leaves(state.params.blocks[0]))
            assert waited and max(waited) <= last and len(waited) < len(started)
            need(state.params)
            need(state.params)
            assert sorted(waited) == started, "each once"

    in_group(config, tmp_path, check)


def test_whoever_reads_parameters_between_steps_finds_those_of_all_ranks(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, evaluation, sample, and the weights of a run that is interrupted; none of them completes the
    parameters for the one behind it, as a step lies between."""
    config = as_world(config_of(sources, tmp_path, "read", steps=1000), 2, experts=1)
    config = attrs.evolve(
        config,
        validation=attrs.evolve(config.validation, every=2),
        eval=attrs.evolve(config.eval, every=3),
        sample=attrs.evolve(config.sample, every=5),
    )

    def noted(who: str, state: Any) -> None:
        digest = hashlib.sha256(b"".join(leaf.detach().numpy().tobytes() for _, leaf in tree.leaves(state.params)))
        (tmp_path / f"{who}.{state.step}.{os.environ['RANK']}").write_text(digest.hexdigest())

    def noting(who: str, result: Any) -> Callable[..., Any]:
        return lambda session, state, *_: (noted(who, state), result)[1]

    def interrupted(read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        def at(cursor: int) -> Batch:
            if cursor == 6 * config.train.batch_size:
                os.kill(os.getpid(), signal.SIGINT)
            return read(cursor)

        return at

    monkeypatch.setattr(loop, "_validator", lambda session: lambda state: noted("validation", state))
    monkeypatch.setattr(loop, "_scores", noting("evaluation", None))
    monkeypatch.setattr(loop, "sample_on_the_way", noting("sample", None))
    monkeypatch.setattr(loop, "end", noting("end", 0))
    world = run.World(read=interrupted, judge=lambda *_: {})
    told = train(config, tmp_path / "out", {0: world, 1: world})
    assert [code for code, _ in told] == [0, 0], told
    found = {path.name: path.read_text() for path in tmp_path.glob("*.*.[01]")}
    wanted = ("end.7", "evaluation.3", "evaluation.6", "sample.5", "validation.2", "validation.4", "validation.6")
    assert set(found) == {f"{name}.{rank}" for name in wanted for rank in range(2)}
    assert [name for name in wanted if found[f"{name}.0"] != found[f"{name}.1"]] == []
