"""What a rank of an exchange holds: one arena that its peers write into, cut into fields at places all know.

Nothing here allocates an arena or waits for a peer: see `opening` and the two ways to run the protocol, `host` and
`device`.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from nmoe.pure.parallel.exchange_arena import Field, Fields, Sizes


class PeerError(RuntimeError):
    """A rank of the exchange did not come."""


@attrs.frozen(kw_only=True)
class Exchange:
    """One rank's part in an exchange, open from before the first step to after the last."""

    rank: int
    sizes: Sizes
    fields: Fields
    raw: Tensor  # [bytes] u8, this rank's arena
    peers: tuple[Tensor, ...]  # every rank's arena, where the CPU reaches them; else empty
    addresses: Tensor  # [R] i64, where each rank's arena begins in this rank's address space
    epoch: Tensor  # [1] i64, phases this rank has ended; written by each phase
    needed: Tensor  # [1] i32, 0, or the most rows a rank would have had to hold; written by each plan
    sent: Tensor  # [1] i64, bytes written to other ranks so far
    missing: Tensor  # [1] i32 in memory that the host can read when the device is gone: a missing rank + 1, or 0
    stream: torch.cuda.Stream | None  # on which rows fly beside other work; None on a CPU
    timeout_s: float
    programs: int  # how many programs push rows; fewer leave multiprocessors to other work


def fit(e: Exchange, x: Tensor, expert: Tensor, up: Tensor) -> None:
    """Refuse what has no place in the arena, before anything is written.

    x        [N D]
    expert   [N K]
    up       [E/R ...]
    Raises:  ValueError with each size that is wrong.
    """
    s = e.sizes
    tokens, width = x.shape
    found = {
        f"a row is {s.hidden_size} wide, got {width}": width == s.hidden_size,
        f"rows are {s.dtype}, got {x.dtype}": x.dtype == s.dtype,
        f"at most {s.tokens} tokens, got {tokens}": tokens <= s.tokens,
        f"{s.top_k} choices for each token, got {tuple(expert.shape)}": expert.shape == (tokens, s.top_k),
        f"{s.local()} experts on this rank, got {up.shape[0]}": up.shape[0] == s.local(),
    }
    wrong = [text for text, holds in found.items() if not holds]
    if wrong:
        raise ValueError(
            f"exchange on rank {e.rank}: {'; '.join(wrong)}; open the exchange with the sizes it is used with"
        )


def view(raw: Tensor, field: Field) -> Tensor:
    """A field of an arena.

    raw      [bytes] u8
    """
    return raw[field.offset : field.offset + field.size()].view(field.dtype).view(field.shape)
