"""Token shards on disk: written once, verified when opened, read as one stream.

    <folder>/manifest.json  tokenizer.json
    <folder>/<split>/shard-00000.npy        1-D u2 or u4, every document followed by end of text
                     shard-00000.ends.npy   i64, position after each document's end of text
                     shard-00000.json       the shard's receipt, repeated in the manifest

Any NumPy reads the arrays; nothing here knows where the text came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe.effects import files
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.records import read_record, to_text, write_record
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.errors import InputError
from nmoe.pure import mixture

__all__ = [
    "Manifest",
    "Receipt",
    "Split",
    "SplitReceipt",
    "open_split",
    "read",
    "read_manifest",
    "size_problems",
    "write",
]

FORMAT = 1
MANIFEST = "manifest.json"
HEADER_BYTES = 128
REMEDY = "restore the file or prepare the data again"


@attrs.frozen(kw_only=True)
class Receipt:
    """What one shard holds. `bytes` counts text; the digests cover the arrays without their headers."""

    tokens: int
    documents: int
    bytes: int
    sha256: str
    ends_sha256: str
    tokenizer_identity: str


@attrs.frozen(kw_only=True)
class SplitReceipt:
    """What one split holds; shards in order of their number."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[Receipt, ...]


@attrs.frozen(kw_only=True)
class Manifest:
    """What a folder holds."""

    format: int
    tokenizer_identity: str
    tokenizer_size: int
    splits: dict[str, SplitReceipt]


@attrs.frozen(kw_only=True, eq=False)
class Split:
    """The tokens of one split as one stream, memory-mapped shard by shard."""

    where: str
    tokens: tuple[np.ndarray, ...]
    num_tokens: int
    num_documents: int
    num_bytes: int
    tokenizer_identity: str


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
    Raises:  InputError when `folder` is not empty, `tokens_per_shard` < 1, or a document holds an id outside the
             tokenizer's ordinary ones.
    """
    if tokens_per_shard < 1:
        raise InputError(f"tokens_per_shard: at least 1, got {tokens_per_shard}; raise it")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: an empty folder to write to, got files in it; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers.save(tokenizer, folder)
    receipts = {
        split: _write_split(folder / split, tokenizer, iter(documents), tokens_per_shard)
        for split, documents in splits.items()
    }
    manifest = Manifest(
        format=FORMAT, tokenizer_identity=tokenizer.identity, tokenizer_size=tokenizer.size, splits=receipts
    )
    write_record(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, agreed with by the tokenizer beside it.

    Raises:  InputError when either is absent, not JSON, of another version or lacks fields, or they contradict each
             other or themselves.
    """
    path = folder / MANIFEST
    manifest = read_record(path, Manifest, version=FORMAT)
    problems: list[str] = []
    tokenizer = tokenizers.load(folder)
    said = (manifest.tokenizer_identity, manifest.tokenizer_size)
    if said != (found := (tokenizer.identity, tokenizer.size)):
        problems.append(f"{folder / tokenizers.FILE}: identity and size {said} of the manifest, got {found}; {REMEDY}")
    for name, split in manifest.splits.items():
        said = (split.tokens, split.documents, split.bytes)
        if said != (total := _totals(split.shards)):
            problems.append(
                f"{path}: {name} has {said} tokens, documents and bytes, got {total} in its shards; {REMEDY}"
            )
        problems += [
            f"{path}: {name} shard {index} has tokenizer {manifest.tokenizer_identity}, got "
            f"{shard.tokenizer_identity}; prepare the data again"
            for index, shard in enumerate(split.shards)
            if shard.tokenizer_identity != manifest.tokenizer_identity
        ]
    if problems:
        raise InputError(*problems)
    return manifest


