"""Batches: the windows that `pure.mixture` names, cut from a split's tokens.

The only state is the cursor, the number of sequences all ranks together have consumed; the caller keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nmoe.errors import InputError
from nmoe.pure import mixture
from nmoe.pure.key import Key
from nmoe.pure.model import Batch

__all__ = ["Source", "held_out", "open_loader"]


class Source(Protocol):
    """What a loader asks of a split: its name for messages, and its tokens as arrays laid end to end."""

    @property
    def where(self) -> str: ...
    @property
    def tokens(self) -> Sequence[np.ndarray]: ...
    @property
    def num_tokens(self) -> int: ...


def open_loader(
    split: Source,
    *,
    batch_size: int,
    microbatch_size: int,
    sequence_length: int,
    rank: int,
    world: int,
    key: Key,
) -> Callable[[int], Batch]:
    """A function from the cursor to this rank's part of the global batch that begins there.

    The global batch is the next `batch_size` windows of the shuffled stream; rank r of `world` reads the r-th of as
    many equal parts, cut into M microbatches of B = `microbatch_size`. Window j holds tokens j·T to j·T + T, both
    included: its targets are its tokens one further on. All world sizes read the same stream.

    batch_size  sequences a step, over all ranks
    returns     read(cursor) -> Batch: tokens, targets [M B T] i64

    Raises:  InputError when the sizes do not divide or the split is shorter than one window.
    """
    problems: list[str] = []
    if batch_size % (world * microbatch_size):
        problems.append(
            f"train.batch_size: a multiple of ranks x microbatch_size = {world} x {microbatch_size}, got {batch_size}; "
            "change one of them"
        )
    problems += _length_problems(split, sequence_length)
    if problems:
        raise InputError(*problems)
    count = _num_windows(split, sequence_length)
    share = batch_size // world

    def read(cursor: int) -> Batch:
        chosen = mixture.windows(cursor + rank * share, share, count, key)
        batch = _cut(split, chosen.tolist(), sequence_length)
        return Batch(
            batch.tokens.view(-1, microbatch_size, sequence_length),
            batch.targets.view(-1, microbatch_size, sequence_length),
            (),
        )

    return read


def held_out(
    split: Source, *, num_tokens: int, microbatch_size: int, sequence_length: int, rank: int, world: int
) -> tuple[Batch, ...]:
    """This rank's part of the split's first windows, in order, for validation.

    All ranks together hold each window once: as many as fit into `num_tokens` targets and the split, at least one. A
    rank beyond the number of windows holds none.

    returns  Batches with tokens, targets [B T] i64; the last may have fewer sequences

    Raises:  InputError when the split is shorter than one window.
    """
    if problems := _length_problems(split, sequence_length):
        raise InputError(*problems)
    count = max(1, min(num_tokens // sequence_length, _num_windows(split, sequence_length)))
    end = count * (rank + 1) // world
    return tuple(
        _cut(split, range(begin, min(begin + microbatch_size, end)), sequence_length)
        for begin in range(count * rank // world, end, microbatch_size)
    )


def _cut(split: Source, chosen: Iterable[int], sequence_length: int) -> Batch:
    """The chosen windows: tokens, targets [B T] i64."""
    rows = [mixture.stretch(split.tokens, window * sequence_length, sequence_length + 1) for window in chosen]
    whole: Tensor = torch.from_numpy(np.stack(rows).astype(np.int64))
    return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), ())


def _num_windows(split: Source, sequence_length: int) -> int:
    """Windows of `sequence_length` tokens that have a target for each."""
    return (split.num_tokens - 1) // sequence_length


def _length_problems(split: Source, sequence_length: int) -> list[str]:
    """A line when the split is shorter than one window."""
    if _num_windows(split, sequence_length) >= 1:
        return []
    return [
        f"{split.where}: at least {sequence_length + 1} tokens, one window, got {split.num_tokens}; "
        "lower train.sequence_length or prepare more text"
    ]
