"""The step as one CUDA graph: recorded once, then replayed with new data, so that the GPU never waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.pure.core import tree

EAGER_STEPS = 2
"""Steps taken without the graph: kernels are built, libraries take their workspaces."""

Compute = Callable[[Any, Any, Any], tuple[Any, Any]]


@attrs.frozen(kw_only=True)
class Recorded:
    """A recorded step: the graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    state: Any  # State whose tensors the graph reads, and writes at its end
    batch: Any
    rates: Any
    metrics: Any
    advance: dict[str, int]  # what a step adds to each number of the State


def replaying(compute: Compute, scope: ExitStack) -> Compute:
    """`compute(state, batch, rates) -> (state, metrics)` that records its third call and replays it from then on.

    Sizes must not change. What the graph holds, and the caller gets in a State, are the same tensors in every step: a
    State is read before the next step, as its donation demands. Metrics are copies.

    scope  at whose end the graph is destroyed: NCCL does not give up a communicator that a graph has recorded, and
           `destroy_process_group` would wait for ever (pytorch issue 115388)
    """
    calls = 0
    recorded: Recorded | None = None

    def step(state: Any, batch: Any, rates: Any) -> tuple[Any, Any]:
        nonlocal calls, recorded
        calls += 1
        if calls <= EAGER_STEPS:
            return compute(state, batch, rates)
        if recorded is None:
            recorded = record(compute, state, batch, rates)
            scope.push(partial(_destroy, recorded.graph))
        return replay(recorded, state, batch, rates)

    return step


def _destroy(graph: torch.cuda.CUDAGraph, error: type[BaseException] | None, *_: object) -> None:
    """Destroy a graph at an orderly end; after an error the device may have trapped, and nobody waits for NCCL."""
    if error is None:
        torch.cuda.synchronize()
        graph.reset()


def record(compute: Compute, state: Any, batch: Any, rates: Any) -> Recorded:
    """Record one call; nothing is computed, and the state keeps its values.

    Waits for the device and gives its cached memory back, because the graph has memory of its own.
    """
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    small = {name: leaf.clone() for name, leaf in fields(state, Tensor).items()}
    batch, rates = (tree.map(lambda path, leaf: leaf.clone(), values) for values in (batch, rates))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        after, metrics = compute(attrs.evolve(state, **small), batch, rates)
        for name, leaf in fields(after, Tensor).items():
            small[name].copy_(leaf)
    before = fields(state, int)
    advance = {name: number - before[name] for name, number in fields(after, int).items()}
    held = attrs.evolve(state, **small)
    return Recorded(graph=graph, state=held, batch=batch, rates=rates, metrics=metrics, advance=advance)


def replay(recorded: Recorded, state: Any, batch: Any, rates: Any) -> tuple[Any, Any]:
    """Give the graph its inputs and run it."""
    for held, given in ((recorded.batch, batch), (recorded.rates, rates)):
        for (_, to), (_, new) in zip(tree.leaves(held), tree.leaves(given), strict=True):
            to.copy_(new, non_blocking=True)
    for name, leaf in fields(state, Tensor).items():
        held = getattr(recorded.state, name)
        if held is not leaf:
            held.copy_(leaf)
    recorded.graph.replay()
    metrics = tree.map(lambda path, leaf: leaf.clone(), recorded.metrics)
    numbers = {name: number + recorded.advance[name] for name, number in fields(state, int).items()}
    return attrs.evolve(recorded.state, **numbers), metrics


def fields(node: Any, kind: type) -> dict[str, Any]:
    """The fields of a record that hold a `kind`."""
    values = {field.name: getattr(node, field.name) for field in attrs.fields(type(node))}
    return {name: value for name, value in values.items() if isinstance(value, kind)}
