"""What the sparse kinds share: blocks of queries, masked softmax, the best of many, rows by their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nmoe.pure.model.norm import upcast

WORKSPACE = 24 * 2**20
"""Bytes that a device's kernels may take at once for what is made of so many queries at a time."""

SHARE = 1024
"""Readers of a selected block that one program goes through: the first block of a row has every query for a reader."""

SHARERS = 16
"""Programs that share the queries of a block of compressed keys, of which there are few."""


def query_blocks(length: int, queries: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each block of so many queries."""
    return ((begin, min(begin + queries, length)) for begin in range(0, length, queries))


def again(attend: Callable[..., Any], *arguments: Any) -> Any:
    """`attend` of the arguments, which are all that is kept; the backward pass runs it again."""
    return checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False)


def softmax(score: Tensor, hidden: Tensor) -> Tensor:
    """Probabilities over the last dimension, in fp32 at least; zeros of a query from which everything is hidden."""
    score = upcast(score)
    return score.masked_fill(hidden, torch.finfo(score.dtype).min).softmax(-1).masked_fill(hidden, 0)


def best(score: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores above -inf; of equal ones the lower.

    score    [... n]
    returns  [... S] i32, ascending, then -1 where there are fewer; S = min(count, n)
    """
    value, index = (part[..., :count] for part in score.sort(dim=-1, descending=True, stable=True))
    index = index.masked_fill(value == -torch.inf, score.shape[-1]).sort(dim=-1).values
    return index.masked_fill(index == score.shape[-1], -1).int()


def gathered(x: Tensor, at: Tensor) -> Tensor:
    """The rows of each head at some places.

    x        [B K T C]
    at       [B K ...] i64, may broadcast
    returns  [B K ... C]
    """
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], *(1,) * (at.ndim - 2))
    return F.embedding(at + rows * x.shape[2], x.reshape(-1, x.shape[-1]))
