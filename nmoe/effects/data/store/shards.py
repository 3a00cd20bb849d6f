"""A split of a prepared folder as one stream of tokens, whose blocks are verified before they are first read.

Of several ranks each verifies the files it owns, in the background too, and trusts the others' ranks for the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from nmoe.effects import files
from nmoe.effects.data.store.blocks import Blocks
from nmoe.effects.data.store.format import (
    HEADER_BYTES,
    Manifest,
    Receipt,
    dtype_of,
    header,
    header_problems,
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

    def __init__(self, path: Path, receipt: Receipt, tokenizer_size: int, *, owned: bool) -> None:
        """owned: blocks are verified here, not by another rank."""
        self._path, self._length, self._dtype = path, receipt.tokens, dtype_of(tokenizer_size)
        size = self._length * self._dtype.itemsize
        self.blocks = Blocks(path, HEADER_BYTES, size, self._dtype, tokenizer_size) if owned else None
        self._array: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Some tokens.

        Raises:  InputError when the header, or a block that they are in, is not what was written.
        Cost:    reads and hashes blocks the first time, about 1 GB/s.
        """
        if self._array is None:
            with files.refusing(self._path, "a readable file of tokens"):
                if problems := header_problems(self._path, header(self._dtype, self._length)):
                    raise InputError(*problems)
                self._array = mapped(self._path, self._dtype, self._length)
        if self.blocks is not None:
            first, last, _ = part.indices(self._length)
            self.blocks.verify(first * self._dtype.itemsize, last * self._dtype.itemsize)
        return self._array[part]


@attrs.frozen(kw_only=True, eq=False)
class Split:
    """The tokens of one split as one stream, memory-mapped shard by shard."""

    where: str
    tokens: tuple[Shard, ...]
    num_tokens: int

    def blocks(self) -> list[Blocks]:
        """Of the shards that this rank owns."""
        return [shard.blocks for shard in self.tokens if shard.blocks is not None]


def open_split(folder: Path, manifest: Manifest, split: str, *, rank: int = 0, world: int = 1) -> Split:
    """Open one split of a folder whose manifest was read; `split_problems` lists what may be wrong with the files.

    rank     of `world`: owns each `world`-th shard from this one on
    Cost:    nothing is read.
    """
    where, size = folder / split, manifest.tokenizer_size
    return Split(
        where=str(where),
        tokens=tuple(
            Shard(where / f"{stem(index)}.npy", receipt, size, owned=index % world == rank % world)
            for index, receipt in enumerate(manifest.splits[split].shards)
        ),
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
