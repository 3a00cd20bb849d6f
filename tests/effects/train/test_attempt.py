"""A run folder after attempts that ended in the middle of a line, or of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.effects.train import attempt
from nmoe.errors import InputError


def write(folder: Path, name: str, *lines: object, tail: bytes = b"") -> Path:
    path = folder / name
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    return path


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_what_belongs_to_later_steps_goes_and_history_stays(tmp_path: Path) -> None:
    lines = [{"step": 1}, {"step": 5}, {"step": 5, "validation/loss": 2.0}, {"step": 6}, {"step": 7}]
    metrics = write(tmp_path, "metrics.rank0.jsonl", *lines, tail=b'{"step": 8, "lo')
    arrays = write(tmp_path, "arrays.rank1.jsonl", {"step": 4}, {"step": 8})
    telemetry = write(tmp_path, "telemetry.rank0.jsonl", {"elapsed_s": 1}, {"elapsed_s": 9}, tail=b'{"ela')
    events = write(
        tmp_path, "events.jsonl", {"event": "start", "attempt": 1}, {"event": "x", "step": 7}, tail=b"\0" * 9
    )
    attempt.fix(tmp_path, 5)
    assert steps(metrics) == [1, 5, 5] and steps(arrays) == [4]
    assert telemetry.read_text().count("\n") == 2 and telemetry.read_text().endswith("9}\n")
    assert events.read_text().endswith("7}\n") and events.read_text().count("\n") == 2
    before = metrics.read_bytes()
    attempt.fix(tmp_path, 5)
    assert metrics.read_bytes() == before
    attempt.fix(tmp_path, 0)
    assert metrics.read_bytes() == b""


@given(cut=st.integers(0, 200), step=st.integers(0, 9))
def test_wherever_a_kill_tore_the_file_whole_lines_up_to_the_step_are_left(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    path = write(folder, "metrics.rank0.jsonl", *({"step": n, "loss": n / 7} for n in range(1, 9)))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    attempt.fix(folder, step)
    assert whole.startswith(path.read_bytes())
    assert steps(path) == list(range(1, 1 + min(step, whole[:cut].count(b"\n"))))


def test_a_line_that_cannot_be_read_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    events = write(tmp_path, "events.jsonl", {"event": "start"}, tail=b'{"eve')
    metrics = write(tmp_path, "metrics.rank0.jsonl", {"step": 1}, "no object", {"step": 9})
    before = events.read_bytes(), metrics.read_bytes()
    with pytest.raises(InputError, match=r"metrics.rank0.jsonl:2: expected one JSON object, got b'\"no object"):
        attempt.fix(tmp_path, 1)
    assert (events.read_bytes(), metrics.read_bytes()) == before
    write(tmp_path, "metrics.rank0.jsonl", {"step": "1"})
    with pytest.raises(InputError, match=r"metrics.rank0.jsonl:1: expected a number as step, got '1'; "):
        attempt.fix(tmp_path, 1)


def test_what_an_earlier_attempt_was_started_with_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("first")
    attempt.record(tmp_path, 2, {"config.toml": "second", "sources.toml": "new"})
    assert (tmp_path / "config.toml").read_text() == "second" and (tmp_path / "sources.toml").read_text() == "new"
    assert (tmp_path / "attempts" / "1" / "config.toml").read_text() == "first"
    # a start that ended before its first event has the same number again
    attempt.record(tmp_path, 2, {"config.toml": "again"})
    assert (tmp_path / "attempts" / "1" / "config.toml").read_text() == "first"
    attempt.record(tmp_path, 3, {"config.toml": "third"})
    assert (tmp_path / "attempts" / "2" / "config.toml").read_text() == "again"


def test_weights_of_an_earlier_step_are_moved_out_of_the_way(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"of step 8")
    attempt.record(tmp_path, 2, {"config.toml": "second"})
    assert not (tmp_path / "weights.safetensors").exists()
    assert (tmp_path / "attempts" / "1" / "weights.safetensors").read_bytes() == b"of step 8"


def test_a_validation_the_checkpoint_does_not_know_is_told_again_and_once(tmp_path: Path) -> None:
    """Killed after the line and before the next save: the run goes on from before its validation."""
    told = [{"step": 4, "loss": 2.0}, {"step": 4, "validation/loss": 1.9}]
    path = tmp_path / "metrics.rank0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    attempt.fix(tmp_path, 4, validated=True)
    assert len(path.read_text().splitlines()) == 2
    attempt.fix(tmp_path, 4, validated=False)
    assert [json.loads(line) for line in path.read_text().splitlines()] == told[:1]


def test_an_evaluation_the_checkpoint_does_not_know_is_reported_again_and_once(tmp_path: Path) -> None:
    """It comes after the validation of its step, which stays."""
    lines = [{"step": 4, "validation/loss": 1.9}, {"step": 4, "evaluation/bits/code": 2.0}]
    metrics = write(tmp_path, "metrics.rank0.jsonl", *lines)
    attempt.fix(tmp_path, 4)
    assert len(steps(metrics)) == 2
    attempt.fix(tmp_path, 4, evaluated=False)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == lines[:1]
