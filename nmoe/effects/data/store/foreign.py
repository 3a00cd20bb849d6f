"""Token files of other trainers, to and from a prepared folder. The tokens stay; only what is around them changes.

megatron   <path>.bin .idx   a sequence a document, end of text its last token
nanogpt    one file of u16, or u32 for a tokenizer above 65536 ids, no header
llmc       the same behind 256 i32: a magic number, a version, the number of tokens
olmo       a headerless file like nanogpt's, named .npy
original   a folder of .npy (u32) and .idx (start and end of each document) with a manifest.json
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.effects import files
from nmoe.effects.data.inspect import documents
from nmoe.effects.data.prepare.survey import reporting
from nmoe.effects.data.store.format import HEADER_BYTES, dtype_of, header, read_manifest, size_problems
from nmoe.effects.data.store.shard_writer import write
from nmoe.effects.data.tokenizer import Tokenizer, load
from nmoe.errors import InputError

FORMATS = ("megatron", "nanogpt", "llmc", "olmo", "original")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
LLMC_MAGIC = ((20240520, 1, "<u2"), (20240801, 7, "<u4"))
LLMC_HEADER_BYTES = 1024
ORIGINAL_MAGIC = b"NMOEIDX\x00"
SCAN_TOKENS = 1 << 24


def from_foreign(
    source: Path, kind: str, tokenizer: Tokenizer, out: Path, split: str, say: Callable[[str], None]
) -> None:
    """Write a prepared folder with one split from another trainer's files.

    Writes:  `out`, which must be empty or absent.
    Raises:  InputError when the files are damaged, or hold an id that the tokenizer has not.
    """
    with reporting(out):
        manifest = write(out, tokenizer, {split: read_foreign(source, kind, tokenizer)})
    about = manifest.splits[split]
    say(f"{out}: {about.tokens} tokens, {about.documents} documents, {len(about.shards)} shards of {tokenizer.name}")


def to_foreign(folder: Path, split: str, kind: str, out: Path, say: Callable[[str], None]) -> None:
    """Write one split of a prepared folder as another trainer's files.

    Writes:  `out`, or `out`.bin and `out`.idx; each file whole or not at all.
    """
    manifest, tokenizer = read_manifest(folder), load(folder)
    if split not in manifest.splits:
        raise InputError(f"{folder}: one of the splits {', '.join(manifest.splits)}, got {split}; choose one of them")
    if problems := size_problems(folder, manifest, split):
        raise InputError(*problems)
    ended = (np.append(each, tokenizer.end_of_text) for each in documents(folder, manifest, split))
    about = manifest.splits[split]
    with reporting(out):
        if kind == "megatron":
            _write_megatron(out, ended, "<u2" if tokenizer.size <= 1 << 16 else "<i4")
        elif kind == "original":
            _write_original(out, ended, tokenizer)
        else:
            dtype = dtype_of(tokenizer.size)
            front = _llmc_header(dtype.str, about.tokens, out) if kind == "llmc" else b""
            with files.replacing(out) as temporary, open(temporary, "wb") as file:
                file.write(front)
                for each in ended:
                    file.write(each.astype(dtype).tobytes())
    say(f"{out}: {about.tokens} tokens, {about.documents} documents for {kind}")


def read_foreign(path: Path, kind: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of another trainer's files, without end of text: [n] integers, views of the files.

    Raises:  InputError when the files are absent, damaged or made with another tokenizer.
    """
    end = tokenizer.end_of_text
    try:
        if kind == "megatron":
            yield from _bare(_read_megatron(path), end)
        elif kind == "original":
            yield from _bare(_read_original(path, tokenizer), end)
        elif kind == "llmc":
            yield from _between(_read_llmc(path), end)
        elif kind in ("nanogpt", "olmo"):
            yield from _between(_raw(path, dtype_of(tokenizer.size), 0), end)
        else:
            raise InputError(f"format: one of {', '.join(FORMATS)}, got {kind}; choose one of them")
    except OSError as error:
        raise InputError(f"{path}: a file that can be read, got {error.strerror or error}; check the path") from error


def _bare(sequences: Iterable[np.ndarray], end_of_text: int) -> Iterator[np.ndarray]:
    """Each sequence without the end of text at its end, if it has one there."""
    for each in sequences:
        yield each[:-1] if len(each) and each[-1] == end_of_text else each


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


