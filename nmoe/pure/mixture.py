"""Which tokens come next: integers in, integers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe.pure.key import Key

__all__ = ["starts", "stretch", "windows"]

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


def stretch(arrays: Sequence[NDArray[Any]], start: int, count: int) -> NDArray[Any]:
    """Elements `start` to `start` + `count` of 1-D arrays laid end to end, as a copy."""
    pieces: list[NDArray[Any]] = []
    for array in arrays:
        pieces.append(array[max(start, 0) : max(start + count, 0)])
        start -= len(array)
    return np.concatenate(pieces)


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
