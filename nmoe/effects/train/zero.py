"""ZeRO-2 (arXiv:1910.02054): reduce-scatter of gradients, all-gather of updated values; a rank updates its shard.

Each bucket is a reduce-scatter and an all-gather, in place, in levels where their number is no prime: neighbours,
which share a host, sum first, and what leaves a host is summed over its ranks. What is summed in which order follows
from the layout and the number of ranks alone, never from arrival order or hosts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from nmoe.effects.device.buffers import Arena
from nmoe.effects.kernels.accumulate import Accumulator, nobody
from nmoe.effects.parallel.ranks import Group, Ranks
from nmoe.pure.core import tree
from nmoe.pure.core.layout import WIDENED, ArenaLayout


@attrs.frozen(kw_only=True)
class Bucket:
    """Parameters that several ranks hold, which are reduced and gathered at once."""

    group: Group  # that hold them
    arena: int  # which one
    begin: int  # in elements of the arena
    end: int
    paths: tuple[str, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a flat tensor as long as the arena."""
        return flat[self.begin : self.end]

    def held(self, flat: Tensor) -> Tensor:
        """Its part of a flat tensor of what one rank holds of the arena."""
        return flat[self.begin // self.group.size : self.end // self.group.size]


def owned(layouts: Sequence[ArenaLayout], arenas: Sequence[Arena], ranks: Ranks) -> list[Tensor]:
    """The gradients, summed over ranks, that this rank answers for; over all ranks, everything once."""
    found: list[Tensor] = []
    for described, arena in zip(layouts, arenas, strict=True):
        if isinstance(arena.sums, Tensor):
            found.append(arena.sums)
        else:
            own = described.stretches(ranks.sharing(described).part())
            found += [arena.gradient[stretch.begin : stretch.end] for stretch in own]
    return found


@contextmanager
def scattering_(
    layouts: Sequence[ArenaLayout], arenas: Sequence[Arena], params: Any, accumulator: Accumulator, ranks: Ranks
) -> Iterator[Callable[[], None]]:
    """Reduce-scatter the gradients, in overlap with the backward pass inside the block.

    A bucket is reduced as soon as its last gradient is complete. All ranks reduce buckets in one order, that in
    which the backward pass completes them: by their first parameter in the order of the model, the last one first.

    accumulator  says which parameters' gradients the ops have written, the others autograd's hooks say

    yields  what to call after the backward pass: waits, on a GPU the stream and not the host

    Writes:  gradients and sums of `arenas`: `owned` has the sums, the rest is worth nothing.
    """
    if ranks.world.size == 1:
        yield lambda: None
        return
    leaves = dict(tree.leaves(params))
    buckets = list(reversed(_buckets(layouts, params, ranks)))
    waiting = {leaves[path].data_ptr(): index for index, bucket in enumerate(buckets) for path in bucket.paths}
    missing = [len(bucket.paths) for bucket in buckets]
    started = 0
    works: deque[Any] = deque()

    def reduce() -> None:
        """Start the reduce-scatter of every complete bucket that no incomplete one precedes."""
        nonlocal started
        while started < len(buckets) and not missing[started]:
            bucket = buckets[started]
            arena = arenas[bucket.arena]
            sums = bucket.held(arena.sums) if isinstance(arena.sums, Tensor) else None
            if sums is not None and bucket.group.copies is None and len(works) >= WIDENED:
                works.popleft().wait()
            works.append(_reduce_scatter_(bucket.group, bucket.of(arena.gradient), sums))
            started += 1

    def added(leaf: Tensor) -> None:
        """The gradient of a parameter is complete."""
        if (index := waiting.get(leaf.data_ptr())) is not None:
            missing[index] -= 1
            reduce()

    def finish() -> None:
        missing[:] = [0] * len(buckets)  # a parameter without a gradient in this step has a sum as well
        reduce()
        with record_function("reduce"):
            while works:
                works.popleft().wait()

    hooks = [leaves[path].register_post_accumulate_grad_hook(added) for bucket in buckets for path in bucket.paths]
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
    places: dict[int, int] = {}
    waiting: dict[int, Any] = {}
    # `data` has a version of its own: autograd refuses a version that rises after an earlier block has kept its
    # parameters, and levels begin in `wait`. What a block keeps is whole by then.
    for bucket in _buckets(layouts, params, ranks):
        places |= {leaves[path].data_ptr(): len(waiting) for path in bucket.paths}
        waiting[len(waiting)] = all_gather_(bucket.group, bucket.of(arenas[bucket.arena].value.data))

    def need(node: Any) -> None:
        wanted = {places.get(leaf.data_ptr(), -1) for _, leaf in tree.leaves(node)} & waiting.keys()
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


def _buckets(layouts: Sequence[ArenaLayout], params: Any, ranks: Ranks) -> list[Bucket]:
    """Every bucket that several ranks hold.

    In the order in which the forward pass first reads one of their parameters, so the same on all ranks.
    """
    place = {path: index for index, (path, _) in enumerate(tree.leaves(params))}
    found: list[Bucket] = []
    for index, described in enumerate(layouts):
        group = ranks.sharing(described)
        for low, high in described.buckets() if group.size > 1 else ():
            paths = tuple(slot.path for slot in described.slots if low <= slot.offset < high)
            found.append(Bucket(group=group, arena=index, begin=low, end=high, paths=paths))
    return sorted(found, key=lambda bucket: min(place[path] for path in bucket.paths))


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
        self._starts = starts  # what they read is nobody else's until the current stream waits
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


def _reduce_scatter_(group: Group, flat: Tensor, sums: Tensor | None) -> Any:
    """Start the sum of a flat tensor, of which each rank of the group gets its part; what to wait for.

    sums    f32, where the part goes; None: to its place in `flat`, which is f32 then

    Writes:  sums, or `flat`.
    """
    if group.copies is not None:
        return group.copies.reduce_scatter_(flat, flat.chunk(group.size)[group.part()] if sums is None else sums)
    with record_function("reduce"):
        wide = flat if sums is None else flat.float()
        cuts = _levels(group, wide)
        starts = [partial(level.handle._reduce_scatter_base, _part(level, cut), cut) for level, cut in cuts]
        last, cut = cuts[-1]
        if sums is not None:
            starts[-1] = partial(last.handle._reduce_scatter_base, sums, cut)
        return _in_turn(group, starts)


def all_gather_(group: Group, flat: Tensor) -> Any:
    """Start the all-gather of a flat tensor, of which each rank of the group has its part; what to wait for."""
    if group.copies is not None:
        return group.copies.all_gather_(flat)
    # as bytes: gloo and NCCL know no i16, and no format matters
    raw = flat.view(torch.uint8)
    with record_function("gather"):
        cuts = reversed(_levels(group, raw))
        return _in_turn(group, [partial(level.handle._allgather_base, cut, _part(level, cut)) for level, cut in cuts])
