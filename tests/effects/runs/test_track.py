"""Followers: lines reach the target once, whatever happens to the follower. Real files, real processes, real kills."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_file_loader

from nmoe.effects import files
from nmoe.effects.record.alive import process_start
from nmoe.effects.runs import status
from nmoe.effects.runs.track import sinks
from nmoe.effects.runs.track.follow import Position, ended, follow, new_lines, numbers
from nmoe.errors import InputError

ROOT = Path(__file__).parents[3]


def line(step: int, attempt: int = 1, **fields: Any) -> str:
    return json.dumps({"attempt": attempt, "time": "2026-11-24T10:00:00.000+00:00", "step": step, **fields}) + "\n"


def beat(folder: Path, status: str, age_s: float = 0.0) -> None:
    moment = datetime.fromtimestamp(time.time() - age_s, UTC).isoformat(timespec="milliseconds")
    # whole or not at all, as a run writes it: a follower reads it meanwhile; lost after 305 s, which no test takes
    record = {"status": status, "heartbeat": moment, "heartbeat_every_s": 100.0}
    files.write_text(folder / "run.json", json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    return folder


def told(folder: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard's own reader finds."""
    loader = event_file_loader.EventFileLoader(str(folder / sinks.EVENTS))
    return [
        (event.step, value.tag, value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value)
        for event in loader.Load()
        for value in event.summary.value
    ]


def once(folder: Path, name: str = "tensorboard") -> None:
    follow(folder, name, sinks.opener(name), every_s=0.01, once=True, say=lambda text: None)


def test_tensorboard_has_every_number(run: Path) -> None:
    experts = {"layer": [3, 5], "cv": [0.5, 0.25]}
    (run / "metrics.rank0.jsonl").write_text(line(7, loss="nan", experts=experts) + line(8, loss=2.5))
    once(run)
    found = told(run)
    assert found[0][:2] == (7, "loss") and math.isnan(found[0][2])
    assert found[1:] == [(7, "experts/cv/3", 0.5), (7, "experts/cv/5", 0.25), (8, "loss", 2.5)]


def test_a_torn_last_line_waits_for_its_end(run: Path) -> None:
    metrics = run / "metrics.rank0.jsonl"
    whole = line(2, loss=2.0)
    metrics.write_text(line(1, loss=1.0) + whole[:20])
    once(run)
    assert told(run) == [(1, "loss", 1.0)]
    with open(metrics, "a") as file:
        file.write(whole[20:])
    once(run)
    assert told(run) == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_what_was_told_after_the_last_position_is_told_once(run: Path) -> None:
    (run / "metrics.rank0.jsonl").write_text(line(1, loss=1.0))
    once(run)
    record = run / "track" / "tensorboard.json"
    kept = record.read_text()
    with open(run / "metrics.rank0.jsonl", "a") as file:
        file.write(line(2, loss=2.0))
    once(run)
    record.write_text(kept)  # as if killed before the position was written
    once(run)
    assert told(run) == [(1, "loss", 1.0), (2, "loss", 2.0)]


