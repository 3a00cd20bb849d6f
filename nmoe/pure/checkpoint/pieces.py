"""Which part of which tensor lies where in a checkpoint: integers only.

A checkpoint holds named tensors, addressed by element of the flattened whole. How many ranks wrote it, and which part
each had, is nobody's business who reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs
from torch import Tensor

from nmoe.pure.core.layout import ArenaLayout
from nmoe.pure.core.shape import expect_member
from nmoe.pure.core.spec import Dims


@attrs.frozen(kw_only=True, eq=False)
class Piece:
    """Elements `begin` to `begin` + numel of a named tensor: what is saved, or where it is loaded to."""

    name: str
    shape: tuple[int, ...]  # of the whole, over all ranks
    begin: int
    tensor: Tensor  # contiguous, of any shape

    def end(self) -> int:
        """One past the last element."""
        return self.begin + self.tensor.numel()


@attrs.frozen(kw_only=True)
class Stored:
    """Where elements `begin` to `end` of one tensor lie: in which file, from which byte on."""

    file: str
    begin: int
    end: int
    offset: int


@attrs.frozen(kw_only=True)
class Copy:
    """`size` bytes from byte `offset` of a file to byte `to` of a piece."""

    file: str
    offset: int
    size: int
    to: int


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor that this rank has all of."""
    return Piece(name=name, shape=tuple(tensor.shape), begin=0, tensor=tensor)


def share(piece: Piece, index: int, count: int) -> Piece:
    """Of a piece that `count` ranks have alike, the part that rank `index` of them writes; maybe nothing.

    Raises:  ValueError for a rank that is not one of them.
    """
    expect_member("share: expected a rank", index, count)
    size = piece.tensor.numel()
    low, high = size * index // count, size * (index + 1) // count
    return attrs.evolve(piece, begin=piece.begin + low, tensor=piece.tensor.view(-1)[low:high])


def arena_pieces(
    layout: ArenaLayout, tensors: Mapping[str, Tensor], dims: Dims, *, rank: int, world: int, part: int = 0
) -> tuple[Piece, ...]:
    """What one rank saves of the parameters of one arena: of those that several ranks hold, its share.

    tensors      kind -> flat tensor, such as "value", "remainder", "first", "second": with the arena's offsets, or as
                 much of it as the rank has of the moments
    rank, world  of the ranks the experts are shared out to
    part         which of the ranks that share out the moments
    returns      pieces named `param/<path>/<kind>`, maybe empty; padding between parameters is in none of them
    Raises:      ValueError for a tensor of another length, or a rank that is not one of them.
    """
    expect_member("arena_pieces: expected a rank", rank, world)
    for kind, flat in tensors.items():
        if flat.numel() not in (layout.size, layout.held()):
            raise ValueError(
                f"arena_pieces: expected '{kind}' of {layout.size} elements, or of the {layout.held()} that a rank "
                f"holds, got {flat.numel()}; pass the tensors of arena {layout.name}"
            )
    pieces: list[Piece] = []
    for slot in layout.slots:
        mine = layout.share(slot, part)
        size = mine.end - mine.begin
        first = rank * slot.size() if layout.policy.shard and world > 1 else 0
        for kind, flat in tensors.items():
            start = mine.begin if flat.numel() == layout.size else mine.at
            pieces.append(
                Piece(
                    name=f"param/{slot.path}/{kind}",
                    shape=slot.spec.shape(dims),
                    begin=first + mine.begin - slot.offset if size else 0,
                    tensor=flat[start : start + size],
                )
            )
    return tuple(pieces)


def gaps(size: int, parts: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """What keeps `parts`, each `begin` and `end`, from covering 0 to `size` exactly once; nothing when they do."""
    problems: list[str] = []
    reached = 0
    for begin, end in sorted(part for part in parts if part[0] != part[1]):
        if begin > reached:
            problems.append(f"elements {reached} to {begin} are missing")
        elif begin < reached:
            problems.append(f"elements {begin} to {min(end, reached)} are there twice")
        reached = max(reached, end)
    if reached < size:
        problems.append(f"elements {reached} to {size} are missing")
    elif reached > size:
        problems.append(f"elements {size} to {reached} are beyond the end")
    return tuple(problems)


def copies(begin: int, end: int, itemsize: int, stored: Sequence[Stored]) -> tuple[Copy, ...]:
    """How elements `begin` to `end` of a tensor are put together from what is stored of it.

    stored   covers the tensor exactly once, in any order
    returns  copies in the order of their destination, which they fill without gap or overlap
    """
    parts: list[Copy] = []
    for part in sorted(stored, key=lambda part: part.begin):
        low, high = max(begin, part.begin), min(end, part.end)
        if low < high:
            parts.append(
                Copy(
                    file=part.file,
                    offset=part.offset + (low - part.begin) * itemsize,
                    size=(high - low) * itemsize,
                    to=(low - begin) * itemsize,
                )
            )
    return tuple(parts)
