"""A split of a prepared folder as one stream of tokens; a shard is verified when it is first read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from nmoe.effects.data.store.format import (
    Manifest,
    Receipt,
    content_problems,
    dtype_of,
    mapped,
    shard_problems,
    size_problems,
    split_of,
    stem,
)
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.errors import InputError


class Shard:
    """The tokens of one shard, as a 1-D array that is mapped when it is first sliced."""

    def __init__(self, where: Path, index: int, receipt: Receipt, tokenizer_size: int) -> None:
        self._where, self._index, self._receipt, self._size = where, index, receipt, tokenizer_size
        self._array: np.ndarray | None = None

    def __len__(self) -> int:
        return self._receipt.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Some tokens.

        Raises:  InputError when the shard is not what its receipt says.
        Cost:    the first time, reads and hashes the shard, about 1 GB/s.
        """
        if self._array is None:
            if problems := content_problems(self._where, self._index, self._receipt, self._size):
                raise InputError(*problems)
            path = self._where / f"{stem(self._index)}.npy"
            self._array = mapped(path, dtype_of(self._size), self._receipt.tokens)
        return self._array[part]


@attrs.frozen(kw_only=True, eq=False)
class Split:
    """The tokens of one split as one stream, memory-mapped shard by shard."""

    where: str
    tokens: tuple[Shard, ...]
    num_tokens: int


def open_split(folder: Path, manifest: Manifest, split: str) -> Split:
    """Open one split of a folder whose manifest was read; `split_problems` lists what may be wrong with the files.

    Cost:    nothing is read.
    """
    where, size = folder / split, manifest.tokenizer_size
    receipts = manifest.splits[split].shards
    return Split(
        where=str(where),
        tokens=tuple(Shard(where, index, receipt, size) for index, receipt in enumerate(receipts)),
        num_tokens=manifest.splits[split].tokens,
    )


def split_problems(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """One line for each reason not to open a split: absent, empty, or shard files missing, superfluous or truncated.

    Cost:    looks at names and sizes only, about 30 microseconds a shard.
    """
    if split not in manifest.splits or not manifest.splits[split].shards:
        filled = ", ".join(name for name, receipt in manifest.splits.items() if receipt.shards) or "none"
        return [
            f"{folder}: expected documents in the split {split}, got them in {filled}; prepare the data with more text"
        ]
    return size_problems(folder, manifest, split)


def documents(folder: Path, manifest: Manifest, tokenizer: Tokenizer, split: str) -> Iterator[np.ndarray]:
    """The documents of a split in order, without end of text: [n] u2 or u4, views of the files.

    Raises:  InputError when there is no such split, or at the first shard that is not what its receipt says.
    Cost:    reads and hashes a shard before its first document, about 1 GB/s.
    """
    return documents_of(folder / split, split_of(folder, manifest, split).shards, tokenizer)


def documents_of(where: Path, receipts: Sequence[Receipt], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """`documents` of the shards in a folder, by their receipts."""
    for index, receipt in enumerate(receipts):
        if problems := shard_problems(where, index, receipt, tokenizer):
            raise InputError(*problems)
        tokens = mapped(where / f"{stem(index)}.npy", dtype_of(tokenizer.size), receipt.tokens)
        begin = 0
        for end in mapped(where / f"{stem(index)}.ends.npy", np.dtype("<i8"), receipt.documents).tolist():
            yield tokens[begin : end - 1]
            begin = end


def content_digest(manifest: Manifest, split: str) -> str:
    """SHA-256, in hex, of which tokens a split holds, and of which tokenizer; where the folder lies does not matter."""
    digests = (shard.sha256 for shard in manifest.splits[split].shards)
    return hashlib.sha256("\n".join((manifest.tokenizer_identity, *digests)).encode()).hexdigest()
