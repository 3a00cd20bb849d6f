"""What a checkpoint holds, as one JSON file that says itself whether it is whole.

<folder>/step-00001200.0003-0007/     attempt 3, its 7th save
    manifest.json                     one line of JSON, then its SHA-256
    rank-000.safetensors ...          one file a rank
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import cattrs
import torch

from nmoe.effects import files
from nmoe.effects.checkpoint.fs import Fs, read_bytes
from nmoe.errors import InputError, printable
from nmoe.pure.checkpoint.pieces import Stored, gaps

FORMAT = 1
FILE = "manifest.json"

LIMIT_BYTES = 1 << 28
"""Longest manifest that is read; one of 100,000 tensors has 20 MB."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Number formats by the names safetensors gives them."""

CHUNK_BYTES = 1 << 28
"""Most bytes of a file that one digest covers; a reader holds a few such chunks in memory."""

SIZE = 1 << 63
"""No file or axis is as long: torch and the system count in 64 bits."""

PROBLEMS = 10
"""Contradictions of one manifest that are reported; a person reads no more."""

NAME = re.compile(r"step-(\d{8,})\.(\d{4,})-(\d{4,})")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHA256 = re.compile("[0-9a-f]{64}")
DAMAGED = "delete the folder or restore it from a copy"


class NewerFormatError(InputError):
    """A whole checkpoint that this version of nmoe cannot read."""


@attrs.frozen(kw_only=True)
class Parent:
    """The checkpoint a run went on from."""

    name: str
    sha256: str  # of its manifest


@attrs.frozen(kw_only=True)
class TensorEntry:
    """One tensor, over all files."""

    dtype: str
    shape: tuple[int, ...]
    digest: str  # `pure.digest` of the whole


@attrs.frozen(kw_only=True)
class PieceEntry:
    """Elements `begin` to `end` of a tensor, at a byte of a file."""

    name: str
    begin: int
    end: int
    offset: int


@attrs.frozen(kw_only=True)
class FileEntry:
    """One file; `chunks` are the SHA-256 of each `chunk_bytes` of it, `sha256` that of the chunks' digests."""

    name: str
    bytes: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...]
    pieces: tuple[PieceEntry, ...]


@attrs.frozen(kw_only=True)
class Manifest:
    """What a checkpoint holds, and which one it is."""

    format: int
    step: int
    attempt: int
    serial: int  # saves of this attempt, counted from 1
    lineage: str  # the same for all checkpoints of a run, however often it was continued
    parent: Parent | None
    score: float | None
    meta: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: tuple[FileEntry, ...]

    def name(self) -> str:
        """Name of the folder."""
        return folder_name(self.step, self.attempt, self.serial)

    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.bytes for file in self.files)


def folder_name(step: int, attempt: int, serial: int) -> str:
    """What the folder of a checkpoint is called."""
    return f"step-{step:08d}.{attempt:04d}-{serial:04d}"


def name_fields(name: str) -> tuple[int, int, int] | None:
    """Step, attempt and serial in the name of a folder; None when it is not the name of a checkpoint."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    step, attempt, serial = (int(part) for part in match.groups())
    return step, attempt, serial


def shown(text: str) -> str:
    """As much of a text from a file as a person reads, on one line."""
    return printable(text if len(text) <= 300 else f"{text[:300]} ...")


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be read: one that is there, behind a closed door, is not damaged."""
    damage = (None, errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.ELOOP)
    return DAMAGED if error.errno in damage else "fix its permissions or its disk"


def find(path: Path) -> Path | None:
    """The folder of the checkpoint at a path a user wrote, in full; None when no checkpoint lies there.

    A link by another name than a checkpoint's, such as `latest`, is followed until there is one by such a name.

    Raises:  InputError when that cannot be looked at.
    """
    if not files.is_file(path / FILE):
        return None
    path = Path(os.path.abspath(path))
    while name_fields(path.name) is None and path.is_symlink():
        path = path.parent / path.readlink()
    return path


def root_digest(chunks: Sequence[str]) -> str:
    """The digest of a file, from those of its chunks."""
    return hashlib.sha256("".join(chunks).encode()).hexdigest()


def to_bytes(manifest: Manifest) -> bytes:
    """The content of the manifest's file."""
    line = _line(manifest)
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def sha256(manifest: Manifest) -> str:
    """The digest of a manifest, which stands for the whole checkpoint: it covers those of all files."""
    return hashlib.sha256(_line(manifest)).hexdigest()


