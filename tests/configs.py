"""Reading configs in tests: what loading says is wrong, and where it says so."""

from __future__ import annotations

import re
from pathlib import Path

from nmoe.config import load, load_valid
from nmoe.errors import InputError

ROOT = Path(__file__).parent.parent


def problems(path: Path, *overrides: str, environ: dict[str, str] | None = None, valid: bool = False) -> list[str]:
    """What loading says is wrong; nothing when it succeeds."""
    try:
        (load_valid if valid else load)(path, environ or {}, overrides)
    except InputError as error:
        return list(error.problems)
    return []


def at_line(problem: str, path: Path) -> str:
    """The line of `path` that a problem points to."""
    match = re.match(rf"{re.escape(str(path))}:(\d+): ", problem)
    assert match is not None, problem
    return path.read_text().splitlines()[int(match[1]) - 1]
