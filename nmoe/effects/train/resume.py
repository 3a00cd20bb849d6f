"""Resume: find the checkpoints of `train.resume`, restore a State from them, list the tensors of a State to save.

"auto" resumes in the run folder of this name, if there is one; "never" wants a new folder; the name of another run or a
path is the run or checkpoint to resume from. A path into the run's own folder takes the run back to that checkpoint.
Another path is where a new folder starts; once that has a checkpoint of its own, it resumes from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from nmoe.config import Difference
from nmoe.effects import files
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.checkpoint.manifest import DTYPES, Manifest, find, read
from nmoe.effects.checkpoint.weights import Weights
from nmoe.effects.device import buffers
from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks
from nmoe.effects.record import address
from nmoe.effects.record.names import CHECKPOINTS
from nmoe.effects.train import zero
from nmoe.effects.train.identity import Identity, accepted, values
from nmoe.effects.train.step import State
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import Piece, arena_pieces, share, whole
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.optim.update import rule
from nmoe.pure.watch.validations import Validations, dumped, parse

ROUTER_BIAS = "router_bias"
COUNTERS = ("updates", "skipped", "skipped_in_row")
"""Fields of a State that are 0-d tensors."""

SPIKES = ("recent", "spikes")
"""Fields of a State that a checkpoint may lack: it is from before `train.skip_spikes` was set, or was known. None are
seen then. Those that the run does not have are read and dropped."""

TOKENS = "tokens_by_rank"
"""Entry of a checkpoint's meta: tokens read by every rank that ever took part."""


@attrs.frozen(kw_only=True)
class Origin:
    """The checkpoints an attempt resumes from."""

    folder: Path  # of checkpoints, or one checkpoint
    single: bool  # whether it is one checkpoint


@attrs.frozen(kw_only=True)
class Restored:
    """A checkpoint that was loaded."""

    state: State
    tokens_by_rank: tuple[int, ...]  # read until then, by every rank that ever took part
    validations: Validations
    manifest: Manifest
    checkpoint: Path
    accepted: tuple[Difference, ...]  # keys of the identity that differ from the checkpoint's
    damaged: Sequence[str]  # newer checkpoints that were passed over, and why


def origin(resume: str, run_folder: Path) -> Origin | None:
    """Find the checkpoints an attempt in `run_folder` resumes from; None: it starts at step 0.

    Raises:  InputError when `run_folder` is not a run's, exists with "never", or a path holds no run and no checkpoint.
    """
    own = run_folder / CHECKPOINTS
    exists = files.is_folder(run_folder) or files.is_file(run_folder)
    if exists and not files.is_file(run_folder / "config.toml"):
        raise InputError(
            f"run.name: expected a new name, or that of a run, got {run_folder}, which exists and holds no "
            "config.toml; choose another name"
        )
    if resume == "never":
        if exists:
            raise InputError(
                f'run.name: expected a new run folder with train.resume = "never", got {run_folder}, which exists; '
                'choose another name, or train.resume = "auto" to resume'
            )
        return None
    if resume == "auto":
        return Origin(folder=own, single=False) if exists else None
    named = _named(address.resolved(resume, run_folder.parent))
    is_own = run_folder.resolve() in named.folder.resolve().parents
    if not is_own and reader.has_any(Disk(), own):
        return Origin(folder=own, single=False)
    return named


def _named(path: Path) -> Origin:
    """The checkpoints at a path a user wrote: a run folder, its folder of checkpoints, or one of these."""
    if folder := find(path):
        return Origin(folder=folder, single=True)
    for folder in (path / CHECKPOINTS, path):
        if reader.has_any(Disk(), folder):
            return Origin(folder=folder, single=False)
    raise InputError(f"train.resume: expected a run folder or a checkpoint, got {path}, which holds none; fix the path")