def parse(data: bytes, where: Path) -> Manifest:
    """The manifest in the content of its file.

    where    the checkpoint's folder, for messages
    Raises:  InputError when it is damaged or says what cannot be; NewerFormatError when it is whole but newer.
    """
    path = where / FILE
    line, _, digest = data.partition(b"\n")
    if digest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise InputError(f"{path}: expected the digest of its content at its end, got another or none; {DAMAGED}")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a line of JSON, got {shown(str(error))}; {DAMAGED}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, got {shown(str(fields))}; {DAMAGED}")
    version = fields.get("format")
    if isinstance(version, int) and version > FORMAT:
        number = shown(str(version)) if version < 10**9 else "a larger number"
        raise NewerFormatError(f"{path}: expected format {FORMAT} or older, got {number}; continue with a newer nmoe")
    try:
        manifest = _converter().structure(fields, Manifest)
    except cattrs.BaseValidationError as error:
        problems = cattrs.transform_error(error)[:PROBLEMS]
        raise InputError(
            *(
                f"{path}: expected the fields of format {FORMAT}, got {shown(problem)}; {DAMAGED}"
                for problem in problems
            )
        ) from error
    try:
        is_same = version == FORMAT and _line(manifest) == line
    except (ValueError, RecursionError):  # NaN, or nested too deeply
        is_same = False
    if not is_same:
        raise InputError(f"{path}: expected format {FORMAT} as nmoe writes it, got another spelling; {DAMAGED}")
    if problems := _impossible(manifest):
        raise InputError(*(f"{path}: expected {shown(problem)}; {DAMAGED}" for problem in problems[:PROBLEMS]))
    return manifest


def read(fs: Fs, folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:  InputError when it is missing, damaged, or that of another folder.
    """
    try:
        data = read_bytes(fs, folder / FILE, limit=LIMIT_BYTES)
    except OSError as error:
        raise InputError(
            f"{folder / FILE}: expected a manifest to read, got {error.strerror or error}; {remedy(error)}"
        ) from error
    manifest = parse(data, folder)
    if manifest.name() != folder.name:
        raise InputError(
            f"{folder}: expected the folder by the name in its manifest, {manifest.name()}; rename it back"
        )
    return manifest


def stored(manifest: Manifest) -> dict[str, list[Stored]]:
    """Where each tensor lies, by name."""
    places: dict[str, list[Stored]] = {name: [] for name in manifest.tensors}
    for file in manifest.files:
        for piece in file.pieces:
            places[piece.name].append(Stored(file=file.name, begin=piece.begin, end=piece.end, offset=piece.offset))
    return places


def _line(manifest: Manifest) -> bytes:
    fields = _converter().unstructure(manifest)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _impossible(manifest: Manifest) -> list[str]:
    """What contradicts itself in a manifest; nothing when a reader may trust its numbers."""
    problems: list[str] = []
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.tensors}
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names):
        problems.append(f"a name of its own for every file, got {names}")
    for name, tensor in manifest.tensors.items():
        if not name or not name.isprintable():
            problems.append(f"a printable name of a tensor, got {name!r}")
        if tensor.dtype not in DTYPES or any(not 0 <= size < SIZE for size in tensor.shape):
            problems.append(f"tensor '{name}' of a known format and shape, got {tensor.dtype} {tensor.shape}")
    if problems:
        return problems
    for file in manifest.files:
        if not FILE_NAME.fullmatch(file.name) or file.name == FILE:
            problems.append(f"a plain name of a file, got {file.name!r}")
        if not 1 <= file.chunk_bytes <= CHUNK_BYTES:
            problems.append(f"chunks of 1 to {CHUNK_BYTES} bytes of {file.name}, got {file.chunk_bytes}")
        elif not 0 <= file.bytes < SIZE or len(file.chunks) != -(-file.bytes // file.chunk_bytes):
            problems.append(
                f"a digest of every {file.chunk_bytes} of the {file.bytes} bytes of {file.name}, got {len(file.chunks)}"
            )
        elif not all(map(SHA256.fullmatch, file.chunks)) or file.sha256 != root_digest(file.chunks):
            problems.append(f"the digest of its chunks for {file.name}, got {file.sha256}")
        places: list[tuple[int, int]] = []
        for piece in file.pieces:
            if piece.name not in parts:
                problems.append(f"known tensors in {file.name}, got {piece.name!r}")
                continue
            if piece.begin < 0 or piece.end < piece.begin:
                problems.append(f"elements in order in {file.name}, got {piece.begin} to {piece.end}")
                continue
            parts[piece.name].append((piece.begin, piece.end))
            size = (piece.end - piece.begin) * DTYPES[manifest.tensors[piece.name].dtype].itemsize
            places.append((piece.offset, piece.offset + size))
        places.sort()
        ends = [0, *(end for _, end in places)]
        if any(begin < end for (begin, _), end in zip(places, ends, strict=False)) or ends[-1] > file.bytes:
            problems.append(f"pieces side by side in {file.name}, got {places}")
    for name, tensor in manifest.tensors.items():
        missing = gaps(prod(tensor.shape), parts[name])
        problems += [f"every element of tensor '{name}' once, got: {gap}" for gap in missing]
    return problems


@lru_cache(1)
def _converter() -> cattrs.Converter:
    """Strict: a field too many is an error. Kept, because making one takes milliseconds."""
    return cattrs.Converter(forbid_extra_keys=True)
