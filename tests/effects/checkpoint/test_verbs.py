"""`nmoe ckpt` on the checkpoints of a real training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs
import pytest

from nmoe.config.sections import Config
from nmoe.effects.checkpoint import verbs as ckpt
from nmoe.effects.record.names import WEIGHTS
from nmoe.errors import InputError
from tests.effects.train import trainings
from tests.effects.train.trainings import folder, train


@pytest.fixture(scope="module")
def trained(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = trainings.config(tmp_path_factory.mktemp("ckpt"), "trained", sources, 5)
    validation = attrs.evolve(config.validation, every=2)
    config = attrs.evolve(config, validation=validation)
    assert train(config)[0] == 0
    return config


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(folder(trained), tmp_path / "run"))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_list_and_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / names(run)[2] / "manifest.json").write_text("{}")
    assert ckpt.list_checkpoints(run) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == names(run)[::-1]
    assert [row.split()[1] for row in rows] == ["whole", "whole", "damaged", "whole", "whole"]
    scores = [row.split()[4] for row in rows]
    assert [score != "-" for score in scores] == [True, True, False, True, False], "at steps 2, 4 and the last one"
    assert ckpt.show(run / "checkpoints" / names(run)[1]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "step 2 attempt 1 save 2 of it" in told
    assert "identity.model.moe.top_k" in told and "cursor 4" in told
    with pytest.raises(InputError, match="manifest.json"):
        ckpt.show(run / "checkpoints" / names(run)[2])


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.verify(run, everything=True) == 0
    assert capsys.readouterr().out.count("  whole") == 5
    file = next((run / "checkpoints" / names(run)[0]).glob("*.safetensors"))
    with open(file, "r+b") as opened:
        opened.seek(300_000)
        byte = opened.read(1)
        opened.seek(300_000)
        opened.write(bytes([byte[0] ^ 1]))
    assert ckpt.verify(run, everything=False) == 0, "the newest alone"
    assert ckpt.verify(run, everything=True) == 1
    told = capsys.readouterr().out
    assert told.count("  damaged") == 1 and f"{file}: bytes 0 to " in told


def test_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run / "checkpoints" / name for name in names(run)[:2])
    assert ckpt.diff(one, one) == 0
    assert capsys.readouterr().out.endswith(" tensors are the same, 0 differ\n")
    assert ckpt.diff(one, two) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "step: 1 -> 2" and "cursor: 2 -> 4" in told
    assert any(line.startswith("param/embed/value: ") for line in told)
    assert "3 tensors are the same" in told[-1], "the counters of skipped steps"


def test_prune_keeps_what_it_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    for arguments, says in (
        ((0, 0, 0), "--last: expected at least 1, got 0"),
        ((1, -1, 0), "--every: expected at least 0, got -1"),
    ):
        with pytest.raises(InputError, match=says):
            ckpt.prune(run, *arguments)
    assert names(run) == before
    assert ckpt.prune(run, 1, 2, 0) == 0
    assert names(run) == [before[1], before[3], before[4]]
    assert ckpt.prune(run, 1, 0, 0) == 0
    assert names(run) == [before[4]]
    assert ckpt.prune(run, 1, 0, 0) == 0 and names(run) == [before[4]]


def test_exported_weights_are_those_the_run_wrote(run: Path, tmp_path: Path) -> None:
    written = (run / WEIGHTS).read_bytes()
    assert ckpt.export_weights(run, tmp_path / "out") == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == written
    assert ckpt.export_weights(run / "checkpoints" / names(run)[0], tmp_path / "first") == 0
    assert (tmp_path / "first" / WEIGHTS).read_bytes() != written
    os.remove(run / WEIGHTS)
    assert ckpt.export_weights(run, None) == 0 and (run / WEIGHTS).read_bytes() == written
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected to write weights, got "):
        ckpt.export_weights(run, tmp_path / "file" / "x")


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    for call in (ckpt.list_checkpoints, ckpt.show):
        with pytest.raises(InputError, match="a run with checkpoints, got none in it"):
            call(tmp_path / "nowhere")