def size_problems(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """One line for each shard file of `split` that is missing, superfluous or has another size than it should.

    Cost:    looks at names and sizes only.
    """
    expected = {
        folder / split / name: size
        for index, receipt in enumerate(manifest.splits[split].shards)
        for name, size in _sizes(index, receipt, _dtype(manifest.tokenizer_size)).items()
    }
    found = set((folder / split).glob("shard-*"))
    problems = [f"{path}: a file, got none; {REMEDY}" for path in expected if path not in found]
    problems += [
        f"{path}: no file, the manifest does not name it, got one; remove it" for path in sorted(found - set(expected))
    ]
    problems += [
        f"{path}: {size} bytes, got {path.stat().st_size}; {REMEDY}"
        for path, size in expected.items()
        if path in found and path.stat().st_size != size
    ]
    return problems


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
        for problem in _content_problems(where, index, shard, manifest.tokenizer_size)
    ]
    if problems:
        raise InputError(*problems)
    return Split(
        where=str(where),
        tokens=tuple(
            _mapped(where / f"{_stem(index)}.npy", _dtype(manifest.tokenizer_size), shard.tokens)
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


def _write_split(where: Path, tokenizer: Tokenizer, documents: Iterator[np.ndarray], limit: int) -> SplitReceipt:
    """Write the shards of one split.

    Writes:  the files of folder `where`.
    """
    where.mkdir()
    receipts: list[Receipt] = []
    pending = next(documents, None)
    while pending is not None:
        receipt, pending = _write_shard(where, len(receipts), tokenizer, pending, documents, limit)
        receipts.append(receipt)
    tokens, num_documents, num_bytes = _totals(receipts)
    return SplitReceipt(tokens=tokens, documents=num_documents, bytes=num_bytes, shards=tuple(receipts))


def _write_shard(
    where: Path, index: int, tokenizer: Tokenizer, first: np.ndarray, rest: Iterator[np.ndarray], limit: int
) -> tuple[Receipt, np.ndarray | None]:
    """Write one shard from `first` and what follows, and give back the document that did not fit, if any.

    Writes:  the three files of the shard; the receipt last.
    """
    dtype, lengths, digest = _dtype(tokenizer.size), tokenizers.byte_lengths(tokenizer), hashlib.sha256()
    ends: list[int] = []
    num_tokens = num_bytes = 0
    document: np.ndarray | None = first
    with files.replacing(where / f"{_stem(index)}.npy") as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        while document is not None and (not ends or num_tokens + len(document) + 1 <= limit):
            if len(document) and not 0 <= document.min() <= document.max() < tokenizer.end_of_text:
                raise InputError(
                    f"{where}: documents with ids in 0..{tokenizer.end_of_text - 1}, got {document.min()} to "
                    f"{document.max()} in document {len(ends)} of shard {index}; encode them with {tokenizer.name}"
                )
            payload = np.append(document, tokenizer.end_of_text).astype(dtype).tobytes()
            file.write(payload)
            digest.update(payload)
            num_tokens += len(document) + 1
            num_bytes += int(lengths[document].sum())
            ends.append(num_tokens)
            document = next(rest, None)
        # The length is known only now: the header's place was kept free.
        file.seek(0)
        file.write(_header(dtype, num_tokens))
    positions = np.array(ends, dtype="<i8").tobytes()
    with files.replacing(where / f"{_stem(index)}.ends.npy") as temporary:
        temporary.write_bytes(_header(np.dtype("<i8"), len(ends)) + positions)
    receipt = Receipt(
        tokens=num_tokens,
        documents=len(ends),
        bytes=num_bytes,
        sha256=digest.hexdigest(),
        ends_sha256=hashlib.sha256(positions).hexdigest(),
        tokenizer_identity=tokenizer.identity,
    )
    write_record(where / f"{_stem(index)}.json", receipt)
    return receipt, document


def _content_problems(where: Path, index: int, receipt: Receipt, tokenizer_size: int) -> list[str]:
    """One line for each way in which the content of a shard's files, of the right sizes, differs from its receipt."""
    dtype = _dtype(tokenizer_size)
    path, ends_path = where / f"{_stem(index)}.npy", where / f"{_stem(index)}.ends.npy"
    problems = [
        *_array_problems(path, _header(dtype, receipt.tokens), receipt.sha256),
        *_array_problems(ends_path, _header(np.dtype("<i8"), receipt.documents), receipt.ends_sha256),
    ]
    if (where / f"{_stem(index)}.json").read_text(encoding="utf-8") != to_text(receipt):
        problems.append(f"{where / _stem(index)}.json: the receipt in the manifest, got another; {REMEDY}")
    if (highest := int(_mapped(path, dtype, receipt.tokens).max())) >= tokenizer_size:
        problems.append(f"{path}: ids below the tokenizer's {tokenizer_size}, got {highest}; prepare the data again")
    return problems


def _array_problems(path: Path, header: bytes, sha256: str) -> list[str]:
    """One line each for another header and another digest than given."""
    with open(path, "rb") as file:
        found_header = file.read(HEADER_BYTES)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    problems: list[str] = []
    if found_header != header:
        problems.append(f"{path}: header {header[10:].strip()!r}, got {found_header[10:].strip()!r}; {REMEDY}")
    if found != sha256:
        problems.append(f"{path}: content with sha256 {sha256}, got {found}; {REMEDY}")
    return problems


def _sizes(index: int, receipt: Receipt, dtype: np.dtype[Any]) -> dict[str, int]:
    """Size in bytes of each file of a shard."""
    return {
        f"{_stem(index)}.npy": HEADER_BYTES + receipt.tokens * dtype.itemsize,
        f"{_stem(index)}.ends.npy": HEADER_BYTES + receipt.documents * 8,
        f"{_stem(index)}.json": len(to_text(receipt)),
    }


def _totals(shards: Iterable[Receipt]) -> tuple[int, int, int]:
    """Tokens, documents and bytes of text of some shards."""
    shards = tuple(shards)
    return sum(s.tokens for s in shards), sum(s.documents for s in shards), sum(s.bytes for s in shards)


def _stem(index: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{index:05d}"


def _dtype(tokenizer_size: int) -> np.dtype[Any]:
    """Narrowest format that holds every id."""
    return np.dtype("<u2" if tokenizer_size <= 1 << 16 else "<u4")


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """Header of a 1-D `.npy` file, version 1.0, padded to `HEADER_BYTES`."""
    described = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}".ljust(HEADER_BYTES - 11)
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + described.encode("ascii") + b"\n"


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
    """The array behind the header, mapped read-only."""
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(length,))
