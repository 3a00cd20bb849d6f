"""Safetensors files written one tensor after another, and read without taking what they say on trust."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.errors import InputError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**manifests.DTYPES, "F8_E4M3": torch.float8_e4m3fn})
"""Name safetensors gives a number format -> the format: those of checkpoints, and that of Hugging Face folders."""

Format = tuple[str, tuple[int, ...]]
"""Number format by the name safetensors gives it, and shape."""

ALIGNMENT = 8
"""Bytes; the data starts at a multiple."""


CALL_BYTES = 1 << 20
"""Of one call that writes: 1.5 GB take 0.33 s so, and 2.2 s in calls of 16 MB (ext4, Linux 6, two cores)."""


def num_bytes(format: Format) -> int:
    """Bytes of a tensor."""
    dtype, shape = format
    return DTYPES[dtype].itemsize * math.prod(shape)


def write(path: Path, formats: Mapping[str, Format], parts: Iterable[Tensor]) -> None:
    """Write a new file; no more than two parts are in memory: a thread makes the next one while one is written.

    formats  of every tensor, in the order of the file
    parts    the elements of all tensors, in that order: a tensor may come in several parts
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
    source, rooms = iter(parts), [torch.empty(0, dtype=torch.uint8)] * 2

    def next_bytes(place: int) -> Tensor | None:
        part = next(source, None)
        return None if part is None else _bytes(part, rooms, place)

    with open(path, "xb") as file, ThreadPoolExecutor(1) as thread:
        file.write(len(text).to_bytes(8, "little") + text)
        data, place = next_bytes(0), 1
        while data is not None:
            following = thread.submit(next_bytes, place)
            for call in data.split(CALL_BYTES):
                file.write(call.numpy().data)
            if hasattr(os, "posix_fadvise"):  # Linux begins to write to the disk, and fsync finds it done
                os.posix_fadvise(file.fileno(), written, data.numel(), os.POSIX_FADV_DONTNEED)
            written += data.numel()
            data, place = following.result(), 1 - place
    if written != end:
        raise ValueError(f"{path}: expected {end} bytes of tensors, got {written}; pass every part once")


def _bytes(part: Tensor, rooms: list[Tensor], place: int) -> Tensor:
    """The elements in the order of the file, as bytes: where they lie, or copied into `rooms[place]`, which grows.

    Memory that is used again costs no page faults: a copy to fresh memory takes five times as long.
    """
    if part.is_contiguous():
        return part.reshape(-1).view(torch.uint8)
    size = part.numel() * part.itemsize
    if rooms[place].numel() < size:
        rooms[place] = torch.empty(size, dtype=torch.uint8)
    data = rooms[place][:size]
    _copy_(data.view(part.dtype).view(part.shape), part)
    return data


COLUMNS = 256
"""Of a matrix that is transposed at once: with 2048 rows in bf16, a MB, which stays in the cache."""


def _copy_(out: Tensor, part: Tensor) -> None:
    """Copy to memory in order. torch transposes a whole matrix in blocks, and columns of a wider one an element at a
    time: columns become whole matrices first, some of them at a time. Writes: out."""
    if part.ndim != 2 or part.stride(0) != 1 or part.stride(1) == part.shape[0]:
        out.copy_(part)
        return
    for rows, columns in zip(out.split(COLUMNS), part.T.split(COLUMNS, dim=1), strict=True):
        rows.copy_(columns.contiguous().T)


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
