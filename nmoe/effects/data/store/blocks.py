"""Digests of the blocks of a shard: a training verifies what it touches of a shard, not all of it.

    <split>/shard-00000.blocks   SHA-256 of each block of the token array behind its header, in hex, a line each

They lie beside the shard, not in the manifest: ten trillion tokens have 1.2 million blocks, whose digests would be 80
MB to parse at each start of each rank.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nmoe.effects import files
from nmoe.errors import InputError

BLOCK_BYTES = 16 * 2**20
"""Of tokens; about 10 ms to hash. The last block of a shard may be shorter."""

LINE_BYTES = 65
"""Of one digest and the end of its line."""

ENDING = ".blocks"


class Hasher:
    """Digests of the blocks of a stream of bytes."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES

    def update(self, content: bytes) -> None:
        """Take more bytes, of any number."""
        rest = memoryview(content)
        while len(rest) > self._room:
            self._open.update(rest[: self._room])
            self._digests.append(self._open.hexdigest())
            rest = rest[self._room :]
            self._open, self._room = hashlib.sha256(), BLOCK_BYTES
        self._open.update(rest)
        self._room -= len(rest)

    def text(self) -> str:
        """What the file of digests holds, of at least one byte."""
        return "".join(f"{digest}\n" for digest in (*self._digests, self._open.hexdigest()))


def num_blocks(num_bytes: int) -> int:
    """Blocks of so many bytes of tokens."""
    return -(-num_bytes // BLOCK_BYTES)


def digests(file: BinaryIO) -> tuple[str, str]:
    """SHA-256, in hex, of the rest of a file, and the text of the digests of its blocks. Cost: about 0.5 GB/s."""
    whole, hasher = hashlib.sha256(), Hasher()
    while content := file.read(BLOCK_BYTES):
        whole.update(content)
        hasher.update(content)
    return whole.hexdigest(), hasher.text()


class Blocks:
    """Which blocks of one token file are known to be whole."""

    def __init__(self, path: Path, begin: int, num_bytes: int, dtype: np.dtype[Any], limit: int) -> None:
        """begin: of the array in the file; limit: all ids are below it."""
        self.path, self.count = path, num_blocks(num_bytes)
        self._begin, self._num_bytes, self._dtype, self._limit = begin, num_bytes, dtype, limit
        self._digests: Sequence[str] = ()
        self._known: set[int] = set()

    def verify(self, first: int, last: int) -> None:
        """Verify the blocks of the bytes [first, last) of the array that were not verified yet.

        Raises:  InputError for the first that is not as it was written.
        """
        for block in range(first // BLOCK_BYTES, num_blocks(min(last, self._num_bytes))):
            if block not in self._known:
                self.verify_block(block)
                self._known.add(block)

    def verify_block(self, block: int) -> None:
        """Read a block and compare it with what was written.

        Raises:  InputError when it differs, holds an id that is none, or cannot be read.
        """
        begin = block * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, self._num_bytes)
        with files.refusing(self.path, "a readable file of tokens"):
            if not self._digests:
                beside = self.path.with_suffix(ENDING)
                self._digests = beside.read_text(encoding="ascii", errors="replace").split()
            with open(self.path, "rb") as file:
                file.seek(self._begin + begin)
                content = file.read(end - begin)
        expected = self._digests[block] if block < len(self._digests) else "none"
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected:
            raise InputError(
                f"{self.path}: expected block {block}, bytes {begin} to {end} of the tokens, with sha256 "
                f"{expected[:80]}, got {actual}; restore the file or prepare the data again"
            )
        if (largest := int(np.frombuffer(content, self._dtype).max())) >= self._limit:
            raise InputError(
                f"{self.path}: expected ids below the tokenizer's {self._limit}, got {largest}; prepare the data again"
            )


class Verification:
    """A thread that verifies blocks one after another, once it is started, and what it came upon."""

    def __init__(self, blocks: Sequence[Blocks]) -> None:
        self.problem: InputError | None = None
        self._blocks, self._closing = blocks, threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify shards", daemon=True)

    def __enter__(self) -> Verification:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        """Verify every block, until the first that is not whole."""
        try:
            for blocks in self._blocks:
                for block in range(blocks.count):
                    if self._closing.is_set():
                        return
                    blocks.verify(block * BLOCK_BYTES, block * BLOCK_BYTES + 1)
        except InputError as error:
            self.problem = error
