"""The weights alone, of a checkpoint or of a weights file: for a new run to start with, or to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.effects import buffers, weights
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Fs
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.ranks import ALONE, Ranks
from nmoe.effects.step import State
from nmoe.errors import InputError
from nmoe.pure import optim, tree
from nmoe.pure.layout import ArenaLayout
from nmoe.pure.pieces import whole
from nmoe.pure.spec import Dims

__all__ = ["Weights", "of_checkpoint", "of_path", "put_"]


@attrs.frozen(kw_only=True, eq=False)
class Weights:
    """Parameters and router bias on the CPU."""

    params: Any  # tree of tensors as they were stored
    remainders: dict[str, Tensor]  # by path; low halves of those stored in bf16, where they are known
    router_bias: Tensor

    def exact(self, path: str, value: Tensor) -> Tensor:
        """A parameter in fp32: with its low half where there is one."""
        return optim.join(value, self.remainders[path]) if path in self.remainders else value.float()


def of_checkpoint(fs: Fs, folder: Path, manifest: Manifest, specs: Any, dims: Dims) -> Weights:
    """The weights of the model that `specs` describe.

    Raises:  InputError when the checkpoint is damaged or of another model.
    """
    shapes = {path: spec.shape(dims) for path, spec in tree.leaves(specs)}
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
        params=tree.map(lambda path, _: tensors[f"param/{path}/value"], specs),
        remainders={name.split("/")[1]: each for name, each in tensors.items() if name.endswith("/remainder")},
        router_bias=bias,
    )


def of_path(fs: Fs, path: Path, specs: Any, dims: Dims) -> Weights:
    """The weights at a path a user wrote: a checkpoint, a run (its newest checkpoint, else its weights file), or that
    file.

    Raises:  InputError when there are none, or they are damaged or of another model.
    """
    if (path / manifests.FILE).is_file():
        return of_checkpoint(fs, path, manifests.read(fs, path), specs, dims)
    found = reader.entries(fs, path / "checkpoints") if path.is_dir() else ()
    if found:
        folder = path / "checkpoints" / found[0].name
        return of_checkpoint(fs, folder, manifests.read(fs, folder), specs, dims)
    folder = path.parent if path.name == weights.FILE else path
    if not (folder / weights.FILE).is_file():
        raise InputError(f"train.warm_start: a run, a checkpoint or {weights.FILE}, got {path}; mend the path")
    params, router_bias = weights.load(folder, specs, dims)
    return Weights(params=params, remainders={}, router_bias=router_bias)


def put_(state: State, layouts: tuple[ArenaLayout, ...], start: Weights, ranks: Ranks = ALONE) -> None:
    """Begin with these weights.

    Writes:  values, remainders and router bias of `state`.
    """
    values = dict(tree.leaves(start.params))
    for described, arena in zip(layouts, state.arenas, strict=True):
        for slot in described.slots:
            exact = start.exact(slot.path, values[slot.path])
            if described.policy.shard:
                exact = exact.chunk(ranks.experts.size)[ranks.experts.rank]
            buffers.put_(arena, described, slot, exact, part=ranks.sharing(described).rank)
    state.router_bias.copy_(start.router_bias)
