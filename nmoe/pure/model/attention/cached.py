"""What the caches of all kinds share: where new tokens go, what they see, and how rows of a cache are written.

B sequences · T new tokens · S places of a cache that are read
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmoe.pure.core.tree import record
from nmoe.pure.model.rope import Documents


@record
class New:
    """The new tokens of a decoding, and what of a cache they read."""

    documents: Documents  # [B T] each; `start` is counted from the first token of the row, cached ones included
    place: Tensor  # [T] i64, in the row and in a cache that has a row a token
    visible: Tensor  # [B T S] bool, which of the first S tokens of its row each sees
    store: Callable[[Tensor, Tensor, Tensor], Tensor]  # `stored`, or what writes in place

    def reach(self) -> int:
        """S: a host's number, so that shapes are known; at least the tokens that there are, new ones included."""
        return self.visible.shape[-1]


def stored(cache: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """The cache with new rows at their places.

    cache    [B N ...]
    rows     [B T ...]
    place    [T] i64
    returns  [B N ...]
    """
    return cache.index_copy(1, place, rows)


def new_tokens(
    before: Tensor,
    shape: Sequence[int],
    padding: Tensor,
    reach: int,
    store: Callable[[Tensor, Tensor, Tensor], Tensor] = stored,
) -> New:
    """Tokens that follow `before` others in every row.

    before   0-d i64
    shape    B, T
    padding  [B] i32, tokens in front of each row that count for nothing: each sees itself alone
    reach    tokens of a row that may be read, at least all there are
    """
    place = before + torch.arange(shape[1], device=before.device)
    at = place.to(torch.int32).expand(shape)
    start = torch.minimum(at, padding[:, None])
    key = torch.arange(reach, dtype=torch.int32, device=before.device)
    visible = (key <= at[..., None]) & (key >= start[..., None])
    return New(Documents(start, at - start), place, visible, store)


def visible_last(new: Documents, num_keys: int, window: int) -> Tensor:
    """Which of the last `num_keys` keys each new token sees in a window, the keys of the new tokens being the last.

    new       as in `New`
    window    keys a token sees, its own included
    returns   [B T num_keys] bool; of a row that has fewer tokens, the first keys are none
    """
    query = new.start + new.position
    key = query[:, -1:] + torch.arange(1 - num_keys, 1, dtype=query.dtype, device=query.device)
    visible = (key[:, None] <= query[..., None]) & (key[:, None] >= new.start[..., None])
    return visible & (key[:, None] > query[..., None] - window)