@pytest.mark.parametrize("looks", [(), (0,), (0, 1), (0, 1, 2), (1, 2), (2,)])
def test_a_run_that_was_cut_and_resumed_goes_on_with_its_new_attempt(run: Path, looks: tuple[int, ...]) -> None:
    """Killed twice, resumed at step 3 and at step 2, whenever the follower looks meanwhile."""
    metrics = run / "metrics.rank0.jsonl"
    attempts = [(1, range(6)), (2, range(3, 7)), (3, range(2, 9))]
    kept: list[tuple[int, float]] = []
    for turn, (attempt, steps) in enumerate(attempts):
        kept = [each for each in kept if each[0] < steps[0]] + [(step, 10 * attempt + step) for step in steps]
        metrics.write_text("".join(line(step, int(loss // 10), loss=loss) for step, loss in kept))
        if turn in looks:
            once(run)
            once(run)
    once(run)
    found = [(step, value) for step, _, value in told(run)]
    assert [each for each in found if each in kept] == kept
    assert len(found) == len(set(found)), "each line once"


def test_what_a_killed_follower_left_after_its_position_is_cut_off(run: Path) -> None:
    (run / "metrics.rank0.jsonl").write_text(line(1, loss=1.0))
    once(run)
    with open(run / sinks.EVENTS, "ab") as file:
        file.write(b"half an event" * 50)
    with open(run / "metrics.rank0.jsonl", "a") as file:
        file.write(line(2, loss=2.0))
    once(run)
    assert told(run) == [(1, "loss", 1.0), (2, "loss", 2.0)]
    assert b"half an event" not in (run / sinks.EVENTS).read_bytes()


def test_a_new_attempt_starts_a_session(run: Path) -> None:
    (run / "metrics.rank0.jsonl").write_text(line(1) + line(2) + line(2, attempt=2) + line(3, attempt=2))
    once(run)
    events = event_file_loader.EventFileLoader(str(run / sinks.EVENTS)).Load()
    assert [event.step for event in events if event.HasField("session_log")] == [1, 2]


def test_killed_again_and_again_nothing_is_lost_or_doubled(run: Path) -> None:
    metrics, count = run / "metrics.rank0.jsonl", 1500
    command = [sys.executable, "-m", "nmoe", "track", "--to", "tensorboard", "--every", "0.01", str(run)]
    beat(run, "running")
    for turn in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with open(metrics, "a") as file:
            for step in range(turn * 500, turn * 500 + 250):
                file.write(line(step, loss=float(step)))
                file.flush()
        process.stdout.readline()  # it has come as far as its first position
        with open(metrics, "a") as file:
            for step in range(turn * 500 + 250, turn * 500 + 500):
                file.write(line(step, loss=float(step)))
                file.flush()
        process.kill()
        process.communicate()
        beat(run, "running")
    beat(run, "finished")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert told(run) == [(step, "loss", float(step)) for step in range(count)]


def test_a_follower_ends_when_the_run_has(run: Path) -> None:
    assert ended(run) == "not started"
    beat(run, "running")
    assert ended(run) is None
    beat(run, "failed")
    assert ended(run) == "failed"


@pytest.mark.parametrize(("age_s", "word"), [(275.0, "running"), (335.0, "lost")])
def test_a_follower_and_the_list_of_runs_call_the_same_run_dead(run: Path, age_s: float, word: str) -> None:
    beat(run, "running", age_s)
    assert status.of(run, (), "another host") == word
    assert ended(run) == (None if word in status.GOING else word)


def test_a_process_that_only_has_the_id_of_the_dead_one_is_not_taken_for_it(run: Path) -> None:
    beat(run, "running")
    record = json.loads((run / "run.json").read_text()) | {"pid": os.getpid(), "host": platform.node()}
    (run / "run.json").write_text(json.dumps(record | {"process_start": process_start(os.getpid())}))
    assert ended(run) is None
    (run / "run.json").write_text(json.dumps(record | {"process_start": "1"}))
    assert ended(run) == "crashed"


def test_a_follower_goes_on_while_the_run_does(run: Path) -> None:
    metrics = run / "metrics.rank0.jsonl"
    metrics.write_text(line(1, loss=1.0))
    beat(run, "running")
    said: list[str] = []

    def say(text: str) -> None:
        """Write the next line once the one before was told; the run ends with the third."""
        said.append(text)
        if len(said) < 3:
            threading.Timer(0.1, more, (len(said) + 1,)).start()

    def more(step: int) -> None:
        with open(metrics, "a") as file:
            file.write(line(step, loss=float(step)))
        beat(run, "finished" if step == 3 else "running")

    assert follow(run, "tensorboard", sinks.opener("tensorboard"), every_s=0.01, once=False, say=say) == 0
    assert told(run) == [(step, "loss", float(step)) for step in (1, 2, 3)]
    assert said[-1] == "tensorboard  run finished, 3 lines"


def test_a_whole_line_that_is_none_is_refused(run: Path) -> None:
    (run / "metrics.rank0.jsonl").write_text(line(1) + "{}\n")
    with pytest.raises(InputError, match=r"jsonl:2: expected time, step and attempt"):
        new_lines(run / "metrics.rank0.jsonl", Position())


@given(st.floats() | st.sampled_from(["nan", "inf", "-inf"]))
def test_numbers_that_json_has_not_are_kept(value: Any) -> None:
    ((name, number),) = numbers({"step": 1, "time": "x", "attempt": 2, "loss": value})
    assert name == "loss" and (number == float(value) or math.isnan(number) and math.isnan(float(value)))
