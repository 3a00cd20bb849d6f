"""`nmoe launch`: the jobs of the presets, and what it refuses in the words of `nmoe run`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from nmoe.cli import main
from nmoe.config import load, preset
from nmoe.config.check import unrunnable
from tests.configs import ROOT
from tests.test_docs import blocks

KUBERNETES = ("--image=nmoe:gpu", "--claim=work")


def shape(name: str) -> tuple[str, str]:
    """Options of a preset's hosts: as few as hold its ranks."""
    ranks = load(preset.path_of(name), {}, ()).config.parallel.ranks
    return f"--hosts={max(1, ranks // 8)}", f"--gpus-per-host={min(8, ranks)}"


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["launch", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_has_jobs_or_the_refusal_of_run(capsys: pytest.CaptureFixture[str], name: str) -> None:
    config = load(preset.path_of(name), {}, ()).config
    refusals = unrunnable(config, config.parallel.ranks)
    for scheduler, more in (("slurm", ()), ("kubernetes", KUBERNETES)):
        code, out, err = answered(capsys, scheduler, name, *shape(name), "--run.name=first", *more)
        assert code == (2 if refusals else 0), err
        assert [re.sub(r"^nmoe: .*?\.toml(:\d+)?: ", "", line) for line in err.splitlines()] == list(refusals)
        assert (out == "") == bool(refusals)
    if not refusals:
        (job,) = (one for one in json.loads(out)["items"] if one["kind"] == "Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu", "0")
        assert int(gpus) * job["spec"]["completions"] == (config.parallel.ranks if config.run.device == "cuda" else 0)


def test_run_refuses_what_check_machine_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answered(capsys, "slurm", "moonlight", "--hosts=2", "--gpus-per-host=4", "--run.name=first")
    assert (code, out) == (2, "")
    assert err == (
        "nmoe: parallel.experts: expected at most the 4 ranks of one host, got 8; add --parallel.experts=4, or "
        "--parallel.transport=proxy, which sends rows to other hosts over TCP\n"
    )


def test_what_this_host_sets_holds_on_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "my 'own' $config.toml"
    path.write_text(f'extends = "{ROOT / "configs" / "moonlight.toml"}"\n')
    monkeypatch.setenv("NMOE_TRAIN__STEPS", "123")
    monkeypatch.setenv("NMOE_RUN__ROOT", "it's here")
    code, out, err = answered(capsys, "slurm", str(path), "--hosts=1", "--run.name=first")
    assert code == 0, err
    assert "export NMOE_TRAIN__STEPS=123\n" in out and "export NMOE_RUN__ROOT='it'\"'\"'s here'\n" in out
    code, out, err = answered(capsys, "kubernetes", str(path), "--hosts=1", "--run.name=first", *KUBERNETES)
    assert code == 0, err
    text = json.loads(out)["items"][0]["data"]["config.toml"]
    assert "steps = 123\n" in text and 'root = "it\'s here"\n' in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("slurm", "moonlight", "--hosts=1"), "run.name: expected a name, got nothing; add --run.name=NAME, .*"),
        (("slurm", "moonlight", "--hosts=3", "--run.name=a"), r"--hosts: .* 3 \* 8 = 24; write --hosts 1 or add .*=24"),
        (("slurm", "moonlight"), "launch slurm: the following arguments are required: --hosts; see .*"),
        (("slurm", "quickstart", "--hosts=1", "--prepare=x"), 'data.source.kind: expected "shards" with --prepare, .*'),
        (("slurm", "moonlight", "--hosts=0", "--prepare=x"), "--hosts: expected at least 1, got 0; raise it"),
        (("kubernetes", "moonlight", "--hosts=1", "--image=x"), "launch kubernetes: .* are required: --claim; see .*"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str) -> None:
    code, out, err = answered(capsys, *arguments)
    assert (code, out) == (2, "") and re.fullmatch(f"nmoe: {problem}\n", err), err


def test_data_is_prepared_where_the_config_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answered(capsys, "slurm", "dsv3", "--hosts=5", "--prepare=raw texts")
    assert code == 0 and "--nodes=5\n" in out and "nmoe data prep 'raw texts' data/pretrain\n" in out
    code, out, _ = answered(capsys, "kubernetes", "dsv3", "--hosts=5", "--prepare=raw", "--viz", *KUBERNETES)
    assert code == 0 and [one["kind"] for one in json.loads(out)["items"]] == ["Job", "Deployment", "Service"]


COMMANDS = [
    line
    for block in blocks("docs/cluster.md", "")
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("nmoe launch")
]


def test_the_commands_of_the_page_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        code, out, err = answered(capsys, *shlex.split(command.partition(" > ")[0])[2:])
        assert (code, err) == (0, "") and out, command
