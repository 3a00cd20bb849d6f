"""What `nmoe doctor` says of made-up machines, and of this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config.sections import Gqa
from nmoe.effects.device import doctor
from nmoe.effects.device.doctor import Facts, Gpu, Line, Preset

REPOSITORY = Path(__file__).resolve().parents[3]
H100 = Gpu(name="NVIDIA H100", memory_bytes=80 * 2**30, capability=(9, 0))
A100 = Gpu(name="NVIDIA A100", memory_bytes=40 * 2**30, capability=(8, 0))
EXTRAS = {"data": ("pyarrow", "tokenizers"), "hf": ("transformers",)}
PACKAGES = {package: "1.0" for packages in EXTRAS.values() for package in packages}
OFF = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}

GOOD = Facts(
    python="3.12.1",
    system="Linux",
    packages={"torch": "2.11.0+cu130", "triton": "3.6.0", **PACKAGES},
    extras=EXTRAS,
    broken={},
    cpus=16,
    memory_bytes=128 * 2**30,
    free_bytes=64 * 2**30,
    gpus=(H100, H100),
    supported=((9, 0), (10, 0)),
    peers=True,
    environ=OFF,
    runs_problem=None,
    presets=(Preset(name="a", device="cuda", ranks=2, data="data/pretrain"),),
)


def without(package: str) -> dict[str, str]:
    """The packages of a good machine but one."""
    return {name: version for name, version in GOOD.packages.items() if name != package}


def pair(torch: str, triton: str) -> dict[str, Any]:
    """What changes of a good machine with these versions."""
    return {"packages": {**GOOD.packages, "torch": torch, "triton": triton}}


def finding(facts: Facts, what: str) -> Line:
    """The one line about `what`."""
    (line,) = (line for line in doctor.judge(facts) if line.what == what)
    return line


def test_a_good_machine_has_nothing_to_fix() -> None:
    for facts in (GOOD, attrs.evolve(GOOD, gpus=(), environ={}, presets=(Preset(name="c", device="cpu"),))):
        assert {(line.level, line.advice) for line in doctor.judge(facts)} == {("ok", "")}


@pytest.mark.parametrize(
    ("change", "what", "level", "told"),
    [
        ({"python": "3.10.13"}, "python", "FAIL", "3.10.13, older than 3.11"),
        ({"packages": {**GOOD.packages, "torch": "2.9.1"}}, "torch", "FAIL", "torch>=2.11"),
        ({"packages": {**GOOD.packages, "torch": "10.0"}}, "torch", "ok", "10.0"),
        ({"packages": {**GOOD.packages, "triton": "3.5.1"}}, "triton", "FAIL", "older than 3.6"),
        (pair("2.13.0+cpu", "3.7.1"), "torch and triton", "ok", "torch 2.13.0 with triton 3.7.1"),
        (pair("2.13.0", "3.6.0"), "torch and triton", "warn", "pip install triton==3.7.1"),
        (pair("2.12.0", "3.7.1"), "torch and triton", "warn", "pip install torch==2.13.0 triton==3.7.1 or torch=="),
        ({"packages": without("torch")}, "torch", "FAIL", "pip install torch"),
        ({"packages": without("triton")}, "triton", "FAIL", "absent"),
        ({"packages": without("triton"), "system": "Darwin"}, "triton", "ok", "not needed on Darwin"),
        ({"broken": {"triton": "ImportError: libtriton.so"}}, "triton", "FAIL", "libtriton.so"),
        ({"packages": without("pyarrow")}, "extra data", "none", "pip install 'nmoe[data]'"),
        ({"packages": without("transformers")}, "extra hf", "none", "transformers absent"),
        ({"extras": {}}, "extras", "warn", "pip install -e ."),
        ({"memory_bytes": 2 * 2**30}, "cpu and memory", "warn", "2.15 GB"),
        ({"free_bytes": 2**29}, "free disk", "warn", "537 MB"),
        ({"runs_problem": "Permission denied at runs"}, "folder runs", "FAIL", "Permission denied at runs"),
        ({"gpus": (H100, A100)}, "gpu 1", "warn", 'capability 9.0 and 10.0, run.kernels = "torch" (slower)'),
        ({"gpus": (H100, A100)}, "gpu 0", "ok", "NVIDIA H100, 85.9 GB, compute capability 9.0"),
        ({"peers": False}, "gpu to gpu", "warn", "NVLink"),
        ({"environ": OFF | {"NCCL_NVLS_ENABLE": "1"}}, "NCCL_NVLS_ENABLE", "warn", "export NCCL_NVLS_ENABLE=0"),
        ({"environ": {}}, "NVSHMEM_DISABLE_NVLS", "warn", "unset"),
        ({"environ": OFF | {"PYTORCH_ALLOC_CONF": "a:1"}}, "PYTORCH_ALLOC_CONF", "warn", "unset PYTORCH_ALLOC_CONF"),
        ({"gpus": (H100,)}, "a", "none", "meant for 2 GPUs, this machine has 1"),
        ({"gpus": (H100, A100)}, "a", "none", "has 1 to use"),
        ({"gpus": ()}, "a", "none", "has none to use"),
    ],
)
def test_each_lack_is_told_with_its_remedy(change: dict[str, Any], what: str, level: str, told: str) -> None:
    line = finding(attrs.evolve(GOOD, **change), what)
    assert line.level == level
    assert told in f"{line.value} -> {line.advice}"
    assert (line.advice == "") == (level == "ok")


@pytest.mark.parametrize(
    ("preset", "level", "told"),
    [
        (Preset(name="p", device="cuda", data="d", data_found=False), "none", "no manifest.json in d"),
        (Preset(name="p", problems=("p:3: model.hidden_size: ...",)), "FAIL", "p:3: model.hidden_size"),
        (Preset(name="p", device="cpu"), "none", "pip install 'nmoe[data]'"),
        (Preset(name="p", device="cpu", data="d"), "ok", "has what it needs"),
    ],
)
def test_each_preset_says_what_it_lacks(preset: Preset, level: str, told: str) -> None:
    line = finding(attrs.evolve(GOOD, presets=(preset,), packages=without("tokenizers")), "p")
    assert line.level == level and told in f"{line.value} -> {line.advice}"


def test_a_preset_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what it lacks, and with no advice: nothing is wrong."""
    monkeypatch.setattr(Gqa, "has_kernels", False)
    slow = doctor.read_preset("gpt-oss-20b")
    (remark,) = slow.remarks
    assert "no kernels" in remark and doctor.read_preset("moonlet").remarks == ()
    lines = [line for line in doctor.judge(attrs.evolve(GOOD, presets=(slow,))) if line.what == slow.name]
    assert [line.level for line in lines] == ["none", "ok"] and lines[1].value == remark


