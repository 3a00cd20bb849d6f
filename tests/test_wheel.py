"""The wheel, built as pip builds it: the dashboard's page is in, and nothing that is no part of nmoe."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def test_the_wheel_has_every_file_of_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "nmoe", source / "nmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        packed = {name: wheel.read(name) for name in wheel.namelist()}
    static = Path("nmoe/effects/runs/viz/static")
    page = {str(path.relative_to(ROOT)): path for path in (ROOT / static).rglob("*") if path.is_file()}
    assert len(page) > 20
    assert {name for name in packed if name.startswith(str(static))} == set(page)
    assert all(packed[name] == path.read_bytes() for name, path in page.items())
    assert {name.split("/")[0] for name in packed if ".dist-info/" not in name} == {"nmoe"}
