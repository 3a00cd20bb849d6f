"""`nmoe export hf`: a checkpoint or weights file of any number of ranks as a Hugging Face folder, a shard at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.config.layers import load_model
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import tensor_file, weights
from nmoe.effects.checkpoint.fs import Fs
from nmoe.effects.checkpoint.parts import Parts
from nmoe.effects.checkpoint.tensor_file import DTYPES, Format
from nmoe.effects.record.names import CONFIG, WEIGHTS
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import Piece
from nmoe.pure.model import hf, model
from nmoe.pure.model.hf import Part
from nmoe.pure.units import counted, quantity

INDEX = "model.safetensors.index.json"
COMPUTE: Mapping[str, torch.dtype] = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})
"""Formats of `precision.storage()`."""

READ_BYTES = 1 << 26
"""Of a checkpoint, what is read at once; as much as that is used meanwhile. Of 2^28 the first takes too long."""

VERIFIED_PARAMETERS = 1_000_000_000
"""Models below are compared with `transformers` unless the user says otherwise: two copies in fp32 are 8 GB."""


@attrs.frozen(kw_only=True, eq=False)
class Source:
    """Weights that are read part by part."""

    folder: Path  # of the run
    model: sections.Model
    compute: str  # precision.storage()
    formats: Mapping[str, Format]  # of every tensor
    read: Callable[[Sequence[Part]], Iterator[Tensor]]  # each holds until the next is asked for

    def parameters(self) -> int:
        """How many there are, the router bias included."""
        return sum(math.prod(shape) for _, shape in self.formats.values())


@attrs.frozen(kw_only=True)
class Shard:
    """One file of the folder."""

    parts: tuple[Part, ...]
    formats: Mapping[str, Format]  # of their tensors, in the order of the file

    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(tensor_file.num_bytes, self.formats.values()))


def export(
    source: Source,
    out: Path,
    *,
    shard_bytes: int,
    fp8: bool = False,
    extra: Mapping[str, str],
    end_of_text: int | None,
    verify: Callable[[Path], None] | None,
) -> None:
    """Write the folder.

    shard_bytes  of a file at most, unless one tensor of ours has more
    fp8          whether matrices of the blocks are written in fp8, as DeepSeek publishes V3
    extra        further files, by name
    end_of_text  id of the token that ends a text; None: not known
    verify       looks at the folder before it gets its name; raises when it is not right
    Writes:      `out`, whole or not at all.
    Raises:      InputError when `out` exists, the source cannot be read, or there is no room.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: expected a name that is free, got what is there; delete it or choose another")
    ids = {"bos_token_id": None, "eos_token_id": end_of_text}
    dtype = str(COMPUTE[source.compute]).removeprefix("torch.")
    _, family = hf.family_of(source.model)
    config = hf.settings(source.model) | {"architectures": [family.architecture], "torch_dtype": dtype, **ids}
    if fp8:
        hf.check_fp8(source.model)
        config[hf.QUANTISED] = hf.fp8_settings()
    shards = plan(source, shard_bytes, fp8=fp8)
    names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
    size = sum(shard.num_bytes() for shard in shards)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.formats},
    }
    with files.refusing(out, "to write the folder"), files.new_folder(out) as folder:
        with tensor_file.flushing() as flush:
            for name, shard in zip(names, shards, strict=True):
                tensor_file.write(folder / name, shard.formats, _tensors(source, shard), flush)
        for name, content in (("config.json", config), ("generation_config.json", ids), (INDEX, index)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for name, text in extra.items():
            (folder / name).write_text(text, encoding="utf-8")
        if verify is not None:
            verify(folder)
    say(f"{out}: {len(index['weight_map'])} tensors, {quantity(size, 'B')} in {counted(len(shards), 'file')}")


def plan(source: Source, shard_bytes: int, *, fp8: bool) -> tuple[Shard, ...]:
    """Which tensor goes into which file.

    Raises:  InputError when `shard_bytes` is no size, or a tensor of ours has no place in theirs.
    """
    if shard_bytes < 1:
        raise InputError(f"--shard-bytes: expected at least 1, got {shard_bytes}; raise it")
    parts = hf.parts(source.model, fp8=fp8)
    written = {part.path for part in parts}
    if left := [path for path, (_, shape) in source.formats.items() if path not in written and 0 not in shape]:
        raise InputError(*(f"{path}: expected a name in theirs, got none; it cannot be exported" for path in left))
    sizes = [sum(map(tensor_file.num_bytes, _formats(source, [part]).values())) for part in parts]
    groups = _grouped(parts, sizes, shard_bytes)
    return tuple(Shard(parts=tuple(group), formats=_formats(source, group)) for group in groups)


def _formats(source: Source, parts: Sequence[Part]) -> dict[str, Format]:
    """Of the tensors of theirs that parts become, by name."""
    named = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (named[tensor.dtype], tuple(tensor.shape))
        for part in parts
        for name, tensor in part.theirs(DTYPES[source.formats[part.path][0]]).items()
    }


