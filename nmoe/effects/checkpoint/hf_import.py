"""`nmoe import hf`: a Hugging Face folder as a config and a weights file, a tensor at a time; no code of it is run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from nmoe.config import sections
from nmoe.config.fields import table
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import tensor_file, weights
from nmoe.effects.checkpoint.fs import Disk, read_bytes
from nmoe.effects.checkpoint.hf_export import COMPUTE, INDEX
from nmoe.effects.checkpoint.tensor_file import DTYPES, Format, Room
from nmoe.effects.checkpoint.transpose import copy_
from nmoe.effects.record.names import CONFIG, WEIGHTS
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.model import hf, model
from nmoe.pure.model.hf import Part
from nmoe.pure.units import quantity

SINGLE = "model.safetensors"
LIMIT_BYTES = 1 << 28
"""Longest config or index that is read; the index of DeepSeek-V3, 90,000 tensors, has 9 MB."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Number format in `config.json`, of transformers 5 and of earlier ones."""


def import_folder(folder: Path, out: Path, extra: Callable[[sections.Model], Mapping[str, str]]) -> None:
    """Write `config.toml`, the model and its number format, and the weights, which `train.warm_start` takes.

    extra    further files by name, of the model
    Writes:  `out`, whole or not at all.
    Raises:  InputError when `out` exists, there is no room, or the folder is not whole or of a model that nmoe has not.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: expected a name that is free, got what is there; delete it or choose another")
    where = folder / "config.json"
    config = json_object(where)
    compute = _compute(where, config)
    try:
        c = hf.model_of(config)
    except InputError as error:
        raise InputError(*(f"{where}: {problem}" for problem in error.problems)) from error
    parts = hf.parts(c, fp8=hf.QUANTISED in config)
    ours = weights.formats_of(model.specs(c), model.dims(c), COMPUTE[compute])
    place = _places(folder, _wanted(parts, ours))
    further = extra(c)
    with files.refusing(out, "to write the folder"), files.new_folder(out) as made:
        formats = {path: ours[path] for path in dict.fromkeys((*(part.path for part in parts), *ours))}
        with tensor_file.flushing() as flush:
            tensor_file.write(made / WEIGHTS, formats, _tensors(folder, parts, place, ours), flush)
        text = tomli_w.dumps({"model": table(c), "precision": {"compute": compute}})
        for name, content in ((CONFIG, text), *further.items()):
            (made / name).write_text(content, encoding="utf-8")
    say(f"{out}: {len(ours)} tensors, {quantity(sum(map(tensor_file.num_bytes, ours.values())), 'B')}")


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:  InputError when there is none.
    """
    try:
        value = json.loads(read_bytes(Disk(), path, limit=LIMIT_BYTES))
    except OSError as error:
        raise InputError(
            f"{path}: expected a Hugging Face folder with this file, got {error.strerror or error}; fix the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {manifests.shown(str(error))}; copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {manifests.shown(str(value))}; copy it again")
    return value


def _compute(where: Path, config: Mapping[str, Any]) -> str:
    """The number format of the matrices, as `precision.compute` has it.

    Raises:  InputError for another one.
    """
    said = next((config[key] for key in DTYPE_KEYS if config.get(key) is not None), None)
    names = {str(dtype).removeprefix("torch."): compute for compute, dtype in COMPUTE.items()}
    if not isinstance(said, str) or said not in names:
        raise InputError(
            f"{where}: torch_dtype: expected {' or '.join(names)}, got {json.dumps(said)}; convert the weights"
        )
    return names[said]


def _wanted(parts: tuple[Part, ...], ours: Mapping[str, Format]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Number formats that a tensor of theirs may have, and its shape, by name.

    What is fp32 in a model whose products are bf16, gains and routers, is bf16 in what others publish.
    """
    both = ("F32", "BF16") if any(dtype == "BF16" for dtype, _ in ours.values()) else ("F32",)
    named = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (
            both if ours[part.path][0] == named[tensor.dtype] == "F32" else (named[tensor.dtype],),
            tuple(tensor.shape),
        )
        for part in parts
        for name, tensor in part.theirs(DTYPES[ours[part.path][0]]).items()
    }


def _places(folder: Path, wanted: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> dict[str, Path]:
    """The file of each tensor.

    Raises:  InputError with every tensor that is missing, too much, or of another format or shape.
    """
    paths = _files(folder)
    places: dict[str, tuple[Path, Format]] = {}
    problems: list[str] = []
    for path in paths:
        for name, format in tensor_file.read_formats(path).items():
            if name in places:
                problems.append(f"{path}: expected '{manifests.shown(name)}' once, got it in {places[name][0]} too")
            places[name] = path, format
    for name, (dtypes, shape) in wanted.items():
        if name not in places:
            # one of no elements, a shared expert where there is none, need not be written down
            problems += [f"{folder}: expected '{name}', got nothing by that name"] if 0 not in shape else []
            continue
        dtype, present = places[name][1]
        if dtype not in dtypes or present != shape:
            expected = f"{' or '.join(dtypes)} {list(shape)}"
            problems.append(f"{places[name][0]}: expected '{name}' as {expected}, got {dtype} {list(present)}")
    problems += [
        f"{path}: expected no tensor '{manifests.shown(name)}', got one"
        for name, (path, _) in places.items()
        if name not in wanted
    ]
    if problems:
        raise InputError(*(f"{problem}; use the config and the files of one model" for problem in problems))
    return {name: path for name, (path, _) in places.items()}


def _files(folder: Path) -> list[Path]:
    """The weights files: those of the index, or the only one.

    Raises:  InputError when there is none but pickles, which are never loaded, or the index names something else.
    """
    if files.is_file(folder / INDEX):
        names = json_object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(
                f"{folder / INDEX}: expected a weight_map, got {manifests.shown(str(names))}; copy it again"
            )
        named = list(dict.fromkeys(names.values()))
        wrong = [name for name in named if not isinstance(name, str) or not _is_plain(name)]
        if wrong:
            raise InputError(
                *(
                    f"{folder / INDEX}: expected names of .safetensors files in the folder, got "
                    f"{manifests.shown(str(name))}; nmoe loads nothing else"
                    for name in wrong
                )
            )
        return [folder / name for name in named]
    if files.is_file(folder / SINGLE):
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    got = f"{', '.join(pickles)}, pickles, which may run code" if pickles else "none"
    raise InputError(f"{folder}: expected {INDEX} or {SINGLE}, got {got}; convert the weights to safetensors")


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and manifests.FILE_NAME.fullmatch(name) is not None


def _tensors(
    folder: Path, parts: tuple[Part, ...], place: Mapping[str, Path], ours: Mapping[str, Format]
) -> Iterator[Tensor]:
    """The parts of our tensors, in the order of `parts`; each holds until the next is asked for."""
    made, rooms = Room(), defaultdict[int, Room](Room)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(tensor_file.opened(path)) for path in sorted(set(place.values()))}
        for part in parts:
            dtype = DTYPES[ours[part.path][0]]
            names = [name for name in part.theirs(dtype) if name in place]
            out = made.tensor(dtype, part.shape)
            theirs = {name: opened[place[name]].read(name, rooms[at]) for at, name in enumerate(names)}
            if part.leaf.views:
                places = part.leaf.split(out)
                for name, tensor in theirs.items():
                    copy_(places[name], tensor)
            else:
                out.copy_(part.leaf.join(theirs))
            yield out
