"""`nmoe bench checkpoint`: what it says, and that it leaves nothing behind and touches nothing that was there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from nmoe.bench import checkpoint as bench_checkpoint
from nmoe.errors import InputError
from tests.effects.train.tiny import tiny


def test_a_save_and_a_load_beside_plain_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_checkpoint.main(tiny(), tmp_path, steps=2, rounds=2) == 0
    told = capsys.readouterr().out
    names = (
        "state",
        "round 1 of 2",
        "round 2 of 2",
        "plain write",
        "save",
        "digest",
        "plain read",
        "load",
        "stall, copy",
    )
    names += ("stall, overlapped", "stall, of it the call")
    assert all(line.startswith(name) for line, name in zip(told.splitlines(), names, strict=False)), told
    for name in ("save", "load"):
        assert re.search(rf"^{name} .* \d+ % of the plain rate$", told, re.M), told
    assert len(re.findall(r" ms a GB of state$", told, re.M)) == 3
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / bench_checkpoint.FOLDER).mkdir()
    (tmp_path / bench_checkpoint.FOLDER / "mine").write_text("mine")
    with pytest.raises(InputError, match=f"without a {bench_checkpoint.FOLDER} in it, got File exists"):
        bench_checkpoint.main(tiny(), tmp_path, steps=2, rounds=1)
    assert (tmp_path / bench_checkpoint.FOLDER / "mine").read_text() == "mine"
    monkeypatch.setattr(bench_checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(InputError, match="--to: expected room for .* got 1 B"):
        bench_checkpoint.main(tiny(), tmp_path / "new", steps=2, rounds=1)
    assert not (tmp_path / "new" / bench_checkpoint.FOLDER).exists()
    with pytest.raises(InputError, match="at least 2 and 1, got 1 and 1"):
        bench_checkpoint.main(tiny(), tmp_path, steps=1, rounds=1)
