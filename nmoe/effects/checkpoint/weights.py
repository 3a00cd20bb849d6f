"""The weights of a run as one safetensors file: parameters by path, and the router bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Fs
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.record.names import WEIGHTS
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import whole
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.formats import master

ROUTER_BIAS = "router_bias"


def save(folder: Path, params: Any, router_bias: Tensor) -> None:
    """Write the weights.

    Writes:  `folder/weights.safetensors`, whole or not at all.
    Raises:  InputError when there is no room for it.
    """
    tensors = {path: leaf.detach().contiguous() for path, leaf in tree.leaves(params)}
    try:
        with files.replacing(folder / WEIGHTS) as temporary:
            save_file({**tensors, ROUTER_BIAS: router_bias}, temporary)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder / WEIGHTS}: expected room for the weights, got {problem}; free space, then take them from the "
            f"last checkpoint with `nmoe ckpt export-weights {folder} --to FOLDER`"
        ) from error


def load(folder: Path, blueprint: Blueprint) -> tuple[Any, Tensor]:
    """Read the weights of the model that `blueprint` describes, on the CPU.

    returns  parameter tree and router bias
    Raises:  InputError when the file is missing, damaged, or of another model.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: a finished run holds its weights, got no such file; let the run end first")
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path}: weights are a whole safetensors file, got {error}; restore or train again"
        ) from error
    wanted = {name: spec.shape(blueprint.dims) for name, spec in tree.leaves(blueprint.specs)}
    problems = [f"{path}: holds '{name}', got nothing by that name" for name in wanted if name not in found]
    problems += [
        f"{path}: '{name}' has the config's shape {shape}, got {tuple(found[name].shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems += [f"{path}: holds nothing else, got '{name}'" for name in found if name not in (*wanted, ROUTER_BIAS)]
    if ROUTER_BIAS not in found:
        problems.append(f"{path}: holds '{ROUTER_BIAS}', got nothing by that name")
    if problems:
        raise InputError(*(f"{problem}; use the run's own config" for problem in problems))
    return tree.map(lambda name, _: found[name], blueprint.specs), found[ROUTER_BIAS].to(torch.float32)


@attrs.frozen(kw_only=True, eq=False)
class Weights:
    """Parameters and router bias on the CPU."""

    params: Any  # tree of tensors as they were stored
    remainders: dict[str, Tensor]  # by path; low halves of those stored in bf16, where they are known
    router_bias: Tensor

    def exact(self, path: str, value: Tensor) -> Tensor:
        """A parameter in fp32: with its low half where there is one."""
        return master.join(value, self.remainders[path]) if path in self.remainders else value.float()


def of_checkpoint(fs: Fs, folder: Path, manifest: Manifest, blueprint: Blueprint) -> Weights:
    """The weights of the model that `blueprint` describes.

    Raises:  InputError when the checkpoint is damaged or of another model.
    """
    shapes = {path: spec.shape(blueprint.dims) for path, spec in tree.leaves(blueprint.specs)}
    stored = {name: entry for name, entry in manifest.tensors.items() if name.endswith(("/value", "/remainder"))}
    wanted = {f"param/{path}/value" for path in shapes}
    missing = sorted(wanted - set(stored)) + sorted(
        name for name in stored if name.rpartition("/")[0] not in {each.rpartition("/")[0] for each in wanted}
    )
    problems = [f"{folder}: holds the parameters of this model, got a difference in {name}" for name in missing]
    problems += [
        f"{folder}: {name} has the config's shape {shapes[path]}, got {entry.shape}"
        for name, entry in stored.items()
        if (path := name.split("/")[1]) in shapes and entry.shape != shapes[path]
    ]
    if problems:
        raise InputError(*(f"{problem}; use a checkpoint of the same [model]" for problem in problems))
    tensors = {name: torch.empty(entry.shape, dtype=manifests.DTYPES[entry.dtype]) for name, entry in stored.items()}
    bias = torch.empty(manifest.tensors["router_bias"].shape)
    reader.load_(
        fs,
        folder,
        manifest,
        [whole(name, each) for name, each in {**tensors, "router_bias": bias}.items()],
        partial=True,
    )
    return Weights(
        params=tree.map(lambda path, _: tensors[f"param/{path}/value"], blueprint.specs),
        remainders={name.split("/")[1]: each for name, each in tensors.items() if name.endswith("/remainder")},
        router_bias=bias,
    )


def of_path(fs: Fs, path: Path, blueprint: Blueprint) -> Weights:
    """The weights at a path a user wrote: a checkpoint, a run (its newest checkpoint, else its weights file), or that
    file.

    Raises:  InputError when there are none, or they are damaged or of another model.
    """
    if (path / manifests.FILE).is_file():
        return of_checkpoint(fs, path, manifests.read(fs, path), blueprint)
    found = reader.entries(fs, path / "checkpoints") if path.is_dir() else ()
    if found:
        folder = path / "checkpoints" / found[0].name
        return of_checkpoint(fs, folder, manifests.read(fs, folder), blueprint)
    folder = path.parent if path.name == WEIGHTS else path
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"train.warm_start: a run, a checkpoint or {WEIGHTS}, got {path}; fix the path")
    params, router_bias = load(folder, blueprint)
    return Weights(params=params, remainders={}, router_bias=router_bias)
