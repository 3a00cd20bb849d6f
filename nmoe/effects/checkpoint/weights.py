"""The weights of a run as one safetensors file: parameters by path, and the router bias."""

from __future__ import annotations

from collections.abc import Mapping
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
from nmoe.effects.checkpoint.tensor_file import Format
from nmoe.effects.record.names import CHECKPOINTS, WEIGHTS
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import whole
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.spec import POLICY, Dims, Role, Spec
from nmoe.pure.formats import master
from nmoe.pure.model.hf import ROUTER_BIAS


def formats_of(specs: Any, dims: Dims, compute: torch.dtype) -> dict[str, Format]:
    """Number format and shape of every tensor of the weights: the parameters by path, and the router bias.

    compute  format of what is stored in the format of the products
    """
    names = {dtype: name for name, dtype in manifests.DTYPES.items()}
    parameters: dict[str, Spec] = dict(tree.leaves(specs))
    # a layer with experts is their parent in the tree
    layers = {path.rpartition(".")[0] for path, spec in parameters.items() if spec.role is Role.EXPERT}
    return {
        path: (names[compute if POLICY[spec.role].storage == "compute" else torch.float32], spec.shape(dims))
        for path, spec in parameters.items()
    } | {ROUTER_BIAS: ("F32", (len(layers), dims["E"]))}


def formats(blueprint: Blueprint) -> dict[str, Format]:
    """Number format and shape of every tensor of the weights of a training."""
    stored = (layout.storage for layout in blueprint.layouts if layout.policy.storage == "compute")
    return formats_of(blueprint.specs, blueprint.dims, next(stored, torch.float32))


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
    return read(folder, blueprint.specs, formats(blueprint))


def read(folder: Path, specs: Any, wanted: Mapping[str, Format]) -> tuple[Any, Tensor]:
    """As `load`, of the model with these specs, whose tensors have the formats `wanted`."""
    path = folder / WEIGHTS
    if not files.is_file(path):
        raise InputError(
            f"{path}: expected the weights of a finished run, got no such file; let the run end, or name one of its "
            f"checkpoints: `nmoe ckpt list {folder}`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            present = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            # before a tensor is read: what a file claims to hold need not fit into memory
            if problems := differences(str(path), wanted, present):
                raise InputError(*(f"{problem}; use the run's own config" for problem in problems))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        reason = manifests.shown(str(getattr(error, "strerror", None) or error))
        raise InputError(
            f"{path}: expected a whole safetensors file, got {reason}; restore it or train again"
        ) from error
    return tree.map(lambda name, _: tensors[name], specs), tensors[ROUTER_BIAS]


@attrs.frozen(kw_only=True, eq=False)
class Weights:
    """Parameters and router bias on the CPU."""

    params: Any  # tree of tensors as they were stored
    remainders: dict[str, Tensor]  # by path; low halves of those stored in bf16, where they are known
    router_bias: Tensor

    def exact(self, path: str, value: Tensor) -> Tensor:
        """A parameter in fp32: with its low half where there is one."""
        return master.join(value, self.remainders[path]) if path in self.remainders else value.float()


def of_checkpoint(fs: Fs, folder: Path, manifest: Manifest, specs: Any, formats: Mapping[str, Format]) -> Weights:
    """The weights of the model with these specs, whose tensors have these formats.

    Raises:  InputError when the checkpoint is damaged or of another model.
    """
    wanted = of_manifest(folder, manifest, formats)
    tensors = {name: torch.empty(shape, dtype=manifests.DTYPES[dtype]) for name, (dtype, shape) in wanted.items()}
    reader.load_(fs, folder, manifest, [whole(*named) for named in tensors.items()], partial=True)
    return Weights(
        params=tree.map(lambda path, _: tensors[f"param/{path}/value"], specs),
        remainders={name.split("/")[1]: low for name, low in tensors.items() if name.endswith("/remainder")},
        router_bias=tensors[ROUTER_BIAS],
    )


def of_manifest(folder: Path, manifest: Manifest, formats: Mapping[str, Format]) -> dict[str, Format]:
    """What a checkpoint of weights of these formats holds of them, by its own names.

    Raises:  InputError when it is of another model.
    """
    wanted: dict[str, Format] = {}
    for name, (dtype, shape) in formats.items():
        wanted[stored_name(name)] = dtype, shape
        if dtype == "BF16":
            wanted[f"param/{name}/remainder"] = "I16", shape
    present = {
        name: (entry.dtype, entry.shape)
        for name, entry in manifest.tensors.items()
        if name == ROUTER_BIAS or name.endswith(("/value", "/remainder"))
    }
    if problems := differences(str(folder), wanted, present):
        raise InputError(*(f"{problem}; use the run's own config" for problem in problems))
    return wanted


def stored_name(path: str) -> str:
    """What a checkpoint calls a tensor of the weights."""
    return path if path == ROUTER_BIAS else f"param/{path}/value"


def checkpoint_of(fs: Fs, path: Path) -> Path | None:
    """The folder of the checkpoint at a path a user wrote, or the newest of the run there; None: there is none."""
    folder = manifests.find(path)
    if folder is None and (entries := reader.entries(fs, path / CHECKPOINTS)):
        folder = path / CHECKPOINTS / entries[0].name
    return folder


def of_path(fs: Fs, path: Path, blueprint: Blueprint) -> Weights:
    """The weights at a path a user wrote: a checkpoint, a run (its newest checkpoint, else its weights file), or that
    file.

    Raises:  InputError when there are none, or they are damaged or of another model.
    """
    folder = checkpoint_of(fs, path)
    if folder is not None:
        return of_checkpoint(fs, folder, manifests.read(fs, folder), blueprint.specs, formats(blueprint))
    folder = path.parent if path.name == WEIGHTS else path
    if not files.is_file(folder / WEIGHTS):
        raise InputError(f"train.warm_start: expected a run, a checkpoint or {WEIGHTS}, got {path}; fix the path")
    params, router_bias = load(folder, blueprint)
    return Weights(params=params, remainders={}, router_bias=router_bias)


def differences(where: str, wanted: Mapping[str, Format], present: Mapping[str, Format]) -> list[str]:
    """What is missing, too much, or of another format or shape."""
    problems = [f"{where}: expected '{name}', got nothing by that name" for name in wanted if name not in present]
    problems += [
        f"{where}: expected '{name}' as {kind[0]} {list(kind[1])}, got {present[name][0]} {list(present[name][1])}"
        for name, kind in wanted.items()
        if name in present and present[name] != kind
    ]
    others = [name for name in present if name not in wanted]
    return problems + [f"{where}: expected nothing else, got '{manifests.shown(name)}'" for name in others[:10]]
