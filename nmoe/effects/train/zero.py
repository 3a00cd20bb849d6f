"""ZeRO-2 (arXiv:1910.02054): reduce-scatter of gradients, all-gather of updated values; a rank updates its shard.

Each bucket is a reduce-scatter and an all-gather, in place, in levels where their number is no prime: neighbours,
which share a host, sum first, and what leaves a host is summed over its ranks. What is summed in which order follows
from the layout and the number of ranks alone, never from arrival order or hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.device.buffers import Arena
from nmoe.effects.kernels.accumulate import Accumulator, nobody
from nmoe.effects.parallel.ranks import Group, Ranks
from nmoe.pure.core import tree
from nmoe.pure.core.layout import ArenaLayout


def owned(layouts: Sequence[ArenaLayout], flats: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The stretches of flat tensors, one an arena, that this rank answers for; over all ranks, everything once."""
    return [
        flat[stretch.begin : stretch.end]
        for described, flat in zip(layouts, flats, strict=True)
        for stretch in described.stretches(ranks.sharing(described).part())
    ]


@contextmanager
def scattering_(
    layouts: Sequence[ArenaLayout], arenas: Sequence[Arena], params: Any, accumulator: Accumulator, ranks: Ranks
) -> Iterator[Callable[[], None]]:
    """Reduce-scatter the gradients, in overlap with the backward pass inside the block.

    A bucket is reduced as soon as its last gradient is complete. All ranks reduce buckets in one order, that in
    which the backward pass completes them: by their first parameter in the order of the model, the last one first.

    accumulator  says which parameters' gradients the ops have written, the others autograd's hooks say

    yields  what to call after the backward pass: waits, on a GPU the stream and not the host

    Writes:  gradients of `arenas`: `owned` has the sum, the rest is worth nothing.
    """
    if ranks.world.size == 1:
        yield lambda: None
        return
    leaves = dict(tree.leaves(params))
    buckets = list(reversed(_buckets(layouts, [arena.gradient for arena in arenas], params, ranks)))
    waiting = {leaves[path].data_ptr(): index for index, (*_, paths) in enumerate(buckets) for path in paths}
    missing = [len(paths) for *_, paths in buckets]
    works: list[Any] = []

    def reduce() -> None:
        """Start the reduce-scatter of every complete bucket that no incomplete one precedes."""
        while len(works) < len(buckets) and not missing[len(works)]:
            group, gradient, _ = buckets[len(works)]
            works.append(_reduce_scatter_(group, gradient))

    def added(leaf: Tensor) -> None:
        """The gradient of a parameter is complete."""
        if (index := waiting.get(leaf.data_ptr())) is not None:
            missing[index] -= 1
            reduce()

    def finish() -> None:
        missing[:] = [0] * len(buckets)  # a parameter without a gradient in this step has a sum as well
        reduce()
        with record_function("reduce"):
            for work in works:
                work.wait()

    hooks = [leaves[path].register_post_accumulate_grad_hook(added) for *_, paths in buckets for path in paths]
    accumulator.added = added
    try:
        yield finish
    finally:
        accumulator.added = nobody
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def gathering_(
    layouts: Sequence[ArenaLayout],
    arenas: Sequence[Arena],
    params: Any,
    ranks: Ranks,
    within: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> Callable[[Any], None]:
    """Start the all-gather of the values that each rank updated, bucket by bucket in the order of the model.

    Between two steps a rank has the new values of what it owns alone. Gathered values are gathered again to the same
    bits, so that nobody has to know whether they were.

    within   around each time to wait
    returns  what to call with a parameter, or a tree of them, before it is read: waits for its buckets, on a GPU the
             stream and not the host

    Writes:  values of `arenas`.
    """
    leaves = dict(tree.leaves(params))
    bucket: dict[int, int] = {}
    waiting: dict[int, Any] = {}
    # `data` has a version of its own: autograd refuses a version that rises after an earlier block has kept its
    # parameters, and levels begin in `wait`. What a block keeps is whole by then.
    for group, value, paths in _buckets(layouts, [arena.value.data for arena in arenas], params, ranks):
        bucket |= {leaves[path].data_ptr(): len(waiting) for path in paths}
        waiting[len(waiting)] = all_gather_(group, value)

    def need(node: Any) -> None:
        wanted = {bucket.get(leaf.data_ptr(), -1) for _, leaf in tree.leaves(node)} & waiting.keys()
        if wanted:
            with within("gather"), record_function("gather"):
                for index in sorted(wanted):
                    waiting.pop(index).wait()

    return need


def gather_(layouts: Sequence[ArenaLayout], arenas: Sequence[Arena], params: Any, ranks: Ranks) -> None:
    """All-gather the values that each rank updated, for whoever reads them between two steps. Every rank calls it.

    Writes:  values of `arenas`.
    """
    gathering_(layouts, arenas, params, ranks)(params)


@torch.no_grad()
def whole(layouts: Sequence[ArenaLayout], params: Any, ranks: Ranks) -> Any:
    """The parameters with the experts of all ranks, on the host; they are too much for a GPU."""
    group = ranks.experts
    shared = {slot.path for described in layouts if described.policy.shard for slot in described.slots}

    def gathered(path: str, leaf: Tensor) -> Tensor:
        if group.size == 1 or path not in shared:
            return leaf
        flat = leaf.new_empty(group.size, *leaf.shape)
        flat[group.rank].copy_(leaf)
        all_gather_(group, flat.view(-1)).wait()
        return flat.flatten(0, 1).cpu()

    return tree.map(gathered, params)


def _buckets(
    layouts: Sequence[ArenaLayout], flats: Sequence[Tensor], params: Any, ranks: Ranks
) -> list[tuple[Group, Tensor, list[str]]]:
    """Every bucket that several ranks hold: these, its part of the flat tensor of its arena, and its parameters.

    In the order in which the forward pass first reads one of their parameters, so the same on all ranks.
    """
    place = {path: index for index, (path, _) in enumerate(tree.leaves(params))}
    found: list[tuple[int, Group, Tensor, list[str]]] = []
    for described, flat in zip(layouts, flats, strict=True):
        group = ranks.sharing(described)
        for low, high in described.buckets() if group.size > 1 else ():
            paths = [slot.path for slot in described.slots if low <= slot.offset < high]
            found.append((min(place[path] for path in paths), group, flat[low:high], paths))
    found.sort(key=lambda bucket: bucket[0])
    return [(group, flat, paths) for _, group, flat, paths in found]


def _part(group: Group, flat: Tensor) -> Tensor:
    size = flat.numel() // group.size
    return flat[group.rank * size : (group.rank + 1) * size]


class _Rest:
    """Collectives of which each begins when the one before is over: the first has begun, the others do in `wait`."""

    def __init__(self, first: Any, rest: Sequence[Callable[[], Any]]) -> None:
        self._first, self._rest = first, rest

    def wait(self) -> None:
        """Wait for all of them."""
        self._first.wait()
        for start in self._rest:
            start().wait()


class _Queued:
    """Collectives that wait for each other on a stream of their own."""

    def __init__(self, stream: torch.cuda.Stream, starts: Sequence[Callable[[], Any]]) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for start in starts:
                start().wait()
            self._event = stream.record_event()

    def wait(self) -> None:
        """The current stream waits for all of them, the host does not."""
        torch.cuda.current_stream().wait_event(self._event)


def _in_turn(group: Group, starts: Sequence[Callable[[], Any]]) -> Any:
    """Start collectives one after another; what to wait for."""
    if len(starts) == 1:
        return starts[0]()
    return _Rest(starts[0](), starts[1:]) if group.stream is None else _Queued(group.stream, starts)


def _levels(group: Group, flat: Tensor) -> list[tuple[Group, Tensor]]:
    """Each level of a group with what it cuts, from the whole to this rank's part."""
    cuts: list[tuple[Group, Tensor]] = []
    for level in group.levels or (group,):
        cuts.append((level, flat))
        flat = _part(level, flat)
    return cuts


# The methods of a process group, because torch 2.13 renames the functions around them that torch 2.11 has.


def _reduce_scatter_(group: Group, flat: Tensor) -> Any:
    if group.copies is not None:
        return group.copies.reduce_scatter_(flat)
    with record_function("reduce"):
        return _in_turn(
            group,
            [partial(level.handle._reduce_scatter_base, _part(level, cut), cut) for level, cut in _levels(group, flat)],
        )


def all_gather_(group: Group, flat: Tensor) -> Any:
    """Start the all-gather of a flat tensor, of which each rank of the group has its part; what to wait for."""
    if group.copies is not None:
        return group.copies.all_gather_(flat)
    # as bytes: gloo and NCCL know no i16, and no format matters
    raw = flat.view(torch.uint8)
    with record_function("gather"):
        cuts = reversed(_levels(group, raw))
        return _in_turn(group, [partial(level.handle._allgather_base, cut, _part(level, cut)) for level, cut in cuts])
