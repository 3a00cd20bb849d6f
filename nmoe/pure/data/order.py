"""Which tokens come next: integers in, integers out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.core.shape import expect_shape

# Four rounds make a Feistel network pseudo-random in theory; twice that keeps tiny domains well mixed too.
ROUNDS = 8


def windows(first: int, num: int, count: int, key: Key) -> NDArray[np.int64]:
    """Which windows of a source the shuffled stream reads at its positions `first` to `first` + `num`.

    The stream runs through all `count` windows, in another order every epoch, for ever. Every position is computed by
    itself: nothing is held, any stretch can be asked for, and no machine or number of ranks changes the answer.

    count    windows of the source, 1 <= count < 2**62
    returns  [num] i64, each 0 <= window < count
    """
    epochs: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    position, end = first, first + num
    while position < end:
        epoch, offset = divmod(position, count)
        taken = min(count - offset, end - position)
        epochs.append(_shuffled(np.arange(offset, offset + taken, dtype=np.uint64), count, key.fold(epoch)))
        position += taken
    return np.concatenate(epochs)


def kept(first: int, num: int, left_out: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Where positions `first` to `first` + `num` lie in a stream of which stretches are left out.

    left_out  first and end of each stretch in the stream, in order, apart from each other
    returns   first position and length of each piece in the stream, in order
    """
    pieces: list[tuple[int, int]] = []
    position, left = first, num  # a position counts what is kept until the stretches before it are added
    for begin, end in left_out:
        if left and position < begin:
            taken = min(left, begin - position)
            pieces.append((position, taken))
            position, left = position + taken, left - taken
        if position >= begin:
            position += end - begin
    return (*pieces, (position, left)) if left else tuple(pieces)


def quotas(weights: Sequence[float], total: int, limits: Sequence[int]) -> tuple[int, ...]:
    """Shares of `total` in proportion to `weights`, as whole numbers that add up to it exactly.

    What a share has above its limit goes to the others in proportion. Shares are rounded by largest remainder; of equal
    remainders the first wins. Weights are taken as the exact numbers they are, so that every machine finds the same.

    weights  >= 0 and finite; of weight 0 the share is 0
    limits   >= 0, the largest share of each

    Raises:  InputError when all limits together leave something of `total`, ValueError for another number of limits
             than of weights.
    """
    expect_shape("quotas: expected limits", (len(limits),), (len(weights),), "pass a limit for each weight")
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    shares = [0] * len(parts)
    left, mass = total, sum(parts)
    waiting = sorted(
        (index for index, part in enumerate(parts) if part), key=lambda index: Fraction(limits[index], parts[index])
    )
    full = 0
    for index in waiting:  # who reaches his limit first comes first
        if parts[index] * left <= limits[index] * mass:
            break
        shares[index] = limits[index]
        left, mass, full = left - limits[index], mass - parts[index], full + 1
    rest = sorted(waiting[full:])
    if left and not rest:
        raise InputError(
            f"quotas: expected limits of {total} at least together, got {total - left}; raise a limit or lower the "
            "total"
        )
    for index in rest:
        shares[index] = parts[index] * left // mass
    missing = total - sum(shares)
    for index in sorted(rest, key=lambda index: -(parts[index] * left % mass))[:missing]:
        shares[index] += 1
    return tuple(shares)


@attrs.frozen(kw_only=True)
class Turns:
    """Whose turn it is: a binary tree over sources, whose inner nodes split their positions between two sides.

    source   number of the source at a leaf, -1 at an inner node
    count    positions the node has
    """

    source: int = -1
    count: int
    left: Turns | None = None
    right: Turns | None = None


def turns(shares: Sequence[int]) -> Turns:
    """The order in which sources take turns, each as often as its share says; smooth weighted round-robin.

    A source of share 0 has no turn. Every node spreads its left side over its positions as evenly as whole numbers
    allow, by rounding; the tree is Huffman's, so that large shares are near the root. After any number of positions a
    source is within 1.7 turns of its exact part, however many sources there are: a node adds half a turn at most, which
    reaches a leaf in proportion to the leaf's part of the node, and those parts fall as Fibonacci's numbers grow.
    Unlike the round-robin that keeps a counter a source, it can be asked for any position.

    shares   >= 0, one at least > 0
    Source:  Huffman, A method for the construction of minimum-redundancy codes (1952).
    """
    nodes = [(share, index, Turns(source=index, count=share)) for index, share in enumerate(shares) if share]
    if not nodes:
        raise InputError("turns: expected a share above 0, got none; raise one")
    heapq.heapify(nodes)
    number = len(shares)
    while len(nodes) > 1:
        small, _, right = heapq.heappop(nodes)
        large, _, left = heapq.heappop(nodes)
        # the order of creation settles ties, and so which tree it is
        heapq.heappush(nodes, (small + large, number, Turns(count=small + large, left=left, right=right)))
        number += 1
    return nodes[0][2]


