"""Batches: the windows that `pure.data.stages` chooses, cut from the tokens of splits.

The only state is the cursor, the number of sequences all ranks together have consumed; the caller keeps it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.data import order
from nmoe.pure.data.stages import Stream, select
from nmoe.pure.model.model import Batch


class Source(Protocol):
    """What a loader asks of a split: its name for messages, and its tokens as arrays laid end to end."""

    @property
    def where(self) -> str: ...
    @property
    def tokens(self) -> Sequence[order.Tokens]: ...
    @property
    def num_tokens(self) -> int: ...


def open_stream(
    splits: Sequence[Source],
    stream: Stream,
    *,
    batch_size: int,
    microbatch_size: int,
    sequence_length: int,
    rank: int,
    world: int,
    key: Key,
    end_of_text: int | None = None,
) -> Callable[[int], Batch]:
    """A function from the cursor to this rank's part of the global batch that begins there.

    The global batch is the next `batch_size` windows of the stream; rank r of `world` reads the r-th of as many equal
    parts, cut into M microbatches of B = `microbatch_size`. Window j of a split holds its tokens j·T to j·T + T, both
    included: the targets are the tokens one further on. All world sizes read the same stream.

    splits       one for each of the stream's ingredients
    batch_size   sequences a step, over all ranks
    end_of_text  closes a document; None: documents are not kept apart
    returns      read(cursor) -> Batch: tokens, targets [M B T] i64; start [M B T] i32 with `end_of_text`, else ();
                 read raises InputError when the stream ends within the batch

    Raises:  InputError when the sizes do not divide.
    """
    if batch_size % (world * microbatch_size):
        raise InputError(
            f"train.batch_size: expected a multiple of ranks x microbatch_size = {world} x {microbatch_size}, got "
            f"{batch_size}; change one of them"
        )
    share = batch_size // world
    cuts = [_cutter(split, sequence_length) for split in splits]

    def read(cursor: int) -> Batch:
        rows: list[np.ndarray] = [np.empty(0)] * share
        for chosen in select(stream, cursor + rank * share, share, key):
            for place, window in zip(chosen.places, chosen.windows, strict=True):
                rows[place] = cuts[chosen.source](window)
        return _batch(np.stack(rows), microbatch_size, end_of_text)

    return read


def held_out(
    split: Source,
    *,
    num_tokens: int,
    microbatch_size: int,
    sequence_length: int,
    rank: int,
    world: int,
    end_of_text: int | None = None,
) -> tuple[Batch, ...]:
    """This rank's part of the split's first windows, in order, for validation.

    All ranks together hold each window once: as many as fit into `num_tokens` targets and the split, at least one. A
    rank beyond the number of windows holds none.

    returns  Batches with tokens, targets [B T] i64, start as in `open_stream`; the last may have fewer sequences

    Raises:  InputError when the split is shorter than one window.
    """
    if _num_windows(split, sequence_length) < 1:
        raise InputError(
            f"{split.where}: expected at least {sequence_length + 1} tokens, one window, got {split.num_tokens}; "
            "lower train.sequence_length or prepare more text"
        )
    count = num_held_out(split, num_tokens=num_tokens, sequence_length=sequence_length)
    end = count * (rank + 1) // world
    cut = _cutter(split, sequence_length)
    batches: list[Batch] = []
    for begin in range(count * rank // world, end, microbatch_size):
        rows = np.stack([cut(window) for window in range(begin, min(begin + microbatch_size, end))])
        batches.append(tree.map(lambda path, leaf: leaf[0], _batch(rows, len(rows), end_of_text)))
    return tuple(batches)


def num_held_out(split: Source, *, num_tokens: int, sequence_length: int) -> int:
    """Windows that `held_out` cuts for all ranks together."""
    return max(1, min(num_tokens // sequence_length, _num_windows(split, sequence_length)))


def _cutter(split: Source, sequence_length: int) -> Callable[[int], np.ndarray]:
    """A function from the number of a window to its tokens, [T + 1], found without a walk over the arrays."""
    ends = list(accumulate(map(len, split.tokens)))

    def cut(window: int) -> np.ndarray:
        start = window * sequence_length
        first = bisect_right(ends, start)
        last = bisect_right(ends, start + sequence_length)
        before = ends[first - 1] if first else 0
        return order.stretch(split.tokens[first : last + 1], start - before, sequence_length + 1)

    return cut


def _batch(rows: np.ndarray, microbatch_size: int, end_of_text: int | None) -> Batch:
    """Windows [N T + 1] as a Batch of microbatches, M = N / B."""
    shape = (-1, microbatch_size, rows.shape[1] - 1)
    tokens = torch.from_numpy(rows[:, :-1].astype(np.int64)).view(shape)
    targets = torch.from_numpy(rows[:, 1:].astype(np.int64)).view(shape)
    if end_of_text is None:
        return Batch(tokens, targets, ())
    return Batch(tokens, targets, torch.from_numpy(order.starts(rows[:, :-1], end_of_text)).view(shape))


def _num_windows(split: Source, sequence_length: int) -> int:
    """Windows of `sequence_length` tokens that have a target for each."""
    return (split.num_tokens - 1) // sequence_length
