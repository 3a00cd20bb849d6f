"""docs/extend.md on the next kind of attention: the files that it names are those that each kind has needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nmoe.pure.model.attention import KINDS
from tests.configs import ROOT

KIND_NAMES = [section.__name__ for section in KINDS]
OWN = ("nmoe/pure/model/attention", "nmoe/effects/kernels/attention")
"""Folders in which every file but `__init__.py` is that of some kind."""


def table() -> dict[str, str]:
    """File and who edits it, of the table in docs/extend.md."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    section = text[text.index("## A kind of attention") : text.index("## A config key")]
    return dict(re.findall(r"^\| `(nmoe/[^`]+)` \| ([a-z ]+) \|", section, re.MULTILINE))


def edited(name: str) -> set[str]:
    """Files of the package that name a kind and are no kind's own."""
    pattern = re.compile(rf"(?<![A-Za-z])(?:{name}|{name.lower()})(?![a-z])")
    files = [path for suffix in ("py", "toml") for path in (ROOT / "nmoe").rglob(f"*.{suffix}")]
    shared = (path for path in files if not own(path) and pattern.search(path.read_text(encoding="utf-8")))
    return {str(path.relative_to(ROOT)) for path in shared if "presets" not in path.parts}


def own(path: Path) -> bool:
    """Whether a file is that of a kind."""
    folder = str(path.parent.relative_to(ROOT))
    by_name = folder == "nmoe/bench/kernels" and path.stem.capitalize() in KIND_NAMES
    return by_name or (folder in OWN and path.stem != "__init__")


# The first kind is older than the contract: its name is in shared code that later kinds did not need.
@pytest.mark.parametrize("name", KIND_NAMES[1:])
def test_a_kind_edits_the_files_of_the_table(name: str) -> None:
    rows, files = table(), edited(name)
    assert files <= set(rows)
    assert {file for file, by in rows.items() if by != "some"} <= files


def test_no_file_of_the_table_is_one_that_no_kind_needed() -> None:
    assert set(table()) == set().union(*(edited(name) for name in KIND_NAMES[1:]))


def test_the_counts_are_those_of_the_table() -> None:
    by = list(table().values())
    assert (by.count("every kind"), by.count("every kind") + by.count("kernels")) == (4, 8)
    assert "a kind edits four files of the package" in (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
