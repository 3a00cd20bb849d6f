"""Completion in a shell, asked as a shell asks, and in a real bash with its tab key."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two runs, a config, and the command `nmoe` in bin/."""
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text("")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "nmoe"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nmoe "$@"\n')
    command.chmod(0o755)
    return tmp_path


def environ(place: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": path, "TERM": "dumb", **more}


def offered(place: Path, line: str, shell: str = "bash") -> list[str]:
    """What a shell is offered for a line with the cursor at its end."""
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    with open(place / "answer", "w+") as answer:
        subprocess.run(
            [sys.executable, "-m", "nmoe"],
            env=environ(place, **asked, _ARGCOMPLETE_SHELL=shell, _ARGCOMPLETE_STDOUT_FILENAME=answer.name),
            cwd=place,
            check=True,
        )
        return answer.read().splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nmoe conf", ["config"]),
        ("nmoe data to", ["tokenizer"]),
        ("nmoe data prep --wo", ["--workers", "--worker"]),
        ("nmoe run quickstart-", ["quickstart-dsa", "quickstart-gqa", "quickstart-kda", "quickstart-nsa"]),
        ("nmoe plan mi", ["mine.toml"]),
        ("nmoe run quickstart --model.moe.num_s", ["--model.moe.num_shared_experts="]),
        ("nmoe run quickstart --data.source.ki", ["--data.source.kind="]),
        ("nmoe run quickstart --precision.compute=b", ["--precision.compute=bf16"]),
        ("nmoe run quickstart --log.deta", []),
        ("nmoe runs show ", ["first", "second"]),
        ("nmoe ckpt diff first s", ["second"]),
        ("nmoe config explain train.micro", ["train.microbatch_size"]),
        ("nmoe config diff quickstart dsv", ["dsv2", "dsv3"]),
        ("nmoe completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_what_is_offered(place: Path, line: str, expected: list[str]) -> None:
    assert [text.strip() for text in offered(place, line)] == expected


def test_zsh_shows_what_a_key_means(place: Path) -> None:
    (line,) = offered(place, "nmoe run quickstart --train.step", shell="zsh")
    assert line.startswith("--train.steps=:") and len(line) > len("--train.steps=:None")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(place: Path, shell: str) -> None:
    done = subprocess.run(["nmoe", "completion", shell], env=environ(place), capture_output=True, text=True, check=True)
    assert "_ARGCOMPLETE" in done.stdout and "nmoe" in done.stdout


@pytest.fixture
def bash(place: Path) -> Iterator[int]:
    """The terminal of an interactive bash that has read the script, as docs/install.md says."""
    (line,) = (
        line for line in (ROOT / "docs" / "install.md").read_text().splitlines() if "nmoe completion bash" in line
    )
    child, terminal = pty.fork()
    if not child:
        os.chdir(place)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environ(place, PS1="$ "))
    os.write(terminal, f"{line.partition('#')[0].strip()}; echo rea''dy\n".encode())
    until(terminal, "ready")
    yield terminal
    os.write(terminal, b"\x15exit\n")
    os.waitpid(child, 0)
    os.close(terminal)


def until(terminal: int, expected: str) -> str:
    """What a terminal shows up to `expected`, or after a minute without it."""
    shown, deadline = "", time.monotonic() + 60
    while expected not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_the_tab_key_of_bash_completes_a_whole_command(bash: int) -> None:
    os.write(bash, b"nmoe run quickstart-g\t")
    assert "quickstart-gqa " in until(bash, "quickstart-gqa ")
    os.write(bash, b"--train.ste\t")
    assert "--train.steps=" in until(bash, "--train.steps=")
    os.write(bash, b"3 --precision.compute=b\t")
    assert "compute=bf16" in until(bash, "compute=bf16")
    os.write(bash, b"\x15nmoe runs show f\t")
    assert "nmoe runs show first" in until(bash, "show first")