def restore(
    fs: Fs, origin: Origin, blank: State, blueprint: Blueprint, identity: Identity, accept: Sequence[str], ranks: Ranks
) -> Restored | None:
    """Load the newest valid checkpoint, or the one named.

    blank    a State of zeros, which is filled
    accept   keys of the identity that may differ from the checkpoint's
    returns  None when there is no checkpoint yet

    Writes:  the storages of `blank`.
    Raises:  InputError when the checkpoints are of another run, or there are some and none is valid.
    """
    damaged: list[str] = []
    differences: tuple[Difference, ...] = ()
    targets = pieces(blank, blueprint, ranks=ranks, shared=False)
    place: dict[str, Any] = {"rank": ranks.world.rank, "all_gather_text": ranks.all_gather_text}

    def checked(manifest: Manifest) -> Sequence[Piece]:
        nonlocal differences
        name = f"{origin.folder}: the checkpoint of step {manifest.step}"
        differences = accepted(name, _entry(manifest, "identity", dict), identity, accept)
        names, there = {piece.name for piece in targets}, manifest.tensors
        dropped = [
            whole(name, torch.empty(there[name].shape, dtype=DTYPES[there[name].dtype]))
            for name in SPIKES
            if name in there and name not in names
        ]
        return [*(piece for piece in targets if piece.name in there or piece.name not in SPIKES), *dropped]

    if origin.single:
        manifest = read(fs, origin.folder)
        reader.load_(fs, origin.folder, manifest, checked(manifest), **place)
    else:
        manifest = reader.restore_(fs, origin.folder, checked, report=damaged.append, **place)
    if manifest is None:
        return None
    zero.gather_(blueprint.layouts, blank.arenas, blank.params, ranks)
    counts = _tokens_by_rank(manifest)
    return Restored(
        state=attrs.evolve(blank, cursor=_entry(manifest, "cursor", int), tokens=sum(counts), step=manifest.step),
        tokens_by_rank=counts,
        validations=parse(str(origin.folder), _entry(manifest, "validations", dict)),
        manifest=manifest,
        checkpoint=origin.folder if origin.single else origin.folder / manifest.name(),
        accepted=differences,
        damaged=damaged,
    )


def meta(state: State, tokens_by_rank: Sequence[int], validations: Validations, identity: Identity) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `restore` reads it."""
    return {
        "cursor": state.cursor,
        # counted: batch size, sequence length and ranks may be others after a resume
        TOKENS: list(tokens_by_rank),
        "validations": dumped(validations),
        "identity": values(identity),
    }


def count_tokens(earlier: Sequence[int], tokens: int, world: int) -> tuple[int, ...]:
    """Tokens read by every rank that ever took part; the ranks of one attempt read equally many.

    earlier  the same when the attempt began
    tokens   read by all ranks so far
    """
    share = (tokens - sum(earlier)) // world
    counts = (*earlier, *[0] * (world - len(earlier)))
    return tuple(count + share if rank < world else count for rank, count in enumerate(counts))


def pieces(state: State, blueprint: Blueprint, *, ranks: Ranks = SINGLE_RANK, shared: bool = True) -> tuple[Piece, ...]:
    """List the tensors of a State by name, with the part of each that this rank saves or loads.

    shared  whether what every rank has, such as the router bias, is split among the ranks: to save, not to load
    """
    sharded: list[Piece] = []
    for layout, arena in zip(blueprint.layouts, state.arenas, strict=True):
        moments = dict(zip(rule(layout.policy.optimizer).moments, arena.moments, strict=True))
        kinds = {"value": arena.value, **moments}
        if layout.has_remainder():
            kinds["remainder"] = arena.remainder
        part = ranks.sharing(layout).part()
        sharded += arena_pieces(
            layout, kinds, blueprint.dims, rank=ranks.experts.rank, world=ranks.experts.size, part=part
        )
    world = ranks.world
    fields = [(name, getattr(state, name)) for name in (ROUTER_BIAS, *SPIKES, *COUNTERS)]
    replicated = [whole(name, tensor) for name, tensor in fields if isinstance(tensor, torch.Tensor)]
    return (*sharded, *(share(piece, world.rank, world.size) if shared else piece for piece in replicated))


def _entry(manifest: Manifest, name: str, kind: type) -> Any:
    """Read an entry of a checkpoint's meta.

    Raises:  InputError when it is absent or of another type.
    """
    value = manifest.meta.get(name)
    if not isinstance(value, kind):
        raise InputError(
            f"step {manifest.step}: expected '{name}' in the checkpoint of a training, got {value!r}; use one that "
            "`nmoe run` wrote"
        )
    return value


def _tokens_by_rank(manifest: Manifest) -> tuple[int, ...]:
    """The tokens that each rank had read.

    Raises:  InputError when a checkpoint does not say so: a count that is computed from the config is wrong as soon as
             batch size or sequence length have changed, and the learning rate with it.
    """
    counts = manifest.meta.get(TOKENS)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise InputError(
            f"step {manifest.step}: expected '{TOKENS}' in the checkpoint of a training, got {counts!r}; it is of an "
            "older nmoe, which did not count tokens: finish the run with that, or start a new one from its weights "
            "with train.warm_start"
        )
    return tuple(counts)


def put_(state: State, blueprint: Blueprint, start: Weights, ranks: Ranks = SINGLE_RANK) -> None:
    """Copy weights into a State.

    Writes:  values, remainders and router bias of `state`.
    """
    values = dict(tree.leaves(start.params))
    for layout, arena in zip(blueprint.layouts, state.arenas, strict=True):
        for slot in layout.slots:
            exact = start.exact(slot.path, values[slot.path])
            if layout.policy.shard:
                exact = exact.chunk(ranks.experts.size)[ranks.experts.rank]
            buffers.put_(arena, layout, slot, exact, part=ranks.sharing(layout).part())
    state.router_bias.copy_(start.router_bias)
