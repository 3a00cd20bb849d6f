"""Token shards, written once: hashed while they stream out, the header put in when the length is known."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nmoe.effects import files
from nmoe.effects.data.store.blocks import Hasher
from nmoe.effects.data.store.format import (
    FORMAT,
    HEADER_BYTES,
    MANIFEST,
    Manifest,
    Receipt,
    SplitReceipt,
    blocks_name,
    dtype_of,
    header,
    name_problems,
    stem,
    totals,
)
from nmoe.effects.data.store.records import write_record
from nmoe.effects.data.tokenizer import Tokenizer, byte_lengths, save
from nmoe.errors import InputError


def write(
    folder: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Iterable[np.ndarray]],
    *,
    tokens_per_shard: int = 100_000_000,
) -> Manifest:
    """Write whole splits, each an iterable of documents: 1-D integer arrays without end of text, which is added.

    A shard holds whole documents and at most `tokens_per_shard` tokens; a longer document has a shard of its own.
    Tokens go to disk as they come; memory holds one document. The manifest is written last.

    Writes:  `folder`, which must be empty or absent.
    Raises:  InputError when `folder` is not empty, a split's name is none, `tokens_per_shard` < 1, or a document holds
             an id outside the tokenizer's ordinary ones.
    """
    if tokens_per_shard < 1:
        raise InputError(f"tokens_per_shard: expected at least 1, got {tokens_per_shard}; raise it")
    if problems := [line for split in splits for line in name_problems(folder, split)]:
        raise InputError(*problems)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: expected an empty folder to write to, got files in it; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save(tokenizer, folder)
    receipts: dict[str, tuple[Receipt, ...]] = {}
    for split, documents in splits.items():
        sink = Sink(folder / split, tokenizer, tokens_per_shard)
        for document in documents:
            sink.add(document)
        receipts[split] = sink.close()
    return commit(folder, tokenizer, receipts)


def commit(folder: Path, tokenizer: Tokenizer, splits: Mapping[str, Sequence[Receipt]]) -> Manifest:
    """Write the manifest over shards that are in place.

    Writes:  `folder`/manifest.json, whole or not at all.
    """
    receipts: dict[str, SplitReceipt] = {}
    for split, shards in splits.items():
        tokens, documents, num_bytes = totals(shards)
        receipts[split] = SplitReceipt(tokens=tokens, documents=documents, bytes=num_bytes, shards=tuple(shards))
    manifest = Manifest(
        format=FORMAT, tokenizer_identity=tokenizer.identity, tokenizer_size=tokenizer.size, splits=receipts
    )
    write_record(folder / MANIFEST, manifest)
    return manifest


class Sink:
    """The shards of one split, fed document by document. The documents of an unfinished shard are lost without `close`.

    Writes:  the folder it is given, which must not exist.
    """

    def __init__(self, where: Path, tokenizer: Tokenizer, tokens_per_shard: int) -> None:
        where.mkdir()
        self._shards = _shards(where, tokenizer, tokens_per_shard)
        next(self._shards)

    def add(self, document: np.ndarray) -> None:
        """Write one document: 1-D integers without end of text, which is added."""
        self._shards.send(document)

    def close(self) -> tuple[Receipt, ...]:
        """Finish the last shard; what all of them hold."""
        try:
            self._shards.send(None)
        except StopIteration as done:
            return done.value
        raise RuntimeError("expected no document after the last one, got another")


def _shards(where: Path, tokenizer: Tokenizer, limit: int) -> Generator[None, np.ndarray | None, tuple[Receipt, ...]]:
    """Write the documents sent in, until None is, and give back the receipts."""
    receipts: list[Receipt] = []
    document = yield
    while document is not None:
        receipt, document = yield from _shard(where, len(receipts), tokenizer, document, limit)
        receipts.append(receipt)
    return tuple(receipts)


def _shard(
    where: Path, index: int, tokenizer: Tokenizer, first: np.ndarray, limit: int
) -> Generator[None, np.ndarray | None, tuple[Receipt, np.ndarray | None]]:
    """Write one shard from `first` and what is sent in, and give back the document that did not fit, if any.

    Writes:  the four files of the shard; the receipt last.
    """
    dtype, lengths, digest = dtype_of(tokenizer.size), byte_lengths(tokenizer), hashlib.sha256()
    hasher = Hasher()
    ends: list[int] = []
    num_tokens = num_bytes = 0
    document: np.ndarray | None = first
    with files.replacing(where / f"{stem(index)}.npy") as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        while document is not None and (not ends or num_tokens + len(document) + 1 <= limit):
            if len(document) and not 0 <= document.min() <= document.max() < len(tokenizer.ranks):
                raise InputError(
                    f"{where}: expected documents with ids in 0..{len(tokenizer.ranks) - 1}, got {document.min()} to "
                    f"{document.max()} in document {len(ends)} of shard {index}; encode them with {tokenizer.name}"
                )
            payload = np.append(document, tokenizer.end_of_text).astype(dtype).tobytes()
            file.write(payload)
            digest.update(payload)
            hasher.update(payload)
            num_tokens += len(document) + 1
            num_bytes += int(lengths[document].sum())
            ends.append(num_tokens)
            document = yield
        # The length is known only now: the header's place was kept free.
        file.seek(0)
        file.write(header(dtype, num_tokens))
    positions = np.array(ends, dtype="<i8").tobytes()
    with files.replacing(where / f"{stem(index)}.ends.npy") as temporary:
        temporary.write_bytes(header(np.dtype("<i8"), len(ends)) + positions)
    files.write_text(where / blocks_name(index), hasher.text())
    receipt = Receipt(
        tokens=num_tokens,
        documents=len(ends),
        bytes=num_bytes,
        sha256=digest.hexdigest(),
        ends_sha256=hashlib.sha256(positions).hexdigest(),
        tokenizer_identity=tokenizer.identity,
    )
    write_record(where / f"{stem(index)}.json", receipt)
    return receipt, document
