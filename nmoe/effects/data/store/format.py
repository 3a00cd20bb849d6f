"""Token shards on disk: what a prepared folder holds, and whether it does.

    <folder>/manifest.json  tokenizer.json
    <folder>/<split>/shard-00000.npy        1-D u2 or u4, every document followed by end of text
                     shard-00000.ends.npy   i64, position after each document's end of text
                     shard-00000.json       the shard's receipt, repeated in the manifest

Any NumPy reads the arrays; nothing here knows where the text came from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store.records import read_record, to_text
from nmoe.errors import InputError

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
        if said != (total := totals(split.shards)):
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
    where, dtype = folder / split, dtype_of(manifest.tokenizer_size)
    expected: dict[str, int] = {}
    for index, receipt in enumerate(manifest.splits[split].shards):
        expected |= sizes(index, receipt, dtype)
    # names, not paths: a large folder has tens of thousands
    found: dict[str, int] = {}
    if where.is_dir():
        with os.scandir(where) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith("shard-")}
    problems = [f"{where / name}: a file, got none; {REMEDY}" for name in expected if name not in found]
    problems += [
        f"{where / name}: no file, the manifest does not name it, got one; remove it"
        for name in sorted(found.keys() - expected.keys())
    ]
    problems += [
        f"{where / name}: {size} bytes, got {found[name]}; {REMEDY}"
        for name, size in expected.items()
        if name in found and found[name] != size
    ]
    return problems


def content_problems(where: Path, index: int, receipt: Receipt, tokenizer_size: int) -> list[str]:
    """One line for each way in which the content of a shard's files, of the right sizes, differs from its receipt."""
    dtype = dtype_of(tokenizer_size)
    path, ends_path = where / f"{stem(index)}.npy", where / f"{stem(index)}.ends.npy"
    problems = [
        *_array_problems(path, header(dtype, receipt.tokens), receipt.sha256),
        *_array_problems(ends_path, header(np.dtype("<i8"), receipt.documents), receipt.ends_sha256),
    ]
    if (where / f"{stem(index)}.json").read_bytes() != to_text(receipt).encode("ascii"):
        problems.append(f"{where / stem(index)}.json: the receipt in the manifest, got another; {REMEDY}")
    if (highest := int(mapped(path, dtype, receipt.tokens).max())) >= tokenizer_size:
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


def sizes(index: int, receipt: Receipt, dtype: np.dtype[Any]) -> dict[str, int]:
    """Size in bytes of each file of a shard."""
    return {
        f"{stem(index)}.npy": HEADER_BYTES + receipt.tokens * dtype.itemsize,
        f"{stem(index)}.ends.npy": HEADER_BYTES + receipt.documents * 8,
        f"{stem(index)}.json": len(to_text(receipt)),
    }


def totals(shards: Iterable[Receipt]) -> tuple[int, int, int]:
    """Tokens, documents and bytes of text of some shards."""
    shards = tuple(shards)
    return sum(s.tokens for s in shards), sum(s.documents for s in shards), sum(s.bytes for s in shards)


def stem(index: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{index:05d}"


def dtype_of(tokenizer_size: int) -> np.dtype[Any]:
    """Narrowest format that holds every id."""
    return np.dtype("<u2" if tokenizer_size <= 1 << 16 else "<u4")


def header(dtype: np.dtype[Any], length: int) -> bytes:
    """Header of a 1-D `.npy` file, version 1.0, padded to `HEADER_BYTES`."""
    described = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}".ljust(HEADER_BYTES - 11)
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + described.encode("ascii") + b"\n"


def mapped(path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
    """The array behind the header, mapped read-only."""
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(length,))
