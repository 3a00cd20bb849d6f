"""`nmoe ckpt`: what checkpoints hold, whether they are whole, which may go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nmoe.config import load
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader, weights, writer
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.record.names import CHECKPOINTS, WEIGHTS
from nmoe.effects.terminal import say, say_json, table
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.units import counted, quantity


@attrs.frozen(kw_only=True)
class Checkpoint:
    """One checkpoint on disk."""

    root: Path  # folder of the run's checkpoints
    entry: reader.Entry

    def folder(self) -> Path:
        """The checkpoint's own folder."""
        return self.root / self.entry.name

    def manifest(self) -> Manifest:
        """What it says of itself.

        Raises:  InputError with what is wrong with it.
        """
        if self.entry.manifest is None:
            raise InputError(*self.entry.problems)
        return self.entry.manifest


def list_checkpoints(run: Path, as_json: bool = False) -> int:
    """Print the checkpoints of a run, newest first: cheap checks alone, no tensor is read.

    returns  exit code 0
    """
    if as_json:
        say_json([_summary(checkpoint) for checkpoint in _all(run)])
        return 0
    head = ("name", "state", "step", "attempt", "val loss", "tensors", "files", "bytes")
    rows = [
        (
            entry.name,
            "damaged" if entry.problems else "whole",
            *(str(number) for number in (manifests.name_fields(entry.name) or ("-", "-"))[:2]),
            "-" if entry.manifest is None or entry.manifest.score is None else f"{entry.manifest.score:.4f}",
            "-" if entry.manifest is None else str(len(entry.manifest.tensors)),
            "-" if entry.manifest is None else str(len(entry.manifest.files)),
            "-" if entry.manifest is None else quantity(entry.manifest.num_bytes(), "B"),
        )
        for entry in (checkpoint.entry for checkpoint in _all(run))
    ]
    say(table(head, rows, left=2))
    return 0


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is cheap to know of a checkpoint, for a program."""
    entry, manifest = checkpoint.entry, checkpoint.entry.manifest
    step, attempt = (manifests.name_fields(entry.name) or (None, None))[:2]
    about = {"name": entry.name, "folder": str(checkpoint.folder()), "whole": not entry.problems, "step": step}
    more = {"attempt": attempt, "problems": list(entry.problems)}
    if manifest is not None:
        sizes = {"tensors": len(manifest.tensors), "files": len(manifest.files), "bytes": manifest.num_bytes()}
        more |= {"validation_loss": manifest.score, **sizes}
    return about | more


def verify(path: Path, everything: bool, as_json: bool = False) -> int:
    """Read a checkpoint, or all of a run, and compare every digest.

    returns  exit code 0, or 1 when something is damaged
    """
    damaged = 0
    verdicts: list[dict[str, Any]] = []
    for checkpoint in _all(path) if everything else (_one(path),):
        problems = checkpoint.entry.problems or reader.verify(Disk(), checkpoint.folder(), checkpoint.manifest())
        damaged += bool(problems)
        verdicts.append({"folder": str(checkpoint.folder()), "whole": not problems, "problems": list(problems)})
        if as_json:
            continue
        say(f"{checkpoint.folder()}  {'damaged' if problems else 'whole'}")
        for problem in problems:
            say(f"  {problem}")
    if as_json:
        say_json(verdicts)
    return 1 if damaged else 0


def show(path: Path, as_json: bool = False) -> int:
    """Print what a checkpoint is: where in the training, what it belongs to, what it holds.

    returns  exit code 0
    """
    checkpoint = _one(path)
    manifest = checkpoint.manifest()
    if as_json:
        tensors = {
            name: {"shape": x.shape, "dtype": x.dtype, "digest": x.digest} for name, x in manifest.tensors.items()
        }
        parent = manifest.parent.name if manifest.parent else None
        lineage = {"lineage": manifest.lineage, "parent": parent, "serial": manifest.serial}
        say_json({**_summary(checkpoint), **lineage, "meta": manifest.meta, "contents": tensors})
        return 0
    kinds: dict[str, list[int]] = {}
    for name, entry in manifest.tensors.items():
        count, elements = kinds.setdefault(name.rpartition("/")[2], [0, 0])
        size = 1
        for axis in entry.shape:
            size *= axis
        kinds[name.rpartition("/")[2]] = [count + 1, elements + size]
    parts = [
        ("checkpoint", str(checkpoint.folder())),
        ("step", f"{manifest.step:,}  attempt {manifest.attempt}  save {manifest.serial} of it"),
        ("lineage", f"{manifest.lineage}  after {manifest.parent.name if manifest.parent else 'nothing'}"),
        ("bytes", f"{quantity(manifest.num_bytes(), 'B')} in {counted(len(manifest.files), 'file')}"),
        *((kind, f"{count} tensors  {quantity(elements)} elements") for kind, (count, elements) in kinds.items()),
    ]
    meta = manifest.meta
    parts += [(key, str(value)) for key, value in meta.items() if not isinstance(value, Mapping)]
    parts += [(f"{key}.{name}", str(value)) for key, table in _tables(meta) for name, value in table.items()]
    width = max(len(label) for label, _ in parts)
    say("\n".join(f"{manifests.shown(label):<{width}}  {manifests.shown(text)}" for label, text in parts))
    return 0


def diff(left: Path, right: Path, as_json: bool = False) -> int:
    """Print how two checkpoints differ: what they say of themselves, and which tensors, by their digests.

    returns  exit code 0 when they hold the same, 1 when not
    """
    one, other = _one(left).manifest(), _one(right).manifest()
    lines = [f"step: {one.step} -> {other.step}"] if one.step != other.step else []
    for key, a, b in _differences(_flat(one.meta), _flat(other.meta)):
        lines.append(f"{key}: {a} -> {b}")
    tensors = _differences(one.tensors, other.tensors)
    if as_json:
        meta = {key: [a, b] for key, a, b in _differences(_flat(one.meta), _flat(other.meta))}
        say_json({"step": [one.step, other.step], "meta": meta, "tensors": [name for name, _, _ in tensors]})
        return 1 if lines or tensors else 0
    for name, a, b in tensors:
        if a is None or b is None:
            lines.append(f"{name}: only in {right if a is None else left}")
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            lines.append(f"{name}: {a.dtype} {list(a.shape)} -> {b.dtype} {list(b.shape)}")
        else:
            lines.append(f"{name}: {a.digest} -> {b.digest}")
    same = len(one.tensors.keys() | other.tensors.keys()) - len(tensors)
    say("\n".join((*lines, f"{same} tensors are the same, {len(tensors)} differ")))
    return 1 if lines else 0


def prune(run: Path, last: int, every: int, best: int) -> int:
    """Delete the checkpoints of a run that nothing keeps; the newest stays whatever is asked.

    returns  exit code 0
    Raises:  InputError when the run is being trained.
    """
    problems = [
        f"--{name}: expected at least {low}, got {value}; raise it"
        for name, value, low in (("last", last, 1), ("every", every, 0), ("best", best, 0))
        if value < low
    ]
    if problems:
        raise InputError(*problems)
    root = _all(run)[0].root
    for name in writer.prune(Disk(), root, Keep(last=last, every=every, best=best)):
        say(f"deleted {root / name}")
    return list_checkpoints(run)


def export_weights(path: Path, to: Path | None) -> int:
    """Write the weights of a checkpoint the way a run writes them at its end.

    to       folder; None: the run folder
    returns  exit code 0
    Raises:  InputError when the checkpoint is damaged, or `to` cannot be written.
    """
    checkpoint = _one(path)
    config = load(checkpoint.root.parent / "config.toml", {}, ()).config
    made, formats = (blueprint := make_blueprint(config)).specs, weights.formats(blueprint)
    read = weights.of_checkpoint(Disk(), checkpoint.folder(), checkpoint.manifest(), made, formats)
    folder = checkpoint.root.parent if to is None else to
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(folder, read.params, read.router_bias)
    except OSError as error:
        raise InputError(f"{folder}: expected to write weights, got {error.strerror}; choose another --to") from error
    say(f"{folder / WEIGHTS}  step {checkpoint.manifest().step}")
    return 0


def _all(path: Path) -> tuple[Checkpoint, ...]:
    """The checkpoints of a run, newest first.

    Raises:  InputError when there are none.
    """
    root = path / CHECKPOINTS if files.is_folder(path / CHECKPOINTS) else path
    checkpoints = tuple(Checkpoint(root=root, entry=entry) for entry in reader.entries(Disk(), root))
    if not checkpoints:
        raise InputError(
            f"{path}: expected a run with checkpoints, got none in it; name a run folder, see `nmoe runs list`"
        )
    return checkpoints


def _one(path: Path) -> Checkpoint:
    """A checkpoint, or the newest of a run."""
    folder = manifests.find(path)
    return Checkpoint(root=folder.parent, entry=reader.entry(Disk(), folder)) if folder else _all(path)[0]


def _tables(meta: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(key, value) for key, value in meta.items() if isinstance(value, Mapping)]


def _flat(meta: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in meta.items() if not isinstance(value, Mapping)}
    return flat | {f"{key}.{name}": value for key, table in _tables(meta) for name, value in table.items()}


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)]
