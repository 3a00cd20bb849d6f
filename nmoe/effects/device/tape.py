"""The step as a list of torch's calls on a CPU: recorded once, then replayed with new data, without its Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import attrs
import torch
import torch.utils._pytree as pytree  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmoe.effects.device.graph import Compute, fields
from nmoe.pure.core import tree

PLACING = frozenset({"dtype", "layout", "device", "pin_memory"})
"""Arguments that an operation leaves out where it is given the memory of its result."""

SMALL = 1 << 22
"""Bytes of a tensor up to which waking a second thread takes longer than what it saves: a fifth of a millisecond."""


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
    return frozenset(
        leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)
    )


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
        if call.writes or call.reads & changing or call.made & written:
            followed.append(call)
            changing |= call.writes | call.made
    kept: list[Call] = []
    for call in reversed(followed):
        if (call.writes | call.made) & read:
            kept.append(call)
            read |= call.reads
    return kept[::-1]


Again = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""What a replay calls, with what."""


def again(call: Call) -> Again:
    """The call into the memory of its result."""
    # `_op` is what the operation calls; a tenth of a replayed token is the Python function around it
    if call.writes:
        return call.operation._op, call.arguments, call.keywords
    for overload in call.operation.overloadpacket.overloads():
        into = getattr(call.operation.overloadpacket, overload)
        if _is_into(into, call.operation):
            names = [argument.name for argument in into._schema.arguments if argument.is_out]
            held = call.result if isinstance(call.result, tuple | list) else (call.result,)
            out = dict(zip(names, cast("Any", held), strict=True))
            taken = {argument.name for argument in into._schema.arguments}
            keywords = {name: value for name, value in call.keywords.items() if name in taken}
            return into._op, call.arguments, keywords | out
    return _copied, (call,), {}


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

    calls: list[Again]
    threads: int  # that compute it
    state: Any  # State whose tensors the calls read and write
    batch: Any
    rates: Any
    metrics: Any


def replaying(compute: Compute) -> Compute:
    """`compute(state, batch, rates) -> (state, metrics)` that records its first call and replays it from then on.

    As of `graph.replaying`, sizes must not change, and metrics are copies. The State after the first step is that of
    all later ones: its tensors have other numbers after each, what it knows on the host stays.

    Raises:  ValueError for a step that reads a number of a tensor, and for another State than the last one.
    """
    recorded: Recorded | None = None

    def step(state: Any, batch: Any, rates: Any) -> tuple[Any, Any]:
        nonlocal recorded
        if recorded is None:
            recorded = record(compute, state, batch, rates)
        elif state is not recorded.state:
            raise ValueError("tape: expected the state that the step before returned, got another; pass it on")
        else:
            replay(recorded, batch, rates)
        return recorded.state, tree.map(lambda _, leaf: leaf.clone(), recorded.metrics)

    return step


def record(compute: Compute, state: Any, batch: Any, rates: Any) -> Recorded:
    """Take one step and note its calls."""
    small = {name: leaf.clone() for name, leaf in fields(state, Tensor).items()}
    batch, rates = (tree.map(lambda _, leaf: leaf.clone(), values) for values in (batch, rates))
    with Recorder() as recorder:
        after, metrics = compute(attrs.evolve(state, **small), batch, rates)
        for name, leaf in fields(after, Tensor).items():
            if leaf is not small[name]:
                small[name].copy_(leaf)
    calls = needed(recorder.calls, memory((batch, rates)), memory(metrics))
    largest = max((leaf.nbytes for call in calls for leaf in _tensors((call.arguments, call.result))), default=0)
    return Recorded(
        calls=[again(call) for call in calls],
        threads=1 if largest <= SMALL else torch.get_num_threads(),
        state=attrs.evolve(after, **small),
        batch=batch,
        rates=rates,
        metrics=metrics,
    )


def replay(recorded: Recorded, batch: Any, rates: Any) -> None:
    """Give the calls their inputs and make them. Writes: the memory of `recorded`."""
    for held, given in ((recorded.batch, batch), (recorded.rates, rates)):
        for (_, to), (_, new) in zip(tree.leaves(held), tree.leaves(given), strict=True):
            to.copy_(new)
    threads = torch.get_num_threads()
    torch.set_num_threads(recorded.threads)
    try:
        for operation, arguments, keywords in recorded.calls:
            operation(*arguments, **keywords)
    finally:
        torch.set_num_threads(threads)
