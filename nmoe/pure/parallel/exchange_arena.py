"""The symmetric-memory arena of an expert exchange: its sizes, its fields, and the bytes it takes.

The plan predicts the arena and the exchange allocates it, both from `fields`.

W ranks · E experts of all ranks · N tokens a rank sends at once · K choices of a token · D hidden size
C rows a rank can hold for its experts (capacity) · L rows of a landing buffer
"""

from __future__ import annotations

import math

import attrs
import torch

from nmoe.pure.core.shape import expect_divisor
from nmoe.pure.formats import e4m3

FLAG_BYTES = 128
"""Of one flag: a cache line of its own, so that no rank polls a line that two ranks write."""

FIELD_BYTES = 256
"""A field begins at a multiple of it, so that every row is 16-byte aligned, which 16-byte stores need."""

GRANULARITY = 2 * 2**20
"""Bytes; symmetric memory is allocated in multiples of it (CUDA's driver)."""


@attrs.frozen(kw_only=True)
class Sizes:
    """What determines an arena; the same on every rank."""

    ranks: int
    experts: int  # of all ranks
    top_k: int
    hidden_size: int
    tokens: int  # most tokens a rank sends at once
    capacity: int  # rows a rank can hold for its experts
    dedup: bool  # whether a token goes once to each rank that needs it
    dtype: torch.dtype  # of the rows
    staged: bool = False  # whether a rank sends from its arena alone, as NVSHMEM does
    fp8: bool = False  # whether the experts multiply in fp8, for which tokens cross as codes in the forward pass

    def local(self) -> int:
        """Experts a rank holds."""
        return self.experts // self.ranks

    def landing(self) -> int:
        """Rows of a landing buffer.

        With dedup a token lands once at most, so W N rows are always enough.
        """
        return min(self.ranks * self.tokens, self.capacity) if self.dedup else self.capacity

    def outgoing(self) -> int:
        """Most rows a rank sends to where their experts are."""
        return self.tokens * (min(self.top_k, self.ranks) if self.dedup else self.top_k)


@attrs.frozen(kw_only=True)
class Field:
    """A tensor in an arena."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen(kw_only=True)
class Fields:
    """Offsets and shapes of everything in an arena. Comments name who writes; the owner of the arena reads.

    Of those that begin with `sent` the owner writes what it sends, where it is staged; else they are empty.
    """

    arrived: Field  # [W FLAG] i64, source: epochs of each source; the first word of a line counts
    counts: Field  # [W E+W] i32, source: its rows for each expert, then its tokens for each rank
    source: Field  # [C] i32, sources: with dedup, row -> place in the landing buffer
    gate: Field  # [C] f32, sources: row -> gate
    gate_gradient: Field  # [N K] f32, holders of the experts: gradient of each gate, in the order of the experts
    land: Field  # [L D], sources: rows
    land_codes: Field  # [L words] i32 in the same memory, sources: rows in fp8, if the experts multiply in it
    land_gradient: Field  # [L D], sources: rows of the output's gradient
    back: Field  # [N K D], holders: rows that return, in the order of the experts
    sent_counts: Field  # [W E+W] i32, its row of `counts` for each rank
    sent_words: Field  # [N K] i32, or [W]: words for the holders of the experts
    sent_words_back: Field  # [C] i32: words that return
    sent: Field  # [N min(K, W) D], or [N K D]: rows for the holders
    sent_back: Field  # [C D]: rows that return
    size: int  # bytes of the arena

    def allocated(self) -> int:
        """Bytes on a GPU, which allocates whole granules."""
        return -(-self.size // GRANULARITY) * GRANULARITY


def expert_rows(*, tokens: int, top_k: int, num_experts: int, ranks: int, capacity: float) -> int:
    """Rows, that is (token, expert) pairs, a rank has room for; a single rank has exactly its own.

    tokens    of one rank, in one microbatch
    capacity  room over the mean, or infinity; never more than the worst case
    Raises:   ValueError when `ranks` does not divide the number of experts.
    """
    expect_divisor("expert_rows: expected ranks", ranks, num_experts, "experts")
    if ranks == 1:
        return tokens * top_k
    return math.ceil(min(ranks * tokens * min(top_k, num_experts // ranks), capacity * tokens * top_k))


def sizes(
    *, ranks: int, experts: int, top_k: int, hidden_size: int, tokens: int, capacity: float, dedup: bool,
    dtype: torch.dtype, staged: bool = False, fp8: bool = False,
) -> Sizes:  # fmt: skip
    """Sizes with room for `capacity` times the mean rows of a rank."""
    rows = expert_rows(tokens=tokens, top_k=top_k, num_experts=experts, ranks=ranks, capacity=capacity)
    return Sizes(
        ranks=ranks,
        experts=experts,
        top_k=top_k,
        hidden_size=hidden_size,
        tokens=tokens,
        capacity=rows,
        dedup=dedup,
        dtype=dtype,
        staged=staged,
        fp8=fp8,
    )


def fields(sizes: Sizes) -> Fields:
    """Lay out an arena: the fields one after another, each at a multiple of `FIELD_BYTES`."""
    pairs, width, staged = sizes.tokens * sizes.top_k, sizes.hidden_size, int(sizes.staged)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "arrived": ((sizes.ranks, FLAG_BYTES // 8), torch.int64),
        "counts": ((sizes.ranks, sizes.experts + sizes.ranks), torch.int32),
        "source": ((sizes.capacity if sizes.dedup else 0,), torch.int32),
        "gate": ((sizes.capacity,), torch.float32),
        "gate_gradient": ((pairs,), torch.float32),
        "land": ((sizes.landing(), width), sizes.dtype),
        "land_gradient": ((sizes.landing(), width), sizes.dtype),
        "back": ((pairs, width), sizes.dtype),
        "sent_counts": ((staged * sizes.ranks, sizes.experts + sizes.ranks), torch.int32),
        "sent_words": ((staged * max(pairs, sizes.ranks),), torch.int32),
        "sent_words_back": ((staged * sizes.capacity,), torch.int32),
        "sent": ((staged * sizes.outgoing(), width), sizes.dtype),
        "sent_back": ((staged * sizes.capacity, width), sizes.dtype),
    }
    placed: dict[str, Field] = {}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        placed[name] = Field(offset=offset, shape=shape, dtype=dtype)
        offset += -(-placed[name].size() // FIELD_BYTES) * FIELD_BYTES
    words = e4m3.row_words(width) if sizes.fp8 else 0
    codes = Field(offset=placed["land"].offset, shape=(sizes.landing() if words else 0, words), dtype=torch.int32)
    return Fields(**placed, land_codes=codes, size=offset)
