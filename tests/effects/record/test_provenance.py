"""What a run is computed with, against what git and the packages say themselves."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest
import tomli
import torch

from nmoe.effects.record import provenance

ROOT = Path(__file__).parents[3]


def git(folder: Path, *arguments: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *named, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Three files in one commit."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    for name in ("a.py", "b.py", "c.py"):
        (folder / name).write_text(f"{name} = 1\n" * 9)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    code = provenance.code(checkout)
    assert code.commit == git(checkout, "rev-parse", "HEAD").strip() and len(code.commit) == 40
    assert code.facts() == {"commit": code.commit, "dirty": False, "changed_files": []} and code.diff == ""


def test_every_changed_file_is_named_in_full(checkout: Path) -> None:
    """The first line of `git status` begins with a blank when a file is changed and not staged."""
    (checkout / "a.py").write_text("a = 2\n")
    git(checkout, "mv", "b.py", "d \u03bb.py")
    (checkout / "new\nline").write_text("x")
    code = provenance.code(checkout)
    assert code.facts()["dirty"] and code.changed == ("a.py", "d \u03bb.py", "new\nline")
    assert "+a = 2" in code.diff and "rename to" in code.diff
    (checkout / "c.py").unlink()
    assert "c.py" in provenance.code(checkout).changed


def test_a_long_diff_is_cut_and_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DIFF_BYTES", 100)
    (checkout / "a.py").write_text("\u03bb" * 1000)
    text, _, end = provenance.code(checkout).diff.partition("\n[")
    assert text.startswith("diff --git a/a.py") and len(text.encode()) < 110
    assert end.startswith("the first 100 bytes of ")


def test_the_environment_of_a_hook_names_no_other_repository(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = provenance.code(checkout)
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert provenance.code(checkout) == before


def test_what_is_not_known_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.code(tmp_path).commit == "unknown: not a git checkout"
    git(tmp_path, "init", "-q")
    assert provenance.code(tmp_path).commit.startswith("unknown: fatal: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.code(tmp_path).commit == "unknown: git is not installed"


def test_the_record_has_this_commit_and_every_package() -> None:
    told = tomli.loads(provenance.describe(torch.device("cpu"), ("nmoe", "run", "a b.toml"), config="x"))
    assert told["command"] == "nmoe run 'a b.toml'" and told["config"] == "x"
    assert told["code"]["commit"] == git(ROOT, "rev-parse", "HEAD").strip()
    changed = git(ROOT, "status", "--porcelain").splitlines()
    assert told["code"]["dirty"] == bool(changed) and len(told["code"]["changed_files"]) == len(changed)
    assert all((ROOT / name).exists() for name in told["code"]["changed_files"] if f" D {name}" not in changed)
    for package in ("torch", "rich", "psutil", "tomli-w", "hypothesis"):
        assert told["versions"][package] == importlib.metadata.version(package)
    assert f"{told['code']['commit']}" in provenance.versions()["nmoe's version"]
