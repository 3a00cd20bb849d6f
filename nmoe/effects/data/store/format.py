"""Token shards on disk: what a prepared folder holds, and whether it does.

    <folder>/manifest.json  tokenizer.json
    <folder>/<split>/shard-00000.npy        1-D u2 or u4, every document followed by end of text
                     shard-00000.ends.npy   i64, position after each document's end of text
                     shard-00000.json       the shard's receipt, repeated in the manifest
                     shard-00000.blocks     digests of its blocks, see `blocks`

Any NumPy reads the arrays; nothing here knows where the text came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe.config.toml import closest
from nmoe.effects.data import tokenizer
from nmoe.effects.data.store import blocks
from nmoe.effects.data.store.records import read_record, to_text
from nmoe.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
HEADER_BYTES = 128
REMEDY = "restore the file or prepare the data again"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of splits and tokenizers, which are names of folders: none leads out of the folder it is in."""
MAX_TOKENS = 1 << 62


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
    stored = tokenizer.load(folder)
    named = (manifest.tokenizer_identity, manifest.tokenizer_size)
    if named != (actual := (stored.identity, stored.size)):
        problems.append(
            f"{folder / tokenizer.FILE}: expected fingerprint and size {str(named)[:120]} as in the manifest, got "
            f"{actual}; {REMEDY}"
        )
    for name, split in manifest.splits.items():
        problems += name_problems(path, name)
        named = (split.tokens, split.documents, split.bytes)
        if named != (total := totals(split.shards)):
            problems.append(
                f"{path}: expected {str(named)[:120]} tokens, documents and bytes in the shards of {name[:80]}, got "
                f"{str(total)[:120]}; {REMEDY}"
            )
        for index, shard in enumerate(split.shards):
            if shard.tokenizer_identity != manifest.tokenizer_identity:
                problems.append(
                    f"{path}: expected tokenizer {manifest.tokenizer_identity[:80]} for {name} shard {index}, got "
                    f"{shard.tokenizer_identity[:80]}; prepare the data again"
                )
            if not (1 <= shard.documents <= shard.tokens <= MAX_TOKENS and 0 <= shard.bytes <= MAX_TOKENS):
                problems.append(
                    f"{path}: expected 1 <= documents <= tokens and 0 <= bytes in {name} shard {index}, got "
                    f"{str((shard.documents, shard.tokens, shard.bytes))[:120]}; {REMEDY}"
                )
    if problems:
        raise InputError(*problems)
    return manifest


def name_problems(where: Path | str, split: str) -> list[str]:
    """A line when a split's name is none: it becomes the name of a folder."""
    if NAME.fullmatch(split):
        return []
    return [
        f"{where}: expected a split named with up to 64 letters, digits, '.', '_' and '-', got {split[:80]!r}; "
        "rename the split"
    ]


def split_of(folder: Path, manifest: Manifest, split: str) -> SplitReceipt:
    """What a split holds.

    Raises:  InputError when the folder has none of this name, or its files have other names or sizes than they should.
    """
    if split not in manifest.splits:
        near = closest(split, tuple(manifest.splits))
        remedy = f"did you mean {near}?" if near else "choose one of them"
        raise InputError(f"{folder}: expected one of the splits {', '.join(manifest.splits)}, got {split}; {remedy}")
    if problems := size_problems(folder, manifest, split):
        raise InputError(*problems)
    return manifest.splits[split]


