"""A split opened at once, whatever its size: a shard is read whole, and verified, when it is first sliced."""

from __future__ import annotations

import hashlib
from pathlib import Path

import attrs
import numpy as np

from nmoe.effects.data.store.format import Manifest, Receipt, content_problems, dtype_of, mapped, size_problems, stem
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
class LazySplit:
    """The tokens of one split as one stream."""

    where: str
    tokens: tuple[Shard, ...]
    num_tokens: int


def open_lazily(folder: Path, manifest: Manifest, split: str) -> LazySplit:
    """Open one split of a folder whose manifest was read; `split_problems` says what may be wrong with it.

    Cost:    nothing is read.
    """
    receipt = manifest.splits[split]
    where = folder / split
    shards = (Shard(where, index, each, manifest.tokenizer_size) for index, each in enumerate(receipt.shards))
    return LazySplit(where=str(where), tokens=tuple(shards), num_tokens=receipt.tokens)


def split_problems(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """One line for each reason not to open a split: absent, empty, or shard files missing, superfluous or truncated.

    Cost:    looks at names and sizes only, about 30 microseconds a shard.
    """
    if split not in manifest.splits or not manifest.splits[split].shards:
        has = ", ".join(name for name, each in manifest.splits.items() if each.shards) or "none"
        return [f"{folder}: documents in the split {split}, got them in {has}; prepare the data with more text"]
    return size_problems(folder, manifest, split)


def content_digest(manifest: Manifest, split: str) -> str:
    """SHA-256, in hex, of which tokens a split holds, and of which tokenizer; where it lies does not matter."""
    digests = (shard.sha256 for shard in manifest.splits[split].shards)
    return hashlib.sha256("\n".join((manifest.tokenizer_identity, *digests)).encode()).hexdigest()
