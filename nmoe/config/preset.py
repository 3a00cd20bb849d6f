"""The configs that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "presets"
"""In a checkout a link to `configs`, in a wheel the files."""


def names() -> tuple[str, ...]:
    """Every preset."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def path_of(name: str) -> Path:
    """The file of a preset."""
    return FOLDER / f"{name}.toml"


def about(name: str) -> str:
    """What a preset is: the first line of its file's comment."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))
