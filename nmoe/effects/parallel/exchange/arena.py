"""One rank of an exchange: the arena that its peers write into, and the words that go with it.

W ranks · E experts of all ranks · N tokens · K choices of a token · D hidden size

Nothing here allocates an arena or waits for a peer: see `opening` and the two ways to run the protocol, `host` and
`device`.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from nmoe.pure.parallel.exchange_arena import Field, Fields, Sizes


class PeerError(RuntimeError):
    """A rank of the exchange did not arrive at a barrier in time."""


@attrs.frozen(kw_only=True)
class Exchange:
    """One rank's part in an exchange, open from before the first step to after the last."""

    rank: int
    sizes: Sizes
    fields: Fields
    raw: Tensor  # [bytes] u8, this rank's arena
    peers: tuple[Tensor, ...]  # every rank's arena, where the CPU reaches them; else empty
    addresses: Tensor  # [W] i64, where each rank's arena begins in this rank's address space
    epoch: Tensor  # [1] i64, barriers this rank has entered; each barrier adds one
    needed: Tensor  # [1] i32, 0, or the most rows a rank would have had to hold; written by each plan
    sent: Tensor  # [1] i64, bytes written to other ranks so far
    missing: Tensor  # [1] i32 in memory that the host can read when the device is gone: a missing rank + 1, or 0
    stream: torch.cuda.Stream | None  # side stream, for rows sent in overlap with GEMMs; None on a CPU
    timeout_s: float
    programs: int  # that push rows when nothing else runs


def fit(e: Exchange, x: Tensor, expert: Tensor, up: Tensor) -> None:
    """Refuse what has no place in the arena, before anything is written.

    x        [N D]
    expert   [N K]
    up       [E/W ...]
    Raises:  ValueError with each size that is wrong.
    """
    s = e.sizes
    tokens, width = x.shape
    conditions = {
        f"expected rows of width {s.hidden_size}, got {width}": width == s.hidden_size,
        f"expected rows of {s.dtype}, got {x.dtype}": x.dtype == s.dtype,
        f"expected at most {s.tokens} tokens, got {tokens}": tokens <= s.tokens,
        f"expected {s.top_k} choices for each token, got {tuple(expert.shape)}": expert.shape == (tokens, s.top_k),
        f"expected {s.local()} experts on this rank, got {up.shape[0]}": up.shape[0] == s.local(),
    }
    wrong = [text for text, holds in conditions.items() if not holds]
    if wrong:
        raise ValueError(
            f"exchange on rank {e.rank}: {'; '.join(wrong)}; open the exchange with the sizes it is used with"
        )


def view(raw: Tensor, field: Field) -> Tensor:
    """A field of an arena.

    raw      [bytes] u8
    """
    return raw[field.offset : field.offset + field.size()].view(field.dtype).view(field.shape)