def _tensors(source: Source, shard: Shard) -> Iterator[Tensor]:
    """The tensors of a file, in its order."""
    for part, piece in zip(shard.parts, source.read(shard.parts), strict=True):
        yield from part.leaf.split(piece).values()


def open_source(fs: Fs, path: Path) -> Source:
    """The weights at a path a user wrote: a checkpoint, a run (its newest checkpoint, else its weights file), or a
    folder that `nmoe import hf` wrote.

    Raises:  InputError when there are none, or they are of another model than config.toml beside them says.
    """
    checkpoint = weights.checkpoint_of(fs, path)
    folder = path if checkpoint is None else checkpoint.parent.parent
    if checkpoint is None and not files.is_file(folder / WEIGHTS):
        raise InputError(f"{path}: expected a run, a checkpoint or a folder with {WEIGHTS}, got neither; fix the path")
    c, precision = load_model(folder / CONFIG)
    formats = weights.formats_of(model.specs(c), model.dims(c), COMPUTE[precision.storage()])
    if checkpoint is None:
        read = _of_file(folder / WEIGHTS, formats)
    else:
        read = _of_checkpoint(fs, checkpoint, formats)
    return Source(folder=folder, model=c, compute=precision.storage(), formats=formats, read=read)


def _of_checkpoint(fs: Fs, folder: Path, formats: Mapping[str, Format]) -> Callable[[Sequence[Part]], Iterator[Tensor]]:
    """Reads, and verifies, the next tensors while some are used."""
    manifest = manifests.read(fs, folder)
    weights.of_manifest(folder, manifest, formats)
    stored = Parts(fs=fs, folder=folder, manifest=manifest)
    rooms = tensor_file.Room(), tensor_file.Room()

    def load(group: Sequence[Part], room: tensor_file.Room) -> list[Tensor]:
        """The tensors of parts; rows side by side are one piece."""
        runs = [list(run) for _, run in groupby(group, key=lambda part: part.path)]
        shapes = [(len(run), *run[0].shape) for run in runs]
        sizes = [
            tensor_file.num_bytes((formats[run[0].path][0], shape)) for run, shape in zip(runs, shapes, strict=True)
        ]
        aligned = [-(-size // tensor_file.ALIGNMENT) * tensor_file.ALIGNMENT for size in sizes]
        places = room.tensor(torch.uint8, (sum(aligned),)).split(aligned)
        pieces = [
            Piece(
                name=weights.stored_name(run[0].path),
                shape=formats[run[0].path][1],
                begin=(run[0].index or 0) * math.prod(run[0].shape),
                tensor=place[:size].view(DTYPES[formats[run[0].path][0]]).view(shape),
            )
            for run, place, size, shape in zip(runs, places, sizes, shapes, strict=True)
        ]
        stored.load_(pieces)
        return [row for piece in pieces for row in piece.tensor]

    def read(parts: Sequence[Part]) -> Iterator[Tensor]:
        groups = _grouped(
            parts, [tensor_file.num_bytes((formats[part.path][0], part.shape)) for part in parts], READ_BYTES
        )
        with ThreadPoolExecutor(1) as thread:
            tensors = load(groups[0], rooms[0])
            for place, further in enumerate(groups[1:], 1):
                following = thread.submit(load, further, rooms[place % 2])
                yield from tensors
                tensors = following.result()
            yield from tensors

    return read


def _of_file(path: Path, formats: Mapping[str, Format]) -> Callable[[Sequence[Part]], Iterator[Tensor]]:
    present = tensor_file.read_formats(path)
    if problems := weights.differences(str(path), formats, present):
        raise InputError(*(f"{problem}; use the config it was saved with" for problem in problems))

    def read(parts: Sequence[Part]) -> Iterator[Tensor]:
        room = tensor_file.Room()
        with tensor_file.opened(path) as file:
            for part in parts:
                yield file.read(part.path, room, part.index)

    return read


def _grouped(parts: Sequence[Part], sizes: Sequence[int], limit: int) -> list[list[Part]]:
    """Parts side by side in groups of at most so many bytes, or of one."""
    groups: list[list[Part]] = []
    room = 0
    for part, size in zip(parts, sizes, strict=True):
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(part)
        room -= size
    return groups