def _raw(path: Path, dtype: Any, offset: int) -> np.ndarray:
    """The numbers of a file from `offset` on, mapped."""
    dtype = np.dtype(dtype)
    size = path.stat().st_size - offset
    if size % dtype.itemsize or size < 0:
        raise InputError(f"{path}: whole numbers of {dtype.itemsize} bytes, got {size} bytes; restore the file")
    if not size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _read_llmc(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        front = file.read(LLMC_HEADER_BYTES)
    magic, version, count = struct.unpack("<3i", front[:12]) if len(front) == LLMC_HEADER_BYTES else (0, 0, 0)
    dtype = next((dtype for known, number, dtype in LLMC_MAGIC if (known, number) == (magic, version)), None)
    if dtype is None:
        raise InputError(f"{path}: an llm.c header, got magic {magic} version {version}; give its --from format")
    tokens = _raw(path, dtype, LLMC_HEADER_BYTES)
    if len(tokens) != count:
        raise InputError(f"{path}: {count} tokens as its header says, got {len(tokens)}; restore the file")
    return tokens


def _llmc_header(dtype: str, count: int, out: Path) -> bytes:
    if count >= 1 << 31:
        raise InputError(f"{out}: fewer than 2**31 tokens, which is all its header can say, got {count}; choose olmo")
    magic, version = next((magic, version) for magic, version, known in LLMC_MAGIC if known == dtype)
    return struct.pack("<3i", magic, version, count).ljust(LLMC_HEADER_BYTES, b"\x00")


def _read_megatron(path: Path) -> Iterator[np.ndarray]:
    """The sequences of a Megatron pair of files."""
    index, data = path.with_name(f"{path.name}.idx"), path.with_name(f"{path.name}.bin")
    raw = index.read_bytes()
    if len(raw) < 34 or raw[:9] != MEGATRON_MAGIC:
        raise InputError(f"{index}: a Megatron index, got {raw[:9]!r}; give its --from format")
    version, code, count, num_documents = struct.unpack("<QBQQ", raw[9:34])
    dtype = dict(MEGATRON_DTYPES).get(code)
    if version != 1 or dtype is None:
        raise InputError(f"{index}: version 1 and integers, got version {version} and type {code}; convert it first")
    if len(raw) != (expected := 34 + count * 12 + num_documents * 8):
        raise InputError(f"{index}: {expected} bytes for {count} sequences, got {len(raw)}; restore the file")
    sizes = np.frombuffer(raw, "<i4", count, 34)
    pointers = np.frombuffer(raw, "<i8", count, 34 + count * 4)
    tokens = _raw(data, dtype, 0)
    width = np.dtype(dtype).itemsize
    for number, (pointer, size) in enumerate(zip(pointers.tolist(), sizes.tolist(), strict=True)):
        if pointer % width or not 0 <= pointer // width <= pointer // width + size <= len(tokens):
            raise InputError(
                f"{index}: sequences within {len(tokens)} tokens, got {size} from byte {pointer} as number {number}; "
                "restore the files"
            )
        yield tokens[pointer // width : pointer // width + size]


def _write_megatron(out: Path, ended: Iterable[np.ndarray], dtype: str) -> None:
    index, data = out.with_name(f"{out.name}.idx"), out.with_name(f"{out.name}.bin")
    sizes: list[int] = []
    with files.replacing(data) as temporary, open(temporary, "wb") as file:
        for each in ended:
            file.write(each.astype(dtype).tobytes())
            sizes.append(len(each))
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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [(folder / each["path"], folder / each["index_path"], each["checksum"]) for each in manifest["shards"]]
        end_of_text, size = manifest["eos_token_id"], manifest["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: a manifest of the original nmoe, got {error!r}; restore the file") from error
    if (end_of_text, size) != (tokenizer.end_of_text, tokenizer.size):
        raise InputError(
            f"{path}: end of text and vocabulary {(end_of_text, size)} of {manifest.get('tokenizer')}, got "
            f"{(tokenizer.end_of_text, tokenizer.size)} of {tokenizer.name}; give its tokenizer"
        )
    for shard, index, checksum in shards:
        with open(shard, "rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != str(checksum).removeprefix("sha256:"):
                raise InputError(f"{shard}: content with sha256 {checksum}, got {found}; restore the file")
        try:
            tokens = np.load(shard, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise InputError(f"{shard}: a .npy file, got {error}; restore the file") from error
        raw = index.read_bytes()
        count = struct.unpack("<Q", raw[16:24])[0] if len(raw) >= 32 and raw[:8] == ORIGINAL_MAGIC else -1
        if count < 0 or len(raw) != 32 + 16 * count or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(f"{index}: an index of {count} documents over integers, got another; restore the files")
        for start, end in np.frombuffer(raw, "<u8", offset=32).reshape(-1, 2).tolist():
            if not start <= end <= len(tokens):
                raise InputError(f"{index}: documents within {len(tokens)} tokens, got {start} to {end}; restore it")
            yield tokens[start:end]


def _write_original(out: Path, ended: Iterable[np.ndarray], tokenizer: Tokenizer) -> None:
    """One shard with index and manifest, laid out as the original laid out its own."""
    place = out / "shard_0000"
    place.mkdir(parents=True, exist_ok=True)
    shard, index = place / "nmoe-v1-shard-000000.npy", place / "nmoe-v1-shard-000000.idx"
    ends: list[int] = [0]
    with files.replacing(shard) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for each in ended:
            file.write(each.astype("<u4").tobytes())
            ends.append(ends[-1] + len(each))
        file.seek(0)
        file.write(header(np.dtype("<u4"), ends[-1]))
    pairs = np.stack([np.array(ends[:-1], "<u8"), np.array(ends[1:], "<u8")], axis=1)
    with files.replacing(index) as temporary:
        temporary.write_bytes(ORIGINAL_MAGIC + struct.pack("<3Q", 1, len(pairs), 0) + pairs.tobytes())
    with open(shard, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "path": str(shard.relative_to(out)),
        "index_path": str(index.relative_to(out)),
        "num_tokens": ends[-1],
        "num_documents": len(pairs),
        "checksum": checksum,
    }
    manifest = {
        "dataset": "nmoe",
        "version": "v1",
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.size,
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "uint32",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_tokens": ends[-1],
        "total_documents": len(pairs),
        "num_shards": 1,
        "shards": [about],
        "source_info": {},
    }
    files.write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