def test_multicast_and_peers_only_matter_among_gpus() -> None:
    for gpus in ((), (H100,)):
        named = {line.what for line in doctor.judge(attrs.evolve(GOOD, gpus=gpus, environ={}, peers=False))}
        assert not named & {"gpu to gpu", *OFF}


def test_versions_and_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    oldest = {name: ".".join(map(str, parts)) for name, parts in doctor.MINIMUM.items()}
    assert project["requires-python"] == f">={oldest['python']}"
    assert {f"torch>={oldest['torch']}", f"triton>={oldest['triton']}; sys_platform == 'linux'"} <= set(
        project["dependencies"]
    )
    extras = {
        name: tuple(p.split(">=")[0] for p in packages) for name, packages in project["optional-dependencies"].items()
    }
    del extras["dev"]
    assert doctor.read_extras() == extras


def test_tested_pairs_are_the_pins() -> None:
    files = [(REPOSITORY / name).read_text() for name in ("constraints.txt", "constraints-gpu.txt")]
    assert list(doctor.TESTED.items()) == [
        match.groups() for text in files for match in re.finditer(r"^torch==(.+)\n(?:.+\n)*?triton==(.+)$", text, re.M)
    ]


def test_probe_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path / "runs", tmp_path / "none" / "deeper"):
        assert doctor.probe(folder) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_probe_names_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    problem = doctor.probe(tmp_path / "runs")
    assert problem is not None and problem.startswith("Not a directory at ") and "runs" in problem


def test_probe_sees_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "replace", refuse)
    problem = doctor.probe(tmp_path)
    assert problem is not None and problem.startswith("Invalid cross-device link at ")
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libfoo.so: not found\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.import_problem("broken_package") == "OSError: libfoo.so: not found"
    assert doctor.import_problem("json") is None


def doctor_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`nmoe doctor` in a folder."""
    command = [sys.executable, "-m", "nmoe", "doctor", *arguments]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def test_this_machine(tmp_path: Path) -> None:
    done = doctor_in(tmp_path, "--json")
    lines = {line["what"]: line for line in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (0, "")
    assert lines["python"]["value"] == sys.version.split()[0]
    assert lines["quickstart"]["level"] == lines["torch and triton"]["level"] == "ok"
    assert "no manifest.json in data/pretrain" in lines["moonlet"]["value"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data" / "pretrain").mkdir(parents=True)
    (tmp_path / "data" / "pretrain" / "manifest.json").write_text("{}")
    done = doctor_in(tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1] == "moonlet")
    assert "meant for 1 GPU" in line and "manifest" not in line


def test_a_runs_folder_that_is_no_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = doctor_in(tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if "folder runs" in line)
    assert done.returncode == 1 and line.startswith("FAIL") and "->" in line
