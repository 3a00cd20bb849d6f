"""Installation: pins that resolve on an ordinary machine, and a wheel that carries every file nmoe reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nmoe.errors import pip_install

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

LOADS = """
import json, sys
from importlib.metadata import distribution
from pathlib import Path
import nmoe
from nmoe.config import load
from nmoe.config.json_schema import schema
from nmoe.effects.kernels import tables
from nmoe.effects.runs.viz import server

root = Path(nmoe.__file__).parent
devices = sorted(root.glob("effects/kernels/sm_*.toml"))
for path in devices:
    capability = path.stem.removeprefix("sm_")
    tables.load((int(capability[:-1]), int(capability[-1])))
presets = sorted((root / "config" / "presets").glob("*.toml"))
for path in presets:
    load(path, {}, ())
assert json.loads((root / "config" / "presets" / "nmoe.schema.json").read_text()) == schema()
page = [path for path in server.STATIC.rglob("*") if path.is_file() and path.read_bytes()]
print(json.dumps({
    "root": str(root),
    "distribution": str(distribution("nmoe").locate_file("nmoe")),
    "path": sys.path,
    "editable": [name for name in sys.modules if name.startswith("__editable__")],
    "presets": [path.name for path in presets],
    "devices": [path.name for path in devices],
    "page": len(page),
}))
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


def test_the_command_that_installs_an_extra_works_from_any_shell(tmp_path: Path) -> None:
    """Typed in another folder, without the environment being active: the pip of the shell would not know nmoe."""
    command = shlex.split(pip_install("viz"))
    typed = [*command, "--dry-run", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(typed, cwd=tmp_path, env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment outside the repository, with nothing in it but the wheel.

    The dependencies are those of this environment, by a path file. What makes this environment's own nmoe importable is
    a path file too; those of a folder that a path file names are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), *install], check=True)
    (packages(folder) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def ran(environment: Path, folder: Path, *command: str) -> str:
    """What a command of the environment prints in a folder, whatever this process has on its path."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=folder,
        env={**variables, "VIRTUAL_ENV": str(environment)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_wheel_loads_every_file(environment: Path, tmp_path: Path) -> None:
    answer = json.loads(ran(environment, tmp_path, "python", "-c", LOADS))
    assert answer["root"] == answer["distribution"] == str(packages(environment) / "nmoe")
    assert answer["editable"] == [] and str(ROOT) not in answer["path"]
    assert answer["page"] > 20 and answer["presets"] == sorted(path.name for path in (ROOT / "configs").glob("*.toml"))
    assert answer["devices"] == ["sm_100.toml", "sm_90.toml"]


def test_an_installed_wheel_knows_presets_by_name(environment: Path, tmp_path: Path) -> None:
    listed = [line.split()[0] for line in ran(environment, tmp_path, "nmoe", "config", "list").splitlines()[1:]]
    assert listed == sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    checked = ran(environment, tmp_path, "nmoe", "config", "check", "quickstart")
    assert checked.startswith(
        f"{packages(environment)}/nmoe/config/presets/quickstart.toml: valid for 1 rank, fingerprint "
    )
    assert "2.65 M" in ran(environment, tmp_path, "nmoe", "plan", "quickstart")
    assert list(tmp_path.iterdir()) == []


def test_an_installed_wheel_trains(environment: Path, tmp_path: Path, sources: Path) -> None:
    """The first command of the README, for three steps, on text that is prepared already."""
    data = ("--data.source.kind=shards", f"--data.source.path={sources}", "--model.vocab_size=304")
    sizes = ("--train.steps=3", "--train.batch_size=2", "--train.microbatch_size=2", "--validation.tokens=128")
    ran(environment, tmp_path, "nmoe", "run", "quickstart", *data, *sizes, "--run.name=first")
    (row,) = [line for line in ran(environment, tmp_path, "nmoe", "runs", "list").splitlines() if "first" in line]
    assert "3/3" in row and "finished" in row
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    record = tomllib.loads((tmp_path / "runs" / "first" / "provenance.toml").read_text(encoding="utf-8"))
    assert (record["versions"]["nmoe"], record["code"]["commit"]) == (version, "unknown: not a git checkout")


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
