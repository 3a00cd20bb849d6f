"""The file of a run's scores: the newest of each task."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects import files
from nmoe.effects.record.names import EVALS
from nmoe.errors import InputError
from nmoe.pure.evals.score import Score
from nmoe.pure.units import plain


def read(folder: Path) -> dict[str, Any]:
    """What the file of scores holds; nothing where there is none. Raises: InputError when it is damaged."""
    path = folder / EVALS
    if not files.is_file(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, got {error}; delete the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; delete the file")
    return content


def keep(folder: Path, scores: Mapping[str, Score], step: int | None = None) -> dict[str, Any]:
    """Put scores in the place of earlier ones of the same tasks; those of other tasks stay.

    step     of the training, at which they were measured; None: of the weights that a run or an import left
    returns  what the file has of these scores
    Writes:  `folder`/evals.json
    Raises:  InputError when what is there is damaged, or it cannot be written.
    """
    earlier = read(folder)
    about = {
        "step": step,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    kept = {name: {**plain(attrs.asdict(score)), **about} for name, score in scores.items()}
    with files.refusing(folder / EVALS, "to write the scores"):
        files.write_text(folder / EVALS, json.dumps(earlier | kept, indent=2) + "\n")
    return kept
