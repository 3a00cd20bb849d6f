"""A recorded step on a CPU gives what the step itself gives, however often, and takes no more calls than it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import tape
from nmoe.pure.core.tree import record


@record
class Walk:
    place: Tensor
    table: tuple[Tensor, ...]
    length: int


WEIGHT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def walk(state: Walk, batch: Tensor, rates: tuple[()]) -> tuple[Walk, Tensor]:
    """Rows written in place, memory that is filled anew, views, sorted and composed operations, and one for nobody."""
    (table,) = state.table
    row = (batch @ WEIGHT.T @ WEIGHT).unflatten(-1, (7, 1)).flatten(-2)
    table.index_copy_(0, state.place[None], row[None])
    filled = torch.zeros(7)
    filled.index_add_(0, row.argsort(), table.sum(0))
    row.cos()
    values, places = table.reshape(-1).sort(descending=True, stable=True)
    count = torch.zeros(4, dtype=torch.int64).scatter_add(0, places[:3] // 7, torch.ones(3, dtype=torch.int64))
    total = filled + values[:7] * 2 + torch.cat((count, places[:3])) - row.mean()
    return Walk((state.place + 1) % 4, state.table, state.length + 1), torch.where(total > 0, total, 0.5 - total)


def begin() -> Walk:
    return Walk(torch.tensor(0), (torch.zeros(4, 7),), 0)


@torch.inference_mode()
def test_a_replay_is_the_step() -> None:
    """Bit for bit, with new data and what earlier steps left; earlier metrics stay."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(7, generator=generator) for _ in range(7)]
    plain, recorded, run, got = begin(), begin(), tape.replaying(walk), list[Tensor]()
    wanted: list[Tensor] = []
    for batch in batches:
        plain, metrics = walk(plain, batch, ())
        wanted.append(metrics)
        recorded, metrics = run(recorded, batch, ())
        got.append(metrics)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert torch.equal(recorded.table[0], plain.table[0]) and torch.equal(recorded.place, plain.place)
    assert len({tuple(metrics.tolist()) for metrics in got}) == len(batches)


@torch.inference_mode()
def test_what_is_not_needed_is_not_called() -> None:
    """Views, what follows from weights alone, and what nobody reads."""

    def step(state: Walk, batch: Tensor, rates: tuple[()]) -> tuple[Walk, Tensor]:
        batch.exp()
        return state, (batch.view(7, 1).flatten() * (WEIGHT.square().sum(0) + 1)).unflatten(0, (7, 1))

    recorded = tape.record(step, begin(), torch.ones(7), ())
    assert len(recorded.calls) == 1


@torch.inference_mode()
def test_a_step_that_reads_a_number_is_refused() -> None:
    def step(state: Walk, batch: Tensor, rates: tuple[()]) -> Any:
        return state, batch * batch.sum().item()

    with pytest.raises(ValueError, match="tape: expected a step whose calls do not depend on its numbers"):
        tape.replaying(step)(begin(), torch.ones(7), ())


@torch.inference_mode()
def test_another_state_is_refused() -> None:
    run = tape.replaying(walk)
    run(begin(), torch.ones(7), ())
    with pytest.raises(ValueError, match="tape: expected the state that the step before returned"):
        run(begin(), torch.ones(7), ())


@torch.inference_mode()
@pytest.mark.parametrize(("small", "threads"), [(1 << 22, 1), (10, 2)])
def test_threads_are_given_back(small: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are computed by one, and who generates keeps the threads that there were."""
    monkeypatch.setattr(tape, "SMALL", small)
    torch.set_num_threads(2)
    try:
        recorded = tape.record(walk, begin(), torch.ones(7), ())
        seen: list[int] = []
        recorded.calls.append((lambda: seen.append(torch.get_num_threads()), (), {}))
        tape.replay(recorded, torch.ones(7), ())
        assert seen == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
