"""The documents say what is: their programs run, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_compose_runs_in_under_thirty_lines() -> None:
    (program,) = blocks("docs/compose.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) < 30
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"loss (\S+), load \[\[(.*)\]\], router gradient (\S+)\n", done.stdout)
    assert found is not None, done.stdout
    assert sum(map(int, found[2].split(","))) == 36 * 2, "each of the 36 tokens chose two experts"
    assert 4 < float(found[1]) < 8 and float(found[3]) > 0


def links(page: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in target]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/extend.md"])
def test_named_files_exist(page: str) -> None:
    """Every `nmoe/...`, `configs/...`, `docs/...` path in backticks is there."""
    named = re.findall(r"`((?:nmoe|configs|docs|tests)/[\w./-]+)`", (ROOT / page).read_text())
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