def source_at(tree: Turns, position: int) -> tuple[int, int]:
    """The source of `position`, and how many positions that source had before.

    position  0 <= position < tree.count
    Cost:     the depth of the leaf, about log2(count / share) small integer divisions.
    """
    while tree.left is not None and tree.right is not None:
        before, after = _left(tree, position), _left(tree, position + 1)
        tree, position = (tree.left, before) if after > before else (tree.right, position - before)
    return tree.source, position


def taken(tree: Turns, positions: int, num_sources: int) -> tuple[int, ...]:
    """How many of the first `positions` turns each source has."""
    counts = [0] * num_sources
    nodes = [(tree, positions)]
    while nodes:
        node, count = nodes.pop()
        if node.left is not None and node.right is not None:
            first = _left(node, count)
            nodes += [(node.left, first), (node.right, count - first)]
        else:
            counts[node.source] = count
    return tuple(counts)


def _left(tree: Turns, positions: int) -> int:
    """How many of a node's first `positions` its left side has: its part, rounded."""
    part = 0 if tree.left is None else tree.left.count
    return (2 * positions * part + tree.count) // (2 * tree.count)


class Tokens(Protocol):
    """A 1-D array, as far as it is needed to cut it."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


def stretch(arrays: Sequence[Tokens], start: int, count: int) -> NDArray[Any]:
    """Elements `start` to `start` + `count` of 1-D arrays laid end to end, as a copy.

    Raises:  ValueError when the arrays do not hold all of them.
    """
    pieces: list[NDArray[Any]] = []
    first = start
    for array in arrays:
        # an array outside the stretch is not touched: slicing a shard for the first time reads and hashes it
        if start < len(array) and start + count > 0:
            pieces.append(array[max(start, 0) : start + count])
        start -= len(array)
    joined = np.concatenate(pieces or [arrays[0][:0]])
    if len(joined) != count:
        raise ValueError(
            f"stretch: expected arrays of at least {first + count} elements, got {first - start}; ask for fewer"
        )
    return joined


def starts(tokens: NDArray[Any], end_of_text: int) -> NDArray[np.int32]:
    """Index in its row of the first token of each token's document; 0 for a document that began before the row.

    tokens   [B T]       end of text is the last token of its document and stands nowhere else
    returns  [B T] i32   does not decrease along T
    """
    first = np.zeros(tokens.shape, dtype=np.int32)
    after = np.arange(1, tokens.shape[1], dtype=np.int32)
    np.multiply(tokens[:, :-1] == end_of_text, after, out=first[:, 1:])
    return np.maximum.accumulate(first, axis=1)


def _shuffled(positions: NDArray[np.uint64], count: int, key: Key) -> NDArray[np.int64]:
    """Where a permutation of 0..`count` - 1 sends each position.

    A Feistel network permutes the smallest square that holds `count`; what falls outside is sent on until it is inside
    (cycle walking), which is rare because the square is hardly larger.

    Source:  Black and Rogaway, Ciphers with arbitrary finite domains (2002).
    """
    side = math.isqrt(count - 1) + 1
    keys = [key.fold(round).seed() for round in range(ROUNDS)]
    places = _feistel(positions, side, keys)
    outside = places >= count
    while outside.any():
        places[outside] = _feistel(places[outside], side, keys)
        outside = places >= count
    return places.astype(np.int64)


def _feistel(x: NDArray[np.uint64], side: int, keys: Sequence[int]) -> NDArray[np.uint64]:
    """A permutation of 0..`side`**2 - 1: two digits of base `side`, each in turn shifted by a hash of the other."""
    base = np.uint64(side)
    left, right = x // base, x % base
    for key in keys:
        left, right = right, (left + _mix(right + np.uint64(key)) % base) % base
    return left * base + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of `x`.

    Source:  finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
