"""A further attempt at a run in the folder of the ones before: its number, and the folder made ready for it.

The files a run appends to have each step once. What a killed attempt wrote after the step the next one begins at is
therefore cut off, and so is a last line it did not finish. Events are history and stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nmoe.effects import files
from nmoe.effects.record.lines import read
from nmoe.effects.record.names import ATTEMPTS, OF_STEPS, WEIGHTS
from nmoe.errors import InputError

VALIDATION, EVALUATION = "validation/", "evaluation/"
"""First part of the fields of a line of metrics that reports a validation, or an evaluation, which comes after it."""


def fix(folder: Path, step: int, *, validated: bool = True, evaluated: bool = True) -> None:
    """Make the files a run appends to those of a run that stands at `step`.

    Everything is read before anything is cut, so that a line that cannot be read leaves the folder as it was.

    validated  whether the run knows of a validation at `step`: if not, it validates and reports it again
    evaluated  the same of an evaluation

    Writes:  every `*.jsonl` in `folder`: without a torn last line, and of what belongs to steps without later ones.
    Raises:  InputError with file and line of what cannot be read.
    """
    unknown = tuple(prefix for prefix, known in ((VALIDATION, validated), (EVALUATION, evaluated)) if not known)
    lengths = {path: _good_length(path, step, unknown) for path in sorted(folder.iterdir()) if path.suffix == ".jsonl"}
    for path, length in lengths.items():
        if length < path.stat().st_size:
            os.truncate(path, length)


def record(folder: Path, attempt: int, contents: Mapping[str, str]) -> None:
    """Put what this attempt was started with in the place of what the one before was, which moves to the archive.

    contents  text of each file by name

    Writes:   files of `folder` and `folder/attempts`, each whole or not at all. Weights move as well: they are those
              of an earlier step, and nobody is to take them for this attempt's.
    """
    archive = folder / ATTEMPTS / str(attempt - 1)
    archive.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        # What is there already was put there by a start that ended before its first event, under the same number.
        if (folder / name).exists() and not (archive / name).exists():
            with files.replacing(archive / name) as temporary:
                shutil.copyfile(folder / name, temporary)
        files.write_text(folder / name, text)
    if (folder / WEIGHTS).exists():
        os.replace(folder / WEIGHTS, archive / WEIGHTS)


def _good_length(path: Path, step: int, unknown: tuple[str, ...]) -> int:
    """Bytes of a file up to its first line of a later step, or one of `step` with fields of these first parts, or else
    of its whole lines."""
    length = 0
    for line in read(path):
        if path.name.startswith(OF_STEPS):
            at = line.fields.get("step")
            if not isinstance(at, int):
                raise InputError(f"{line.where}: expected a number as step, got {at!r}; fix or delete the line")
            if at > step or (at == step and any(name.startswith(unknown) for name in line.fields)):
                break
        length = line.end
    return length
