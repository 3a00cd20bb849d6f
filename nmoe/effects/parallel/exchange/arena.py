"""One rank of an exchange: the arena that its peers write into, and the transport that carries rows and words there.

W ranks · E experts of all ranks · N tokens · K choices of a token · D hidden size · M items of a put

Nothing here allocates an arena or waits for a peer: see `opening`, the two ways to run the protocol, `host` and
`device`, and `proxy` and `nvshmem`, which reach other hosts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import attrs
import torch
from torch import Tensor

from nmoe.errors import InputError
from nmoe.pure.parallel.exchange_arena import Field, Fields, Sizes


class PeerError(RuntimeError):
    """A rank of the exchange did not arrive at a barrier in time."""


@attrs.frozen(kw_only=True)
class Put:
    """Rows or words for places in a field of other ranks' arenas."""

    field: Field
    values: Tensor  # [M D] rows, or words of 4 bytes, counted through
    to: Tensor  # [M K] rank for each place; W: nowhere
    at: Tensor  # [M K] place in the field
    valid: Tensor | None = None  # [3] i32, `Plan.valid`: how many of all these a device sends; None: all
    back: bool = False  # whether they return to their sources, so that the third of `valid` counts
    item: Tensor | None = None  # i32, order of all places in which neighbours lie side by side; None: as they are
    programs: int = 0  # of a device, that push rows

    def places(self) -> tuple[Tensor, Tensor]:
        """`to` and `at` as [M K]."""
        if self.values.dim() > 1 and self.to.dim() > 1:
            return self.to, self.at
        return self.to.flatten()[:, None], self.at.flatten()[:, None]


class Barrier(Protocol):
    """Signal every rank that the puts before are written, wait for the signals of all, or both."""

    def __call__(self, e: Exchange, *, signal: bool, wait: bool) -> None:
        """Writes: this rank's flag in all arenas, `e.epoch`. Raises: PeerError, on a CPU, for a rank that is late."""
        ...


@attrs.frozen(kw_only=True)
class Transport:
    """What carries rows and words into the arenas of other ranks.

    The plan, the kernels of the experts and the order of all sums are the same over each: a put names ranks and places,
    and what it carried is there for whoever has waited for the signal that follows it.
    """

    put_rows_: Callable[[Exchange, Put], None]
    put_words_: Callable[[Exchange, Put], None]
    put_counts_: Callable[[Exchange, Tensor, Tensor | None], None]  # [E] pairs of each expert, [W ...] tokens by rank
    barrier_: Barrier
    flush: Callable[[Exchange], None]  # the host waits until every put that was signalled has left this process
    direct: bool = False  # whether kernels reach the arenas of all ranks


@attrs.frozen(kw_only=True)
class Relay:
    """Words between what runs on a rank's stream and the threads of its process, in memory of the host.

    All three act in the order of the stream.
    """

    ring_: Callable[[Exchange, Tensor], None]  # [1] i64 gets the epoch, after everything before is written
    await_: Callable[[Exchange, Tensor, Sequence[int]], None]  # [W] i64 has the epoch for each of these ranks
    pass_on_: Callable[[Exchange, Sequence[int]], None]  # the flags of these ranks, in the arenas of this host


@attrs.frozen(kw_only=True)
class Exchange:
    """One rank's part in an exchange, open from before the first step to after the last."""

    rank: int
    sizes: Sizes
    fields: Fields
    raw: Tensor  # [bytes] u8, this rank's arena
    hosts: tuple[str, ...]  # of each rank, the name of its host; neighbours, equally many a host
    transport: Transport
    peers: tuple[Tensor | None, ...]  # arenas of the ranks of this host, where the CPU reaches them; else empty
    addresses: Tensor  # [W] i64, where each rank's arena begins in this rank's address space; 0: stores do not reach it
    epoch: Tensor  # [1] i64, barriers this rank has entered; each barrier adds one
    needed: Tensor  # [1] i32, 0, or the most rows a rank would have had to hold; written by each plan
    sent: Tensor  # [1] i64, bytes written to other ranks so far
    missing: Tensor  # [1] i32 in memory that the host can read when the device is gone: a missing rank + 1, or 0
    lost: Tensor  # [W] bool on the host: ranks to which the connection broke
    stream: torch.cuda.Stream | None  # side stream, for rows sent in overlap with GEMMs; None on a CPU
    timeout_s: float
    programs: int  # most that push rows
    within: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()  # part of a step's time

    def named(self, ranks: Sequence[int]) -> str:
        """What messages call ranks of this exchange."""
        return named(ranks, self.hosts)


def named(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """`rank 3`, or `ranks 2, 3 on host b` where there are several hosts.

    hosts  of each rank; none: not known
    """
    text = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    if len(set(hosts)) < 2:
        return text
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{text} on host{'s' if len(names) > 1 else ''} {', '.join(names)}"


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


def store_(arena: Tensor, field: Field, at: Tensor, values: Tensor) -> None:
    """Copy rows or words to their places in a field of an arena.

    arena    [bytes] u8
    at       [M] i64
    values   [M D] rows, or [M] words of a field that is counted through
    Writes:  that field.
    """
    target = view(arena, field)
    (target.view(-1) if values.dim() == 1 else target).index_copy_(0, at, values)


def check(e: Exchange) -> None:
    """Whether every rank could hold its rows so far. Waits for the device.

    Raises:  InputError, the same on all ranks, with the capacity it takes.
    """
    needed = int(e.needed)
    if needed:
        s = e.sizes
        mean = s.tokens * s.top_k
        raise InputError(
            f"parallel.capacity: expected at most {s.capacity} rows on a rank ({s.capacity / mean:.2f} x the "
            f"mean), got {needed} "
            f"on one; set it to {needed / mean + 0.005:.2f} or more, or to 0 for what can come at the worst"
        )


def fence() -> None:
    """Order what this thread reads and writes before and after it, on processors that reorder too.

    What comes before a lock's release stays before it, what comes after the next acquire after it.
    """
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire()
        lock.release()
