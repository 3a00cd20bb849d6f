"""The weights of a run as one safetensors file: parameters by path, and the router bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmoe.effects import files
from nmoe.errors import InputError
from nmoe.pure import tree
from nmoe.pure.spec import Dims

__all__ = ["FILE", "load", "save"]

FILE = "weights.safetensors"
ROUTER_BIAS = "router_bias"


def save(folder: Path, params: Any, router_bias: Tensor) -> None:
    """Write the weights.

    Writes:  `folder/weights.safetensors`, whole or not at all.
    """
    tensors = {path: leaf.detach().contiguous() for path, leaf in tree.leaves(params)}
    with files.replacing(folder / FILE) as temporary:
        save_file({**tensors, ROUTER_BIAS: router_bias}, temporary)


def load(folder: Path, specs: Any, dims: Dims) -> tuple[Any, Tensor]:
    """Read the weights of the model that `specs` describe, on the CPU.

    returns  parameter tree and router bias
    Raises:  InputError when the file is missing, damaged, or of another model.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path}: a finished run holds its weights, got no such file; let the run end first")
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path}: weights are a whole safetensors file, got {error}; restore or train again"
        ) from error
    wanted = {name: spec.shape(dims) for name, spec in tree.leaves(specs)}
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
    return tree.map(lambda name, _: found[name], specs), found[ROUTER_BIAS].to(torch.float32)
