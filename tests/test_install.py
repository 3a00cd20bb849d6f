"""Installation: pins that resolve on an ordinary machine, and a wheel that carries every file nmoe reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

LOADS = """
import json, sys
from pathlib import Path
import nmoe
from nmoe.config import json_schema
from nmoe.effects.kernels import tables
from nmoe.effects.runs.viz import server

root = Path(nmoe.__file__).parent
tables.load((9, 0)), tables.load((10, 0))
page = [path for path in server.STATIC.rglob("*") if path.is_file()]
print(json.dumps({"root": str(root), "page": len(page)}))
"""


def pins(file: str) -> dict[str, str]:
    """Version of each package in a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def requirements_of(package: str, version: str) -> list[Requirement]:
    """What the package index says a release requires on this machine; asks the index alone, no local wheels."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--report", "-", f"{package}=={version}"],
        env={**environment, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"no package index answers for {package} {version}: {' '.join(reason)}")
    metadata = json.loads(done.stdout)["install"][0]["metadata"]
    return [Requirement(text) for text in metadata["requires_dist"]]


def test_pins_are_what_torch_requires() -> None:
    known = pins("constraints.txt")
    linux = {"platform_system": "Linux", "sys_platform": "linux", "extra": ""}
    required = [
        requirement
        for requirement in requirements_of("torch", known["torch"])
        if requirement.marker is None or requirement.marker.evaluate(linux)
    ]
    assert any(requirement.name == "triton" for requirement in required)
    wrong = [str(x) for x in required if x.name in known and not x.specifier.contains(known[x.name])]
    assert wrong == []


def test_both_pairs_satisfy_the_package() -> None:
    declared = re.findall(r'"((?:torch|triton)>=[^;"]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in map(Requirement, declared):
        for file in ("constraints.txt", "constraints-gpu.txt"):
            assert requirement.specifier.contains(pins(file)[requirement.name]), f"{requirement} in {file}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it, from a copy: a build leaves a folder in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "nmoe", source / "nmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        packed = {name: file.read(name) for name in file.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "nmoe"], cwd=ROOT, capture_output=True, text=True, check=True)
    link = "nmoe/config/presets"
    presets = [f"{link}/{path.name}" for path in (ROOT / "configs").iterdir() if path.is_file()]
    names = [*(name for name in tracked.stdout.splitlines() if name != link), *presets]
    assert len(names) > 200 and f"{link}/quickstart.toml" in names
    assert sorted(packed) == sorted(names)
    assert all(packed[name] == (ROOT / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, outside the repository."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--target", str(folder), str(wheel)], check=True)
    return folder


def python(site: Path, folder: Path, *arguments: str) -> str:
    """What Python prints in a folder, with the installed wheel.

    The dependencies are those of this environment, without what makes its editable nmoe importable: a folder on
    PYTHONPATH is searched, its .pth files are not read.
    """
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(site), sysconfig.get_paths()["purelib"]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_wheel_loads_every_file(site: Path, tmp_path: Path) -> None:
    answer = json.loads(python(site, tmp_path, "-c", LOADS))
    assert answer["root"] == str(site / "nmoe") and answer["page"] > 20


def test_an_installed_wheel_knows_presets_by_name(site: Path, tmp_path: Path) -> None:
    listed = [line.split()[0] for line in python(site, tmp_path, "-m", "nmoe", "config", "list").splitlines()[1:]]
    assert listed == sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    checked = python(site, tmp_path, "-m", "nmoe", "config", "check", "quickstart")
    assert checked.startswith(f"{site}/nmoe/config/presets/quickstart.toml: valid for 1 rank(s)")
    assert "2.65 M" in python(site, tmp_path, "-m", "nmoe", "plan", "quickstart")
    assert list(tmp_path.iterdir()) == []


def test_the_tests_of_the_gpu_refuse_other_versions() -> None:
    command = ["make", "--no-print-directory", "gpu-test", f"GPU_PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    here, wanted = pins("constraints.txt")["torch"], pins("constraints-gpu.txt")["torch"]
    assert done.returncode != 0
    assert f"expected torch=={wanted}, got {here}; install constraints-gpu.txt" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("ci", "counted", "code"), [({}, "1 skipped", 0), ({"CI": "true"}, "1 error", 1)], ids=["user", "CI"]
)
def test_without_a_browser_the_page_counts_as_not_tested(ci: dict[str, str], counted: str, code: int) -> None:
    page = "tests/effects/runs/test_viz_page.py::test_the_table_shows_what_the_files_say"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", page],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "CI"} | ci | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, counted in done.stdout.splitlines()[-1]) == (code, True), done.stdout
    assert "did NOT run: no Chromium is installed; apt-get install chromium" in done.stdout
