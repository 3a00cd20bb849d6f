"""The configs that come with the package, by name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from nmoe.errors import InputError

FOLDER = Path(__file__).parent / "presets"
"""In a checkout a link to `configs`, in a wheel the files."""


def names() -> tuple[str, ...]:
    """Every preset."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def path_of(name: str) -> Path:
    """The file of a preset."""
    return FOLDER / f"{name}.toml"


def resolve(said: str) -> Path:
    """The file that a person means: what a preset is called, and any plain word, is a name; all else is a path.

    Raises:  InputError when no preset has the name.
    """
    known = names()
    if said in known:
        return path_of(said)
    if not re.fullmatch(r"[\w-]+", said):
        return Path(said)
    near = difflib.get_close_matches(said, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"a file of that name is ./{said}"
    raise InputError(f"expected a TOML file or a preset, one of {', '.join(known)}, got {said!r}; {remedy}")


def about(name: str) -> str:
    """What a preset is: the first line of its file's comment."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))
