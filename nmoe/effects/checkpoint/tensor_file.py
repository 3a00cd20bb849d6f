"""Safetensors files written one tensor after another, and read without taking what they say on trust."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
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


def num_bytes(format: Format) -> int:
    """Bytes of a tensor."""
    dtype, shape = format
    return DTYPES[dtype].itemsize * math.prod(shape)


def write(path: Path, formats: Mapping[str, Format], parts: Iterable[Tensor]) -> None:
    """Write a new file; no more than one part is in memory.

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
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            data = _in_order(part).view(-1).view(torch.uint8)
            file.write(data.numpy().data)
            written += data.numel()
    if written != end:
        raise ValueError(f"{path}: expected {end} bytes of tensors, got {written}; pass every part once")


def _in_order(part: Tensor) -> Tensor:
    """The elements in the order of the file. torch transposes a whole matrix in blocks, and columns of a wider one an
    element at a time: 0.25 against 1.15 ms for 512 x 1024 in bf16. Columns become a whole matrix first."""
    if part.ndim == 2 and part.stride(0) == 1 and part.stride(1) > part.shape[0]:
        part = part.T.contiguous().T
    return part.contiguous()


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
