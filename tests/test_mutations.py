"""Each guard, taken away, is missed: the lists in tests/mutations, replayed on a copy of the package."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUARDS: list[dict[str, str]] = [
    guard
    for path in sorted((ROOT / "tests" / "mutations").glob("*.toml"))
    for guard in tomllib.loads(path.read_text())["guard"]
]
PATIENCE_S = 300


def test_the_list_speaks_of_the_code_as_it_is() -> None:
    """Each line that is taken away is there, once; each test file too; and no guard is listed twice."""
    assert len({guard["what"] for guard in GUARDS}) == len(GUARDS) >= 40
    for guard in GUARDS:
        assert set(guard) == {"what", "file", "old", "new", "test"}, guard
        assert (ROOT / guard["file"]).read_text().count(guard["old"]) == 1, guard["what"]
        assert (ROOT / shlex.split(guard["test"])[0]).is_file(), guard["what"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests need of the repository, to be changed."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("nmoe", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard["what"])
def test_a_guard_that_is_taken_away_is_missed(copy: Path, guard: dict[str, str]) -> None:
    path = copy / guard["file"]
    whole = path.read_text()
    path.write_text(whole.replace(guard["old"], guard["new"]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(guard["test"])],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        path.write_text(whole)
    # 1 is a test that failed, less than 0 one that a signal killed; 2 and more are a file that could not be read, or a
    # name that matches no test.
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-2000:]
