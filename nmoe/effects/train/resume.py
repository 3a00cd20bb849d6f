"""Where a run begins: from nothing, from the weights of another, or where an earlier attempt was saved.

`train.resume` says which: "auto" goes on in the run folder of this name, if there is one; "never" wants a new folder; a
path is a run or a checkpoint to go on from. A path into the run's own folder takes the run back to that checkpoint.
Another path is where a new folder starts; once that has a checkpoint of its own, it goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from nmoe.config import Difference
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Fs
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.checkpoint.weights import Weights
from nmoe.effects.device import buffers
from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks
from nmoe.effects.record.names import CHECKPOINTS
from nmoe.effects.train import identity, zero
from nmoe.effects.train.identity import Identity
from nmoe.effects.train.step import State
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import Piece, arena_pieces, share, whole
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.optim.update import rule
from nmoe.pure.watch.validations import Seen, dumped, parse

ROUTER_BIAS = "router_bias"
COUNTERS = ("updates", "skipped", "skipped_in_row")
"""Fields of a State that are 0-d tensors."""


@attrs.frozen(kw_only=True)
class Origin:
    """Which checkpoints an attempt goes on from."""

    folder: Path  # of checkpoints, or one checkpoint
    single: bool  # whether it is one checkpoint


@attrs.frozen(kw_only=True)
class Restored:
    """What an attempt goes on with."""

    state: State
    seen: Seen
    manifest: Manifest
    origin: str  # the checkpoint
    accepted: tuple[Difference, ...]


def origin(resume: str, run_folder: Path) -> Origin | None:
    """What an attempt in `run_folder` goes on from; None: it starts at step 0.

    Raises:  InputError when `run_folder` is no run's, "never" meets one, or a path holds no run and no checkpoint.
    """
    own = run_folder / CHECKPOINTS
    if run_folder.exists() and not (run_folder / "config.toml").is_file():
        raise InputError(
            f"run.name: a new name, or that of a run, got {run_folder}, which exists and holds no config.toml; choose "
            "another name"
        )
    if resume == "never":
        if run_folder.exists():
            raise InputError(
                f'run.name: a new run folder with train.resume = "never", got {run_folder}, which exists; choose '
                'another name, or train.resume = "auto" to go on'
            )
        return None
    if resume == "auto":
        return Origin(folder=own, single=False) if run_folder.exists() else None
    named = _named(Path(resume))
    is_own = run_folder.resolve() in named.folder.resolve().parents
    if not is_own and own.is_dir() and any(manifests.name_fields(each.name) for each in own.iterdir()):
        return Origin(folder=own, single=False)
    return named


def _named(path: Path) -> Origin:
    """The checkpoints at a path a user wrote: a run folder, its folder of checkpoints, or one of these."""
    if (path / manifests.FILE).is_file():
        return Origin(folder=path, single=True)
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir() and any((each / manifests.FILE).is_file() for each in folder.iterdir()):
            return Origin(folder=folder, single=False)
    raise InputError(f"train.resume: a run folder or a checkpoint, got {path}, which holds none; fix the path")


def restore(
    fs: Fs,
    where: Origin,
    blank: State,
    blueprint: Blueprint,
    this: Identity,
    accept: Sequence[str],
    report: Callable[[str], None],
    ranks: Ranks = SINGLE_RANK,
) -> Restored | None:
    """The state of the newest valid checkpoint, or of the one named.

    blank    a State of zeros, which is filled
    report   called with a line for each damaged checkpoint that is passed over
    returns  None when there is no checkpoint yet

    Writes:  the storages of `blank`.
    Raises:  InputError when the checkpoints are of another run, or there are some and none is valid.
    """
    accepted: dict[str, tuple[Difference, ...]] = {}
    targets = pieces(blank, blueprint, ranks=ranks, shared=False)
    told: dict[str, Any] = {"rank": ranks.world.rank, "exchange": ranks.all_gather_text}

    def checked(manifest: Manifest) -> Sequence[Piece]:
        name = f"{where.folder}: the checkpoint of step {manifest.step}"
        accepted["by"] = identity.accepted(name, _entry(manifest, "identity", dict), this, accept)
        return targets

    if where.single:
        manifest = manifests.read(fs, where.folder)
        reader.load_(fs, where.folder, manifest, checked(manifest), **told)
    else:
        manifest = reader.restore_(fs, where.folder, checked, report=report, **told)
    if manifest is None:
        return None
    zero.gather_(blueprint.layouts, blank.arenas, ranks)
    state = attrs.evolve(blank, cursor=_entry(manifest, "cursor", int), step=manifest.step)
    return Restored(
        state=state,
        seen=parse(str(where.folder), _entry(manifest, "validations", dict)),
        manifest=manifest,
        origin=str(where.folder if where.single else where.folder / manifest.name()),
        accepted=accepted["by"],
    )


def meta(state: State, seen: Seen, this: Identity) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `restore` reads it."""
    train = this.config.train
    return {
        "cursor": state.cursor,
        # of the stream, and so of the learning-rate schedule
        "tokens": state.step * train.batch_size * train.sequence_length,
        "validations": dumped(seen),
        "identity": identity.values(this),
    }


def pieces(state: State, blueprint: Blueprint, *, ranks: Ranks = SINGLE_RANK, shared: bool = True) -> tuple[Piece, ...]:
    """Every tensor of a State by name: what this rank saves of it, and loads.

    shared  whether of what every rank has, such as the router bias, it is this rank's share: to save, not to load
    """
    found: list[Piece] = []
    for described, arena in zip(blueprint.layouts, state.arenas, strict=True):
        moments = dict(zip(rule(described.policy.optimizer).moments, arena.moments, strict=True))
        kinds = {"value": arena.value, **moments}
        if described.has_remainder():
            kinds["remainder"] = arena.remainder
        part = ranks.sharing(described).rank
        found += arena_pieces(
            described, kinds, blueprint.dims, rank=ranks.experts.rank, world=ranks.experts.size, part=part
        )
    everywhere = [whole(name, getattr(state, name)) for name in (ROUTER_BIAS, *COUNTERS)]
    world = ranks.world
    return (*found, *(share(each, world.rank, world.size) if shared else each for each in everywhere))


def _entry(manifest: Manifest, name: str, kind: type) -> Any:
    """An entry of a checkpoint's meta.

    Raises:  InputError when it is not there or of another type.
    """
    value = manifest.meta.get(name)
    if not isinstance(value, kind):
        raise InputError(
            f"step {manifest.step}: the checkpoint of a training holds '{name}', got {value!r}; use one that "
            "`nmoe run` wrote"
        )
    return value


def put_(state: State, blueprint: Blueprint, start: Weights, ranks: Ranks = SINGLE_RANK) -> None:
    """Begin with these weights.

    Writes:  values, remainders and router bias of `state`.
    """
    values = dict(tree.leaves(start.params))
    for described, arena in zip(blueprint.layouts, state.arenas, strict=True):
        for slot in described.slots:
            exact = start.exact(slot.path, values[slot.path])
            if described.policy.shard:
                exact = exact.chunk(ranks.experts.size)[ranks.experts.rank]
            buffers.put_(arena, described, slot, exact, part=ranks.sharing(described).rank)
    state.router_bias.copy_(start.router_bias)
