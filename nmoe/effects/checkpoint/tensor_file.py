"""Safetensors files written one tensor after another, and read without taking what they say on trust."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from types import MappingProxyType

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint.fs import Disk, read_into
from nmoe.effects.checkpoint.transpose import copy_
from nmoe.errors import InputError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**manifests.DTYPES, "F8_E4M3": torch.float8_e4m3fn})
"""Name safetensors gives a number format -> the format: those of checkpoints, and that of Hugging Face folders."""

Format = tuple[str, tuple[int, ...]]
"""Number format by the name safetensors gives it, and shape."""

ALIGNMENT = 8
"""Bytes; the data starts at a multiple."""

CALL_BYTES = 1 << 20
"""Of one call that writes: 1.5 GB take 0.33 s so, and 2.2 s in calls of 16 MB (ext4, Linux 6, two cores)."""

ROOM_BYTES = 4 << 20
"""Of what is made while as much is written."""


@attrs.define(eq=False)
class Room:
    """Memory that is used again: a copy to fresh memory, whose pages the system makes, takes five times as long."""

    data: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.uint8))

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor that holds anything, in the place of the one before; the memory grows where it does not fit."""
        size = dtype.itemsize * math.prod(shape)
        if self.data.numel() < size:
            self.data = torch.empty(size, dtype=torch.uint8)
        return self.data[:size].view(dtype).view(*shape)


def num_bytes(format: Format) -> int:
    """Bytes of a tensor."""
    dtype, shape = format
    return DTYPES[dtype].itemsize * math.prod(shape)


@attrs.define(kw_only=True, eq=False)
class Flush:
    """Flushes to the disk beside the writing, so that the last flush finds little to do.

    Linux begins by itself after seconds; asked to by fadvise, it leaves half of the bytes to the last flush.
    """

    thread: ThreadPoolExecutor
    last: Future[None] | None = None

    def offer(self, file: BufferedWriter) -> None:
        """Flush what was written, unless a flush is under way.

        Raises:  OSError of the flush before.
        """
        if self.last is None or self.last.done():
            self.wait()
            self.last = self.thread.submit(_flush, os.dup(file.fileno()))

    def wait(self) -> None:
        """Wait for the last one.

        Raises:  OSError of it.
        """
        if self.last is not None:
            self.last.result()


@contextmanager
def flushing() -> Iterator[Flush]:
    """For all files of a folder."""
    with ThreadPoolExecutor(1) as thread:
        flush = Flush(thread=thread)
        yield flush
        flush.wait()


def _flush(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, formats: Mapping[str, Format], parts: Iterable[Tensor], flush: Flush) -> None:
    """Write a new file: a thread makes the next parts while some are written, another flushes what was.

    formats  of every tensor, in the order of the file
    parts    the elements of all tensors, in that order: a tensor may come in several parts. Each is read before the
             next is asked for
    Raises:  OSError; ValueError when the parts are not as many bytes as the formats say.
    Writes:  `path`, which holds anything when this raises.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in formats.items():
        begin, end = end, end + num_bytes((dtype, shape))
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % ALIGNMENT)
    written = 0
    full = _filled(parts, min(ROOM_BYTES, end))
    with open(path, "xb") as file, _one_thread_an_op(), ThreadPoolExecutor(1) as thread:
        file.write(len(text).to_bytes(8, "little") + text)
        following = thread.submit(next, full, None)
        while (data := following.result()) is not None:
            following = thread.submit(next, full, None)
            for call in data.split(CALL_BYTES):
                file.write(call.numpy().data)
            flush.offer(file)
            written += data.numel()
    if written != end:
        raise ValueError(f"{path}: expected {end} bytes of tensors, got {written}; pass every part once")


@contextmanager
def _one_thread_an_op() -> Iterator[None]:
    """torch's further threads would wait for each other in loops, and take the cores from the thread that writes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _filled(parts: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    """The bytes of parts in the order of the file, `limit` at most at once; each holds until the one after the next is
    asked for."""
    room, other = (torch.empty(limit, dtype=torch.uint8) for _ in range(2))
    used = 0
    for part in parts:
        for piece in _pieces(part, limit):
            if used + piece.nbytes > limit or used % piece.itemsize:
                yield room[:used]
                room, other, used = other, room, 0
            place = room[used : used + piece.nbytes].view(piece.dtype).view(piece.shape)
            copy_(place, piece)
            used += piece.nbytes
    yield room[:used]


def _pieces(part: Tensor, limit: int) -> Iterator[Tensor]:
    """A tensor in rows, of which each piece has `limit` bytes at most."""
    if part.nbytes <= limit:
        yield part
    elif part.is_contiguous():
        yield from part.view(-1).split(limit // part.itemsize)
    elif rows := limit // part[0].nbytes:
        yield from part.split(rows)
    else:
        for row in part:
            yield from _pieces(row, limit)


@attrs.frozen(kw_only=True, eq=False)
class Stored:
    """A file that is open to read."""

    path: Path
    handle: int
    formats: Mapping[str, Format]
    begins: Mapping[str, int]  # first byte of each tensor

    def read(self, name: str, room: Room, row: int | None = None) -> Tensor:
        """A tensor or one row of it, in `room`.

        Raises:  InputError when it cannot be read.
        """
        dtype, shape = self.formats[name]
        shape = shape if row is None else shape[1:]
        tensor = room.tensor(DTYPES[dtype], shape)
        data = tensor.view(-1).view(torch.uint8).numpy().data
        with files.refusing(self.path, f"to read '{manifests.shown(name)}'", "copy it again"):
            if read_into(Disk(), self.handle, data, self.begins[name] + (row or 0) * tensor.nbytes) < tensor.nbytes:
                raise OSError(errno.EIO, "the end of the file", str(self.path))
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """A file to read from.

    Raises:  InputError when it is not a whole safetensors file.
    """
    formats = read_formats(path)
    disk = Disk()
    with files.refusing(path, "a safetensors file", "copy it again"):
        handle = disk.open(path)
    try:
        header = bytearray(8)
        read_into(disk, handle, header, 0)
        header = bytearray(int.from_bytes(header, "little"))
        read_into(disk, handle, header, 8)
        fields = json.loads(header)
        begins = {name: 8 + len(header) + fields[name]["data_offsets"][0] for name in formats}
        yield Stored(path=path, handle=handle, formats=formats, begins=begins)
    finally:
        disk.close(handle)


def read_formats(path: Path) -> dict[str, Format]:
    """Format and shape of every tensor of a file, none of which is read.

    Raises:  InputError when it is not a whole safetensors file.
    """
    with files.refusing(path, "a safetensors file", "copy it again"):
        files.regular_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = manifests.shown(str(getattr(error, "strerror", None) or error))
        raise InputError(f"{path}: expected a whole safetensors file, got {reason}; copy it again") from error
