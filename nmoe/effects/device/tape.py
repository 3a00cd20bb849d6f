"""The step as a list of torch's calls on a CPU: recorded once, then replayed with new data, without its Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import attrs
import torch
import torch.utils._pytree as pytree  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmoe.effects.device.graph import Compute, fields
from nmoe.pure.core import tree

PLACING = {"dtype", "layout", "device", "pin_memory"}
"""Arguments that an operation leaves out where it is given the memory of its result."""


@attrs.frozen(kw_only=True)
class Call:
    """One operation of a recorded step; memory is known by its address, and what the step made is kept alive by it."""

    operation: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any
    reads: frozenset[int]
    writes: frozenset[int]  # of an operation in place, its arguments
    made: frozenset[int]  # memory that is new


class Recorder(TorchDispatchMode):
    """Notes each call of torch that is no composition of others; all is computed as without it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func is torch.ops.aten._local_scalar_dense.default:
            raise ValueError(
                "tape: expected a step whose calls do not depend on its numbers, got one that reads a number; keep it "
                "in a tensor"
            )
        result = func(*args, **kwargs)
        reads, writes = memory((args, kwargs)), memory(_written(func, args, kwargs))
        made = memory(result) - reads
        self.calls.append(
            Call(
                operation=func,
                arguments=args,
                keywords=kwargs,
                result=result,
                reads=reads,
                writes=writes,
                made=made,
            )
        )
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]


def memory(values: Any) -> frozenset[int]:
    """Where the tensors of a tree are, views where what they show is."""
    return frozenset(leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def needed(calls: list[Call], given: frozenset[int], results: frozenset[int]) -> list[Call]:
    """The calls that a replay makes: what new data changes and somebody reads.

    Views need none, as all memory stays where it is; what follows from weights alone is computed while recording.

    given    memory that holds other data in each replay
    results  memory that is read after it
    """
    made = frozenset[int]().union(*(call.made for call in calls))
    written = frozenset[int]().union(*(call.writes for call in calls))
    changing, read = given | (written - made), results | (written - made)
    followed: list[Call] = []
    for call in calls:
        # what is written in place later has to be made anew before
        if call.writes or (call.made and (call.reads & changing or call.made & written)):
            followed.append(call)
            changing |= call.writes | call.made
    kept: list[Call] = []
    for call in reversed(followed):
        if (call.writes | call.made) & read:
            kept.append(call)
            read |= call.reads
    return kept[::-1]


def again(call: Call) -> Callable[[], Any]:
    """The call into the memory of its result."""
    if call.writes:
        return partial(call.operation, *call.arguments, **call.keywords)
    for overload in call.operation.overloadpacket.overloads():
        into = getattr(call.operation.overloadpacket, overload)
        if _is_into(into, call.operation):
            names = [argument.name for argument in into._schema.arguments if argument.is_out]
            held = call.result if isinstance(call.result, tuple | list) else (call.result,)
            out = dict(zip(names, cast("Any", held), strict=True))
            taken = {argument.name for argument in into._schema.arguments}
            keywords = {name: value for name, value in call.keywords.items() if name in taken}
            return partial(into, *call.arguments, **keywords, **out)
    return partial(_copied, call)


def _is_into(into: Any, operation: Any) -> bool:
    """Whether an overload is the operation with memory for the results."""

    def signature(arguments: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in arguments if not a.is_out and a.name not in PLACING]

    outs = sum(argument.is_out for argument in into._schema.arguments)
    return outs == len(operation._schema.returns) and signature(into._schema.arguments) == signature(
        operation._schema.arguments
    )


def _copied(call: Call) -> None:
    """A call that takes no memory for its result. Writes: that memory."""
    new = call.operation(*call.arguments, **call.keywords)
    for held, leaf in zip(_tensors(call.result), _tensors(new), strict=True):
        held.copy_(leaf)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


@attrs.frozen(kw_only=True)
class Recorded:
    """A recorded step: its calls, what they read and what they write."""

    calls: list[Callable[[], Any]]
    state: Any  # State whose tensors the calls read and write
    batch: Any
    rates: Any
    metrics: Any
    advance: dict[str, int]  # what a step adds to each number of the State


def replaying(compute: Compute) -> Compute:
    """`compute(state, batch, rates) -> (state, metrics)` that records its first call and replays it from then on.

    As of `graph.replaying`, sizes must not change, and metrics are copies. A State is in one memory in every step: the
    caller passes on the last one, since what its tensors gave that no step changes is not computed again.

    Raises:  ValueError for a step that reads a number of a tensor, and for another State than the last one.
    """
    recorded: Recorded | None = None

    def step(state: Any, batch: Any, rates: Any) -> tuple[Any, Any]:
        nonlocal recorded
        if recorded is None:
            recorded = record(compute, state, batch, rates)
        else:
            replay(recorded, state, batch, rates)
        numbers = {name: number + recorded.advance[name] for name, number in fields(state, int).items()}
        return attrs.evolve(recorded.state, **numbers), tree.map(lambda _, leaf: leaf.clone(), recorded.metrics)

    return step


def record(compute: Compute, state: Any, batch: Any, rates: Any) -> Recorded:
    """Take one step and note its calls."""
    held = attrs.evolve(state, **{name: leaf.clone() for name, leaf in fields(state, Tensor).items()})
    batch, rates = (tree.map(lambda _, leaf: leaf.clone(), values) for values in (batch, rates))
    with Recorder() as recorder:
        after, metrics = compute(held, batch, rates)
        for name, leaf in fields(after, Tensor).items():
            if leaf is not getattr(held, name):
                getattr(held, name).copy_(leaf)
    calls = needed(recorder.calls, memory((batch, rates)), memory(metrics))
    before = fields(state, int)
    advance = {name: number - before[name] for name, number in fields(after, int).items()}
    return Recorded(
        calls=[again(call) for call in calls], state=held, batch=batch, rates=rates, metrics=metrics, advance=advance
    )


def replay(recorded: Recorded, state: Any, batch: Any, rates: Any) -> None:
    """Give the calls their inputs and make them. Writes: the memory of `recorded`."""
    for name, held in fields(recorded.state, Tensor).items():
        if getattr(state, name) is not held:
            raise ValueError(f"tape: expected the state that the step before returned, got another {name}; pass it on")
    for held, given in ((recorded.batch, batch), (recorded.rates, rates)):
        for (_, to), (_, new) in zip(tree.leaves(held), tree.leaves(given), strict=True):
            to.copy_(new)
    for call in recorded.calls:
        call()
