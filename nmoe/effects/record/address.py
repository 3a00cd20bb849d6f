"""The address of a run, one for every verb: its name under a root folder, or a path."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from nmoe.effects import files
from nmoe.effects.record.names import CONFIG
from nmoe.errors import InputError

ROOT = Path("runs")
"""Folder of run folders where nothing else is said: the default of `run.root`."""


def resolved(text: str, root: Path = ROOT) -> Path:
    """The folder of the run called `text` under `root` where there is one, else `text` as a path."""
    path = files.expanded(text)
    return root / text if _is_name(text) and files.is_folder(root / text) else path


def find(text: str, root: Path = ROOT) -> Path:
    """As `resolved`, for what has to be there.

    Raises:  InputError with the run that was probably meant.
    """
    if "\0" not in text:
        path = resolved(text, root)
        if text and (files.is_folder(path) or files.is_file(path)):
            return path
    near = difflib.get_close_matches(text, _names(root), n=1)
    listing = "nmoe runs list" if root == ROOT else f"nmoe runs list --root {root}"
    remedy = f"did you mean {near[0]}?" if near else f"see `{listing}`"
    raise InputError(f"run: expected the name of a run in {root}, or a path, got {text!r}; {remedy}")


def find_run(text: str, root: Path = ROOT) -> Path:
    """As `find`, for the folder of a run.

    Raises:  InputError also when it is something else.
    """
    path = find(text, root)
    if not files.is_file(path / CONFIG):
        raise InputError(f"{path}: expected config.toml of a run, got none; `nmoe runs list` shows the runs")
    return path


def _is_name(text: str) -> bool:
    """Whether a text can be that of a folder in another."""
    return re.fullmatch(r"[^/\\\0]+", text) is not None and text not in (".", "..")


def _names(root: Path) -> list[str]:
    """The run folders under `root`, to look for a near name; one that cannot be looked into has none."""
    try:
        return [path.name for path in root.iterdir() if (path / CONFIG).is_file()]
    except OSError:
        return []
