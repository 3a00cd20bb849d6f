"""What a rank of an exchange holds: one arena that its peers write into, cut into fields at places all know.

Nothing here allocates an arena or waits for a peer: see `opening` and the two ways to run the protocol, `host` and
`device`.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

FLAG_BYTES = 128
"""Room of one flag: a cache line of its own, so that a rank polls nothing that another one writes beside it."""

FIELD_BYTES = 256
"""Where a field begins is a multiple of it; every row then is a multiple of 16 bytes, which stores of 16 bytes need."""


class PeerError(RuntimeError):
    """A rank of the exchange did not come."""


@attrs.frozen(kw_only=True)
class Sizes:
    """What the arena is cut by; the same on every rank."""

    ranks: int
    experts: int  # of all ranks
    top_k: int
    hidden_size: int
    tokens: int  # most tokens a rank sends at once
    capacity: int  # rows a rank can hold for its experts
    dedup: bool  # whether a token goes once to each rank that needs it
    dtype: torch.dtype  # of the rows

    def local(self) -> int:
        """Experts a rank holds."""
        return self.experts // self.ranks

    def landing(self) -> int:
        """Rows of a landing buffer.

        With dedup at most every token of every rank lands, and each that does has a row: it can never be too small.
        """
        return min(self.ranks * self.tokens, self.capacity) if self.dedup else self.capacity


@attrs.frozen(kw_only=True)
class Field:
    """A tensor in an arena."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


@attrs.frozen(kw_only=True)
class Fields:
    """Where everything lies in an arena; whoever writes is named, the owner of the arena reads."""

    arrived: Field  # [R FLAG] i64, source: epochs of each source, the first word of each line counts
    counts: Field  # [R E+R] i32, source: its rows for each expert, then its tokens for each rank
    source: Field  # [C] i32, sources: with dedup, row -> place in the landing buffer
    gate: Field  # [C] f32, sources: row -> gate
    gate_gradient: Field  # [N K] f32, holders of the experts: row in the order of the experts -> gradient of its gate
    land: Field  # [landing D], sources: rows
    land_gradient: Field  # [landing D], sources: rows of the output's gradient
    back: Field  # [N K D], holders: rows that come back, in the order of the experts
    size: int  # bytes of the arena


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


def fields(sizes: Sizes) -> Fields:
    """Cut an arena up."""
    pairs, width = sizes.tokens * sizes.top_k, sizes.hidden_size
    words = FLAG_BYTES // 8
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "arrived": ((sizes.ranks, words), torch.int64),
        "counts": ((sizes.ranks, sizes.experts + sizes.ranks), torch.int32),
        "source": ((sizes.capacity if sizes.dedup else 0,), torch.int32),
        "gate": ((sizes.capacity,), torch.float32),
        "gate_gradient": ((pairs,), torch.float32),
        "land": ((sizes.landing(), width), sizes.dtype),
        "land_gradient": ((sizes.landing(), width), sizes.dtype),
        "back": ((pairs, width), sizes.dtype),
    }
    found: dict[str, Field] = {}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        found[name] = Field(offset=offset, shape=shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        offset += -(-size // FIELD_BYTES) * FIELD_BYTES
    return Fields(**found, size=offset)


def view(raw: Tensor, field: Field) -> Tensor:
    """A field of an arena.

    raw      [bytes] u8
    """
    size = math.prod(field.shape) * field.dtype.itemsize
    return raw[field.offset : field.offset + size].view(field.dtype).view(field.shape)
