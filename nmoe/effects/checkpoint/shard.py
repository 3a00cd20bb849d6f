"""One rank's file: where its pieces lie, copied to one buffer, and written from there."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects.checkpoint.fs import Fs, write_all
from nmoe.effects.checkpoint.manifest import DTYPES, FileEntry, PieceEntry, root_digest
from nmoe.errors import InputError
from nmoe.pure.checkpoint.digest import digests
from nmoe.pure.checkpoint.pieces import Piece

ALIGNMENT = 4096
"""Bytes; the data of a file starts at a multiple, so that pages of the file are pages of data."""

HASHERS = 4
"""Threads that digest while another one writes; each does about 1.5 GB/s."""


@attrs.frozen(kw_only=True, eq=False)
class Shard:
    """What one rank writes: a safetensors header, then its pieces without a gap."""

    header: bytes
    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]  # of the pieces, from the start of the file
    size: int  # bytes of the file


@attrs.frozen(kw_only=True, eq=False)
class Staged:
    """The content of a shard at one moment. Its tensors may change as soon as `ready` says so."""

    shard: Shard
    data: Tensor  # u8 in host memory, what follows the header
    digests: Callable[[], list[int]]  # of the pieces; waits for the copy
    ready: Any  # the event behind the copies on their stream; None: they are done


def plan_shard(pieces: Sequence[Piece]) -> Shard:
    """Where each piece lies in the file; wide formats come first, so that each element is aligned.

    Raises:  InputError when two pieces have one name, or one is of a format that safetensors does not know.
    """
    ordered = sorted(pieces, key=lambda p: (-p.tensor.element_size(), p.name))
    names = {dtype: name for name, dtype in DTYPES.items()}
    problems = [
        f"checkpoint: expected '{p.name}' in a format of {', '.join(DTYPES)}, got {p.tensor.dtype}; convert it"
        for p in ordered
        if p.tensor.dtype not in names
    ]
    problems += [
        f"checkpoint: expected one piece of '{name}' on a rank, got {count}; give them other names"
        for name, count in Counter(p.name for p in ordered).items()
        if count > 1
    ]
    if problems:
        raise InputError(*problems)
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: list[int] = []
    end = 0
    for piece in ordered:
        offsets.append(end)
        end += piece.tensor.nbytes
        fields[piece.name] = {
            "dtype": names[piece.tensor.dtype],
            "shape": _local_shape(piece),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = -(8 + len(text)) % ALIGNMENT + len(text)
    header = length.to_bytes(8, "little") + text.ljust(length)
    return Shard(
        header=header,
        pieces=tuple(ordered),
        offsets=tuple(len(header) + offset for offset in offsets),
        size=len(header) + end,
    )


def num_bytes(pieces: Sequence[Piece]) -> int:
    """Host memory that a save of these pieces needs."""
    return sum(piece.tensor.nbytes for piece in pieces)


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """u8 [size] in host memory, which `free_host` gives back.

    pinned   whether a GPU copies to it. torch's own pinned memory has a power of two of bytes, up to twice as many

    Raises:  InputError when the system does not pin as much.
    """
    data = torch.empty(size, dtype=torch.uint8)
    if pinned and size:
        data.zero_()  # all threads touch the pages, which one alone would do while pinning them
        code = int(_cuda().cudaHostRegister(data.data_ptr(), size, 0))
        if code:
            raise InputError(
                f"checkpoint: expected {size} bytes of pinned host memory for the copy a save is written from, got "
                f"CUDA error {code}; free memory, raise what `ulimit -l` shows, or write memory.pinned = false"
            )
    return data


def free_host(data: Tensor) -> None:
    """Let the system have memory of `host_memory`; no copy to it is under way."""
    if data.numel() and data.is_pinned():
        _cuda().cudaHostUnregister(data.data_ptr())


def stage(shard: Shard, data: Tensor, streams: tuple[Any, Any] | None) -> Staged:
    """Copy the pieces to `data`; beside it, when they are on a GPU, digest them there.

    data     u8 [bytes of the pieces], in host memory, pinned when they are on a GPU that shall not be waited for
    streams  CUDA streams of the copy and of the digests; None: the copy is done when this returns
    Writes:  `data`.
    """
    start = len(shard.header)
    places = [
        data[offset - start : offset - start + piece.tensor.nbytes]
        for piece, offset in zip(shard.pieces, shard.offsets, strict=True)
    ]
    if streams is None:
        for piece, place in zip(shard.pieces, places, strict=True):
            place.view(piece.tensor.dtype).copy_(piece.tensor.detach().view(-1))

        def sums() -> list[int]:
            # Host memory either way, and the copy may be read while training continues.
            return digests(
                [
                    (place.view(piece.tensor.dtype), piece.begin)
                    for piece, place in zip(shard.pieces, places, strict=True)
                ]
            ).tolist()

        return Staged(shard=shard, data=data, digests=sums, ready=None)

    copying, digesting = streams
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(copying), torch.no_grad():
        for piece, place in zip(shard.pieces, places, strict=True):
            place.view(piece.tensor.dtype).copy_(piece.tensor.detach().view(-1), non_blocking=True)
    with torch.cuda.stream(digesting), torch.no_grad():
        values = digests([(piece.tensor.detach(), piece.begin) for piece in shard.pieces])
        copied = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        copied.copy_(values, non_blocking=True)
    copying.wait_stream(digesting)
    ready = torch.cuda.Event()
    ready.record(copying)

    def awaited() -> list[int]:
        ready.synchronize()
        return copied.tolist()

    return Staged(shard=shard, data=data, digests=awaited, ready=ready)


def write(fs: Fs, path: Path, staged: Staged, chunk_bytes: int) -> tuple[FileEntry, list[int]]:
    """Write the file, durably, and digest what was written on the way.

    returns  what the manifest says of the file, and the digests of its pieces
    Writes:  `path`, which must not exist.
    Raises:  OSError; the file is then worth nothing.
    """
    shard = staged.shard
    if staged.ready is not None:
        staged.ready.synchronize()
    data = staged.data.numpy().data
    handle = fs.create(path, shard.size)
    try:
        with ThreadPoolExecutor(HASHERS) as pool:
            digested = pool.submit(staged.digests)
            sums = [
                pool.submit(_sha256, shard.header, data, begin, min(begin + chunk_bytes, shard.size))
                for begin in range(0, shard.size, chunk_bytes)
            ]
            end = write_all(fs, handle, shard.header, 0)
            for begin in range(0, len(data), chunk_bytes):
                end = write_all(fs, handle, data[begin : begin + chunk_bytes], end)
            fs.sync(handle)
            chunks = tuple(future.result() for future in sums)
    finally:
        fs.close(handle)
    entry = FileEntry(
        name=path.name,
        bytes=shard.size,
        sha256=root_digest(chunks),
        chunk_bytes=chunk_bytes,
        chunks=chunks,
        pieces=tuple(
            PieceEntry(name=piece.name, begin=piece.begin, end=piece.end(), offset=offset)
            for piece, offset in zip(shard.pieces, shard.offsets, strict=True)
        ),
    )
    return entry, digested.result()


def _cuda() -> Any:
    """The functions of CUDA's runtime that torch hands out."""
    return torch.cuda.cudart()


def _sha256(header: bytes, data: memoryview, begin: int, end: int) -> str:
    """The digest of bytes `begin` to `end` of the file that `header` and `data` make."""
    digest = hashlib.sha256(header[begin:end])
    digest.update(data[max(begin - len(header), 0) : max(end - len(header), 0)])
    return digest.hexdigest()


def _local_shape(piece: Piece) -> list[int]:
    """The shape a reader of the file sees: the whole, some rows of it, or a flat stretch."""
    size = piece.tensor.numel()
    if size == prod(piece.shape):
        return list(piece.shape)
    row = prod(piece.shape[1:])
    if size and piece.begin % row == 0 and size % row == 0:
        return [size // row, *piece.shape[1:]]
    return [size]