def size_problems(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """One line for each shard file of `split` that is missing, superfluous or has another size than it should.

    Cost:    looks at names and sizes only.
    """
    where, dtype = folder / split, dtype_of(manifest.tokenizer_size)
    expected: dict[str, int] = {}
    receipts = manifest.splits[split].shards
    for index, receipt in enumerate(receipts):
        expected |= sizes(index, receipt, dtype)
    # names, not paths: a large folder has tens of thousands
    actual: dict[str, int] = {}
    try:
        with os.scandir(where) as entries:
            actual = {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith("shard-")}
    except FileNotFoundError:
        actual = {}
    except OSError as error:
        return [f"{where}: expected a readable folder of files, got {error.strerror}; {REMEDY}"]
    problems: list[str] = []
    names = (blocks_name(index) for index in range(len(receipts)))
    if undigested := [name for name in names if name not in actual]:
        # in the place of a line for each shard: an earlier version wrote them, or began to
        problems = [
            f"{where}: expected digests of blocks ({undigested[0]} and the next ones), got none, as of earlier "
            f"versions of nmoe; write them: nmoe data digest {folder}"
        ]
        expected = {name: size for name, size in expected.items() if name not in undigested}
    problems += [f"{where / name}: expected a file, got none; {REMEDY}" for name in expected if name not in actual]
    problems += [
        f"{where / name}: expected no file, the manifest does not name it, got one; remove it"
        for name in sorted(actual.keys() - expected.keys())
    ]
    problems += [
        f"{where / name}: expected {size} bytes, got {actual[name]}; {REMEDY}"
        for name, size in expected.items()
        if name in actual and actual[name] != size
    ]
    return problems


def content_problems(where: Path, index: int, receipt: Receipt, tokenizer_size: int) -> list[str]:
    """One line for each way in which the content of a shard's files, of the right sizes, differs from its receipt."""
    dtype = dtype_of(tokenizer_size)
    path, ends_path = where / f"{stem(index)}.npy", where / f"{stem(index)}.ends.npy"
    try:
        problems = [
            *_array_problems(path, header(dtype, receipt.tokens), receipt.sha256, blocked=True),
            *_array_problems(ends_path, header(np.dtype("<i8"), receipt.documents), receipt.ends_sha256),
        ]
        if (where / f"{stem(index)}.json").read_bytes() != to_text(receipt).encode("ascii"):
            problems.append(f"{where / stem(index)}.json: expected the receipt in the manifest, got another; {REMEDY}")
        largest = int(mapped(path, dtype, receipt.tokens).max())
    except OSError as error:
        return [f"{where / stem(index)}: expected readable files, got {error.strerror}; {REMEDY}"]
    if largest >= tokenizer_size:
        problems.append(
            f"{path}: expected ids below the tokenizer's {tokenizer_size}, got {largest}; prepare the data again"
        )
    return problems


def shard_problems(where: Path, index: int, receipt: Receipt, stored: tokenizer.Tokenizer) -> list[str]:
    """Lines as of `content_problems`; of a shard without, one when its documents do not end at its ends of text."""
    if problems := content_problems(where, index, receipt, stored.size):
        return problems
    tokens = mapped(where / f"{stem(index)}.npy", dtype_of(stored.size), receipt.tokens)
    ends = mapped(where / f"{stem(index)}.ends.npy", np.dtype("<i8"), receipt.documents)
    if not np.array_equal(np.flatnonzero(tokens == stored.end_of_text) + 1, ends) or ends[-1] != receipt.tokens:
        path = where / f"{stem(index)}.ends.npy"
        return [f"{path}: expected the position behind each end of text, got others; {REMEDY}"]
    if np.count_nonzero(tokens >= len(stored.ranks)) != receipt.documents:
        path = where / f"{stem(index)}.npy"
        return [f"{path}: expected ids below {len(stored.ranks)} beside ends of text, got others; {REMEDY}"]
    return []


def _array_problems(path: Path, header: bytes, sha256: str, *, blocked: bool = False) -> list[str]:
    """One line each for another header and another digest than given; if asked, of the file or of its blocks."""
    problems = header_problems(path, header)
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        actual, text = blocks.digests(file)
    if actual != sha256:
        problems.append(f"{path}: expected content with sha256 {sha256[:80]}, got {actual}; {REMEDY}")
    elif blocked and (beside := path.with_suffix(blocks.ENDING)).read_bytes() != text.encode("ascii"):
        problems.append(
            f"{beside}: expected the digests of the blocks of {path.name}, got others; write them again: "
            f"nmoe data digest {path.parent.parent}"
        )
    return problems


def header_problems(path: Path, header: bytes) -> list[str]:
    """One line for another header than given."""
    with open(path, "rb") as file:
        actual = file.read(HEADER_BYTES)
    if actual == header:
        return []
    return [f"{path}: expected header {header[10:].strip()!r}, got {actual[10:].strip()!r}; {REMEDY}"]


def sizes(index: int, receipt: Receipt, dtype: np.dtype[Any]) -> dict[str, int]:
    """Size in bytes of each file of a shard."""
    return {
        f"{stem(index)}.npy": HEADER_BYTES + receipt.tokens * dtype.itemsize,
        f"{stem(index)}.ends.npy": HEADER_BYTES + receipt.documents * 8,
        f"{stem(index)}.json": len(to_text(receipt)),
        blocks_name(index): blocks.LINE_BYTES * blocks.num_blocks(receipt.tokens * dtype.itemsize),
    }


def totals(shards: Iterable[Receipt]) -> tuple[int, int, int]:
    """Tokens, documents and bytes of text of some shards."""
    shards = tuple(shards)
    return sum(s.tokens for s in shards), sum(s.documents for s in shards), sum(s.bytes for s in shards)


def stem(index: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{index:05d}"


def blocks_name(index: int) -> str:
    """Name of the file of digests beside a shard."""
    return stem(index) + blocks.ENDING


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
