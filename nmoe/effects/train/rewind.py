"""`nmoe run --rewind`: back to an earlier checkpoint, and on without the sequences that were read after it.

`left_out.json` in the run folder has a record of each rewind. Positions of the stream that a record leaves out are read
by no later attempt; a cursor counts the others. Until an attempt has saved a checkpoint of its own, the one that was
gone back to is where the run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import cattrs

from nmoe.config.toml import read as read_toml
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.record.lines import read as read_lines
from nmoe.effects.record.names import CHECKPOINTS, CONFIG, EVENTS, LEFT_OUT, METRICS
from nmoe.effects.train.resume import Origin
from nmoe.errors import InputError
from nmoe.pure.data.order import kept


@attrs.frozen(kw_only=True)
class Rewind:
    """One return to an earlier checkpoint."""

    checkpoint: str  # its name
    step: int  # of it
    reached: int  # step the run had come to
    attempts: int  # there had been so many
    sequences: tuple[tuple[int, int], ...]  # first and end of each stretch of the stream that is left out


def read(folder: Path) -> tuple[Rewind, ...]:
    """The rewinds of a run, oldest first; none where there is no record.

    Raises:  InputError when the record is damaged.
    """
    path = folder / LEFT_OUT
    if not files.is_file(path):
        return ()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        rewinds = cattrs.Converter(forbid_extra_keys=True).structure(fields, tuple[Rewind, ...])
        if any(not 0 <= begin < end for rewind in rewinds for begin, end in rewind.sequences):
            raise ValueError("a stretch that ends before it begins")
    except (OSError, TypeError, ValueError, cattrs.BaseValidationError) as error:
        text = manifests.shown(str(error).partition("\n")[0])
        raise InputError(f"{path}: expected a list of rewinds, got {text}; restore it from a copy") from error
    return rewinds


def left_out(rewinds: Sequence[Rewind]) -> tuple[tuple[int, int], ...]:
    """Stretches of the stream that nobody reads any more, in order."""
    return tuple(sorted(stretch for rewind in rewinds for stretch in rewind.sequences))


def pending(fs: Fs, folder: Path, rewinds: Sequence[Rewind]) -> Origin | None:
    """The checkpoint gone back to, as long as no later attempt has saved one; None: there is no such."""
    if not rewinds:
        return None
    last, found = rewinds[-1], reader.entries(fs, folder / CHECKPOINTS)
    names = {entry.name for entry in found}
    if last.checkpoint not in names or any(_attempt(name) > last.attempts for name in names):
        return None
    return Origin(folder=folder / CHECKPOINTS / last.checkpoint, single=True)


def go_back(folder: Path, most: int) -> Rewind:
    """Record the return to the newest checkpoint of at most `most` steps, and of less than the run has come to.

    What is left out was read between it and the last step that the metrics or a checkpoint know of, in batches of
    whatever size that was.

    Writes:  the record in the run folder.
    Raises:  InputError when there is no such checkpoint.
    """
    root, rewinds = folder / CHECKPOINTS, read(folder)
    entries = reader.entries(Disk(), root)
    saved = _of_run([entry.manifest for entry in entries if entry.manifest and not entry.problems], folder)
    steps = [line.fields.get("step") for line in read_lines(folder / METRICS)]
    reached = max([0, *(manifest.step for manifest in saved), *(step for step in steps if isinstance(step, int))])
    below = min(most, reached - 1)
    earlier = [manifest for manifest in saved if manifest.step <= below]
    if not earlier:
        raise InputError(
            f"--rewind: expected a checkpoint of at most {max(below, 0)} steps in {root}, got none; name the run with "
            "--run.name, and keep more of them with checkpoint.keep_last or keep_every"
        )
    chosen, last = max(earlier, key=_age), max(saved, key=_age)
    cursor = _cursor(root, chosen)
    num = _cursor(root, last) - cursor
    if reached > last.step:  # by steps of the last attempt, which no checkpoint has seen
        num += (reached - last.step) * _batch_size(folder / CONFIG)
    sequences = kept(cursor, num, left_out(rewinds))
    rewind = Rewind(
        checkpoint=chosen.name(),
        step=chosen.step,
        reached=reached,
        attempts=max(_attempt(entry.name) for entry in entries),
        sequences=tuple((first, first + num) for first, num in sequences),
    )
    with files.refusing(folder, "a run folder one may write"):
        files.write_text(folder / LEFT_OUT, dumped((*rewinds, rewind)))
    return rewind


@contextmanager
def unless_refused(folder: Path) -> Iterator[None]:
    """Put the record back as it was where the block raises an InputError: a command that is refused changes nothing.

    A process that dies in the block leaves it, and with it what the user has asked for.

    Writes:  the record in the run folder.
    """
    path = folder / LEFT_OUT
    before = path.read_text(encoding="utf-8") if files.is_file(path) else None
    try:
        yield
    except InputError:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            files.write_text(path, before)
        raise


def _age(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.step, manifest.attempt, manifest.serial


def _cursor(root: Path, manifest: Manifest) -> int:
    """Sequences that were read up to a checkpoint."""
    cursor = manifest.meta.get("cursor")
    if not isinstance(cursor, int):
        raise InputError(f"{root / manifest.name()}: expected a cursor, got {cursor!r}; use one that `nmoe run` wrote")
    return cursor


def _batch_size(path: Path) -> int:
    """Sequences a step of the attempt whose config this is."""
    size = read_toml(path).tables.get("train", {}).get("batch_size")
    if not isinstance(size, int):
        raise InputError(f"{path}: expected train.batch_size, got {size!r}; restore it from a copy")
    return size


def _of_run(saved: Sequence[Manifest], folder: Path) -> list[Manifest]:
    """Checkpoints on the way to where the run is: what lies behind a step that a later attempt resumed at is not."""
    events = [line.fields for line in read_lines(folder / EVENTS) if line.fields.get("event") == "resume"]
    resumes = [
        (attempt, step)
        for attempt, step in ((event.get("attempt"), event.get("step")) for event in events)
        if isinstance(attempt, int) and isinstance(step, int)
    ]
    return [
        manifest
        for manifest in saved
        if all(step >= manifest.step for attempt, step in resumes if attempt > manifest.attempt)
    ]


def dumped(rewinds: Sequence[Rewind]) -> str:
    """Text of the record."""
    return json.dumps(cattrs.unstructure(tuple(rewinds)), indent=1) + "\n"


def run_folder(origin: Origin) -> Path:
    """The folder of the run whose checkpoints these are."""
    return origin.folder.parent.parent if origin.single else origin.folder.parent


def _attempt(name: str) -> int:
    fields = manifests.name_fields(name)
    return 0 if fields is None else fields[1]
