"""Token files of other trainers, to and from a prepared folder. The tokens stay; only what is around them changes.

megatron   <path>.bin .idx   sequences, and which of them a document has; end of text its last token
nanogpt    one file of u16, or u32 for a tokenizer above 65536 ids, no header
llmc       the same behind 256 i32: a magic number, a version, the number of tokens
olmo       a headerless file like nanogpt's, named .npy
original   a folder of .npy (u32) and .idx (start and end of each document) with a manifest.json

A format is believed only where everything in it agrees: first bytes, sizes, ranges, ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nmoe.effects import files
from nmoe.effects.data.prepare.survey import reporting
from nmoe.effects.data.store.format import HEADER_BYTES, dtype_of, header, read_manifest, split_of
from nmoe.effects.data.store.records import read_object
from nmoe.effects.data.store.shard_writer import write
from nmoe.effects.data.store.shards import documents
from nmoe.effects.data.tokenizer import Tokenizer, load
from nmoe.errors import InputError

FORMATS = ("megatron", "nanogpt", "llmc", "olmo", "original")
HEADERLESS = ("nanogpt", "olmo")
DTYPES = ("u16", "u32")
"""What a token of a headerless file can be."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
LLMC_MAGIC = ((20240520, 1, "<u2"), (20240801, 7, "<u4"))
LLMC_HEADER_BYTES = 1024
ORIGINAL_MAGIC = b"NMOEIDX\x00"
NPY_DTYPES = ("<u2", "<u4", "<i4", "<i8")
FIRST_BYTES = (
    (b"\x93NUMPY", "a NumPy header; write the array with .tofile, which leaves it out"),
    *((magic.to_bytes(4, "little"), "an llm.c header; give --from llmc") for magic, _, _ in LLMC_MAGIC),
    (MEGATRON_MAGIC, "a Megatron index; give --from megatron and the path without .idx"),
    (ORIGINAL_MAGIC, "an index of the original nmoe; give --from original and its folder"),
)
"""Beginnings of other files, which read as tokens where nothing looks at them."""
SCAN_TOKENS = 1 << 24


def from_foreign(
    source: Path,
    kind: str,
    tokenizer: Tokenizer,
    out: Path,
    split: str,
    say: Callable[[str], None],
    dtype: str | None = None,
) -> None:
    """Write a prepared folder with one split from another trainer's files.

    dtype    of the tokens of a headerless file, one of `DTYPES`; None: the one the tokenizer needs

    Writes:  `out`, which must be empty or absent.
    Raises:  InputError when the files are damaged, or hold an id that the tokenizer has not.
    """
    with reporting(out):
        manifest = write(out, tokenizer, {split: read_foreign(source, kind, tokenizer, dtype)})
    receipt = manifest.splits[split]
    say(
        f"{out}: {receipt.tokens} tokens, {receipt.documents} documents, {len(receipt.shards)} shards of "
        f"{tokenizer.name}"
    )


def to_foreign(folder: Path, split: str, kind: str, out: Path, say: Callable[[str], None]) -> None:
    """Write one split of a prepared folder as another trainer's files; each shard is verified before.

    Writes:  `out`, or `out`.bin and `out`.idx; each file whole or not at all.
    """
    manifest, tokenizer = read_manifest(folder), load(folder)
    ended = (np.append(document, tokenizer.end_of_text) for document in documents(folder, manifest, tokenizer, split))
    receipt = split_of(folder, manifest, split)
    with reporting(out):
        if kind == "megatron":
            _write_megatron(out, ended, "<u2" if tokenizer.size <= 1 << 16 else "<i4")
        elif kind == "original":
            _write_original(out, ended, receipt.tokens, tokenizer)
        else:
            dtype = dtype_of(tokenizer.size)
            front = _llmc_header(dtype.str, receipt.tokens, out) if kind == "llmc" else b""
            with files.replacing(out) as temporary, open(temporary, "wb") as file:
                file.write(front)
                for document in ended:
                    file.write(document.astype(dtype).tobytes())
    say(f"{out}: {receipt.tokens} tokens, {receipt.documents} documents for {kind}")


