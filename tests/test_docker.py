"""The images: what their files copy exists, and what they install is what docs/install.md says."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nmoe.pure.cluster.kubernetes import HOME, USER
from tests.configs import ROOT
from tests.test_docs import blocks
from tests.test_install import pins

FILES = {"cpu": "constraints.txt", "gpu": "constraints-gpu.txt"}


def instructions(kind: str) -> list[tuple[str, str]]:
    """Word and arguments of every instruction, on one line each."""
    text = (ROOT / "docker" / f"{kind}.Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def arguments(kind: str, word: str) -> list[str]:
    return [rest for name, rest in instructions(kind) if name == word]


def copied(kind: str) -> list[str]:
    return [source for line in arguments(kind, "COPY") for source in shlex.split(line)[:-1]]


def installation(command: str) -> tuple[list[str], set[str]]:
    """A pip command without --no-cache-dir, and the extras of nmoe that it installs."""
    *words, package = shlex.split(command)
    return [word for word in words if word != "--no-cache-dir"], set(re.findall(r"\w+", package))


@pytest.mark.parametrize("kind", FILES)
def test_what_is_copied_is_there(kind: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(copied(kind)) == 6 and FILES[kind] in copied(kind)
    assert [path for path in copied(kind) if not any(x == path or x.startswith(f"{path}/") for x in tracked)] == []


@pytest.mark.parametrize("kind", FILES)
def test_the_package_needs_nothing_else(kind: str) -> None:
    """What setuptools reads, and the presets behind their link."""
    link = ROOT / "nmoe" / "config" / "presets"
    assert {"pyproject.toml", "README.md", "LICENSE", "nmoe", link.resolve().name} <= set(copied(kind))


@pytest.mark.parametrize("kind", FILES)
def test_the_installation_is_that_of_the_docs(kind: str) -> None:
    documented = [line for block in blocks("docs/install.md", "") for line in block.splitlines() if FILES[kind] in line]
    (command,) = (rest for rest in arguments(kind, "RUN") if "pip install" in rest)
    (words, extras), (wanted, least) = installation(command), installation(documented[0])
    assert words == wanted and extras >= least
    assert f"torch=={pins(FILES[kind])['torch']}" in words


@pytest.mark.parametrize("kind", FILES)
def test_nobody_is_root(kind: str) -> None:
    """The user is a number, which Kubernetes needs to see that it is not root; nothing follows that needs root."""
    names = [name for name, _ in instructions(kind)]
    assert arguments(kind, "USER") == [str(USER)]
    assert not {"RUN", "COPY", "ADD"} & set(names[names.index("USER") :])
    assert f"--uid {USER}" in arguments(kind, "RUN")[0]
    assert arguments(kind, "WORKDIR")[-1] == HOME
    # a folder that WORKDIR makes is root's, whoever the user is: without a volume nothing could be written there
    assert f"install --directory --owner=nmoe --group=nmoe {HOME}" in arguments(kind, "RUN")[0]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: of all lines that match, the last one decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        parts = Path(path).parts
        whole = any(fnmatch("/".join(parts[: i + 1]), pattern) for i in range(len(parts)))
        if line and not line.startswith("#") and (whole or (pattern[:3] == "**/" and pattern[3:] in parts)):
            out = not line.startswith("!")
    return out


def test_nothing_but_the_package_reaches_a_builder() -> None:
    kept = {path for kind in FILES for path in copied(kind)}
    assert [path for path in kept if ignored(path)] == []
    assert not ignored("nmoe/config/presets") and not ignored("configs/moonlight.toml")
    for path in (".git/config", ".env", "runs/first/config.toml", "data/shard.npy", ".venv/bin/python", "tests/x.py"):
        assert ignored(path), path
    assert ignored("nmoe/pure/__pycache__/x.pyc")
