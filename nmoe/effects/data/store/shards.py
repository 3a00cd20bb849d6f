"""A split of a prepared folder: verified when opened, read as one stream of tokens."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np

from nmoe.effects.data.store.format import (
    content_problems,
    dtype_of,
    mapped,
    read_manifest,
    size_problems,
    stem,
)
from nmoe.errors import InputError
from nmoe.pure.data import order as mixture


@attrs.frozen(kw_only=True, eq=False)
class Split:
    """The tokens of one split as one stream, memory-mapped shard by shard."""

    where: str
    tokens: tuple[np.ndarray, ...]
    num_tokens: int
    num_documents: int
    num_bytes: int
    tokenizer_identity: str


def open_split(folder: Path, split: str, vocab_size: int) -> Split:
    """Open one split for a model with `vocab_size` embeddings, verified byte by byte.

    Raises:  InputError, one line a problem: manifest or tokenizer absent or broken, no such split, vocabulary smaller
             than the tokenizer's, shard files missing, superfluous, truncated or altered.
    Cost:    reads and hashes every shard once, about 1 GB/s; nothing stays in memory.
    """
    manifest = read_manifest(folder)
    where = folder / split
    problems: list[str] = []
    if vocab_size < manifest.tokenizer_size:
        problems.append(
            f"model.vocab_size: at least the tokenizer's {manifest.tokenizer_size}, got {vocab_size}; "
            f"set it to {manifest.tokenizer_size} or more"
        )
    if split not in manifest.splits:
        names = ", ".join(manifest.splits) or "none"
        problems.append(
            f"{where}: one of the splits {names}, got {split}; choose one of them or prepare the data again"
        )
    elif not manifest.splits[split].shards:
        problems.append(f"{where}: at least one document, got none; prepare the data with more text")
    else:
        problems += size_problems(folder, manifest, split)
    if problems:
        raise InputError(*problems)

    receipt = manifest.splits[split]
    problems = [
        problem
        for index, shard in enumerate(receipt.shards)
        for problem in content_problems(where, index, shard, manifest.tokenizer_size)
    ]
    if problems:
        raise InputError(*problems)
    return Split(
        where=str(where),
        tokens=tuple(
            mapped(where / f"{stem(index)}.npy", dtype_of(manifest.tokenizer_size), shard.tokens)
            for index, shard in enumerate(receipt.shards)
        ),
        num_tokens=receipt.tokens,
        num_documents=receipt.documents,
        num_bytes=receipt.bytes,
        tokenizer_identity=manifest.tokenizer_identity,
    )


def read(split: Split, start: int, count: int) -> np.ndarray:
    """Tokens `start` to `start` + `count` of the stream, across shard borders: [count] u2 or u4, a copy.

    Raises:  InputError when the stretch does not lie within the split.
    """
    if start < 0 or count < 0 or start + count > split.num_tokens:
        raise InputError(
            f"{split.where}: a stretch within its {split.num_tokens} tokens, got {count} from {start}; read less"
        )
    return mixture.stretch(split.tokens, start, count)