def read_foreign(path: Path, kind: str, tokenizer: Tokenizer, dtype: str | None = None) -> Iterator[np.ndarray]:
    """The documents of another trainer's files, without end of text: [n] integers, views of the files.

    dtype    as in `from_foreign`

    Raises:  InputError when the files are absent, damaged or made with another tokenizer.
    """
    end = tokenizer.end_of_text
    if kind not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {kind}; choose one of them")
    if dtype is not None and kind not in HEADERLESS:
        raise InputError(f"--dtype: expected none for {kind}, whose files name theirs, got {dtype}; leave it out")
    try:
        if kind == "megatron":
            yield from _without_end(_read_megatron(path), end)
        elif kind == "original":
            yield from _without_end(_read_original(path, tokenizer), end)
        elif kind == "llmc":
            yield from _between(_read_llmc(path), end)
        else:
            yield from _between(_read_headerless(path, tokenizer, dtype), end)
    except OSError as error:
        raise InputError(
            f"{path}: expected a file that can be read, got {error.strerror or error}; check the path"
        ) from error


def _without_end(sequences: Iterable[np.ndarray], end_of_text: int) -> Iterator[np.ndarray]:
    """Each sequence without the end of text at its end, if it has one there."""
    for sequence in sequences:
        yield sequence[:-1] if len(sequence) and sequence[-1] == end_of_text else sequence


def _between(tokens: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
    """What lies between ends of text, whether they stand before documents or behind them."""
    begin = 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        for mark in np.flatnonzero(tokens[start : start + SCAN_TOKENS] == end_of_text) + start:
            if mark > 0:
                yield tokens[begin:mark]
            begin = int(mark) + 1
    if begin < len(tokens):
        yield tokens[begin:]


def _mapped(path: Path, dtype: Any, offset: int) -> np.ndarray:
    """The numbers of a file from `offset` on, mapped."""
    dtype = np.dtype(dtype)
    size = files.regular_size(path) - offset
    if size % dtype.itemsize or size < 0:
        raise InputError(f"{path}: expected whole numbers of {dtype.itemsize} bytes, got {size} bytes; restore it")
    if not size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _bytes(path: Path) -> bytes:
    """The content of a regular file."""
    files.regular_size(path)
    return path.read_bytes()


def _read_headerless(path: Path, tokenizer: Tokenizer, dtype: str | None) -> np.ndarray:
    """The tokens of a file that says nothing about them: refused where it is another file, or another width fits."""
    files.regular_size(path)
    with open(path, "rb") as file:
        front = file.read(16)
    for first, what in FIRST_BYTES:
        if front.startswith(first):
            raise InputError(f"{path}: expected tokens from the first byte on, got {what}")
    own = "u16" if dtype_of(tokenizer.size).itemsize == 2 else "u32"
    chosen, other = dtype or own, "u32" if (dtype or own) == "u16" else "u16"
    if chosen not in DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got {chosen}; choose one of them")
    tokens = _mapped(path, f"<{chosen[0]}{int(chosen[1:]) // 8}", 0)
    largest = _largest(tokens)
    if largest >= tokenizer.size:
        raise InputError(
            f"{path}: expected {chosen} ids below {tokenizer.size}, got {largest}; give the tokenizer it was made "
            f"with, or --dtype {other}"
        )
    # Ids below 65,536 written as u32 have a 0 in every other place when they are read as u16.
    if dtype is None and chosen == "u16" and len(tokens) and len(tokens) % 2 == 0 and not tokens[1::2].any():
        raise InputError(
            f"{path}: expected u16 ids, got a 0 in every other place as in u32 ids; give --dtype u32, or --dtype u16 "
            "if those are tokens"
        )
    return tokens


def _largest(tokens: np.ndarray) -> int:
    """The largest of some ids; -1 of none."""
    return max((int(tokens[at : at + SCAN_TOKENS].max()) for at in range(0, len(tokens), SCAN_TOKENS)), default=-1)


def _read_llmc(path: Path) -> np.ndarray:
    files.regular_size(path)
    with open(path, "rb") as file:
        front = file.read(LLMC_HEADER_BYTES)
    magic, version, count = struct.unpack("<3i", front[:12]) if len(front) == LLMC_HEADER_BYTES else (0, 0, 0)
    dtype = next((dtype for known, number, dtype in LLMC_MAGIC if (known, number) == (magic, version)), None)
    if dtype is None:
        raise InputError(f"{path}: expected an llm.c header, got magic {magic} version {version}; check --from")
    tokens = _mapped(path, dtype, LLMC_HEADER_BYTES)
    if len(tokens) != count:
        raise InputError(f"{path}: expected {count} tokens as its header says, got {len(tokens)}; restore the file")
    return tokens


def _llmc_header(dtype: str, count: int, out: Path) -> bytes:
    if count >= 1 << 31:
        raise InputError(
            f"{out}: expected fewer than 2**31 tokens, which is all an llm.c header can say, got {count}; choose olmo"
        )
    magic, version = next((magic, version) for magic, version, known in LLMC_MAGIC if known == dtype)
    return struct.pack("<3i", magic, version, count).ljust(LLMC_HEADER_BYTES, b"\x00")


def _read_megatron(path: Path) -> Iterator[np.ndarray]:
    """The documents of a Megatron pair of files: one sequence each, or several where they were split by sentences."""
    index, data = path.with_name(f"{path.name}.idx"), path.with_name(f"{path.name}.bin")
    raw = _bytes(index)
    if len(raw) < 34 or raw[:9] != MEGATRON_MAGIC:
        raise InputError(f"{index}: expected a Megatron index, got {raw[:9]!r}; check --from")
    version, code, count, num_ends = struct.unpack("<QBQQ", raw[9:34])
    dtype = dict(MEGATRON_DTYPES).get(code)
    if version != 1 or dtype is None:
        raise InputError(
            f"{index}: expected version 1 and integers, got version {version} and type {code}; convert it first"
        )
    if len(raw) != (expected := 34 + count * 12 + num_ends * 8):
        raise InputError(f"{index}: expected {expected} bytes for {count} sequences, got {len(raw)}; restore the file")
    sizes = np.frombuffer(raw, "<i4", count, 34).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", count, 34 + count * 4)
    bounds = np.frombuffer(raw, "<i8", num_ends, 34 + count * 12)
    if not num_ends or bounds[0] != 0 or bounds[-1] != count or (bounds[1:] < bounds[:-1]).any():
        raise InputError(
            f"{index}: expected documents that cover its {count} sequences in order, got others; restore the files"
        )
    tokens = _mapped(data, dtype, 0)
    ends = np.append(0, np.cumsum(sizes))
    if (sizes < 0).any() or not np.array_equal(ends[:-1] * tokens.itemsize, pointers) or ends[-1] != len(tokens):
        raise InputError(
            f"{index}: expected sequences that cover the {len(tokens)} tokens of {data.name} in order, got others; "
            "restore the files"
        )
    edges = ends[bounds].tolist()
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        yield tokens[begin:end]


def _write_megatron(out: Path, ended: Iterable[np.ndarray], dtype: str) -> None:
    index, data = out.with_name(f"{out.name}.idx"), out.with_name(f"{out.name}.bin")
    sizes: list[int] = []
    with files.replacing(data) as temporary, open(temporary, "wb") as file:
        for document in ended:
            file.write(document.astype(dtype).tobytes())
            sizes.append(len(document))
    code = next(code for code, known in MEGATRON_DTYPES if known == dtype)
    lengths = np.array(sizes, "<i4")
    pointers = np.append(0, np.cumsum(lengths, dtype="<i8"))[:-1] * np.dtype(dtype).itemsize
    with files.replacing(index) as temporary:
        temporary.write_bytes(
            MEGATRON_MAGIC
            + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
            + lengths.tobytes()
            + pointers.astype("<i8").tobytes()
            + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
        )


def _read_original(folder: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of a folder that the original nmoe prepared."""
    path = folder / "manifest.json"
    manifest = read_object(path)
    try:
        shards = [
            (_inside(folder, shard["path"]), _inside(folder, shard["index_path"]), str(shard["checksum"]))
            for shard in manifest["shards"]
        ]
        end_of_text, size = manifest["eos_token_id"], manifest["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected a manifest of the original nmoe, got {repr(error)[:160]}; restore the file"
        ) from error
    if (end_of_text, size) != (tokenizer.end_of_text, tokenizer.size):
        raise InputError(
            f"{path}: expected end of text and vocabulary {str((end_of_text, size))[:80]} of "
            f"{str(manifest.get('tokenizer'))[:80]}, got {(tokenizer.end_of_text, tokenizer.size)} of "
            f"{tokenizer.name}; give its tokenizer"
        )
    for shard, index, checksum in shards:
        files.regular_size(shard)
        with open(shard, "rb") as file:
            if (actual := hashlib.file_digest(file, "sha256").hexdigest()) != checksum.removeprefix("sha256:"):
                raise InputError(
                    f"{shard}: expected content with sha256 {checksum[:80]}, got {actual}; restore the file"
                )
        tokens = _read_npy(shard)
        raw = _bytes(index)
        count = struct.unpack("<Q", raw[16:24])[0] if len(raw) >= 32 and raw[:8] == ORIGINAL_MAGIC else -1
        if count < 0 or len(raw) != 32 + 16 * count:
            raise InputError(f"{index}: expected an index of documents, got another; restore the files")
        pairs = np.frombuffer(raw, "<u8", offset=32).reshape(-1, 2)
        begins, ends = pairs[:, 0], pairs[:, 1]
        covered = np.array_equal(np.append(0, ends[:-1]), begins) if count else True
        if not covered or (begins > ends).any() or (ends[-1] if count else 0) != len(tokens):
            raise InputError(
                f"{index}: expected documents that cover {len(tokens)} tokens in order, got others; restore the files"
            )
        for begin, end in pairs.tolist():
            yield tokens[begin:end]


def _read_npy(path: Path) -> np.ndarray:
    """The integers of a .npy file whose header is what NumPy writes, byte for byte: its parser raises anything."""
    size = files.regular_size(path) - HEADER_BYTES
    with open(path, "rb") as file:
        front = file.read(HEADER_BYTES)
    for dtype in map(np.dtype, NPY_DTYPES):
        if front == header(dtype, size // dtype.itemsize):
            return _mapped(path, dtype, HEADER_BYTES)
    raise InputError(f"{path}: expected a .npy file of a row of integers, got another; restore the file")


def _inside(folder: Path, name: str) -> Path:
    """The file of this name below a folder; a name from a file must not lead out of it, and has to be one.

    Raises:  ValueError for any other; no file's name holds a lone surrogate.
    """
    os.fsencode(name)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ValueError(f"a path that leads out of the folder: {name[:80]!r}")
    return folder / name


def _write_original(out: Path, ended: Iterable[np.ndarray], num_tokens: int, tokenizer: Tokenizer) -> None:
    """One shard with index and manifest, laid out as the original laid out its own."""
    place = out / "shard_0000"
    place.mkdir(parents=True, exist_ok=True)
    shard, index = place / "nmoe-v1-shard-000000.npy", place / "nmoe-v1-shard-000000.idx"
    ends: list[int] = [0]
    digest = hashlib.sha256()
    with files.replacing(shard) as temporary, open(temporary, "wb") as file:
        front = header(np.dtype("<u4"), num_tokens)
        file.write(front)
        digest.update(front)
        for document in ended:
            payload = document.astype("<u4").tobytes()
            file.write(payload)
            digest.update(payload)
            ends.append(ends[-1] + len(document))
    pairs = np.stack([np.array(ends[:-1], "<u8"), np.array(ends[1:], "<u8")], axis=1)
    with files.replacing(index) as temporary:
        temporary.write_bytes(ORIGINAL_MAGIC + struct.pack("<3Q", 1, len(pairs), 0) + pairs.tobytes())
    receipt = {
        "path": str(shard.relative_to(out)),
        "index_path": str(index.relative_to(out)),
        "num_tokens": num_tokens,
        "num_documents": len(pairs),
        "checksum": digest.hexdigest(),
    }
    manifest = {
        "dataset": "nmoe",
        "version": "v1",
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.size,
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "uint32",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_tokens": num_tokens,
        "total_documents": len(pairs),
        "num_shards": 1,
        "shards": [receipt],
        "source_info": {},
    }
    files.write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
