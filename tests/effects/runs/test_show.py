"""What `nmoe runs` says of run folders, whole, growing, torn and broken."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.effects.runs import show as runs
from nmoe.effects.terminal import sparkline
from nmoe.errors import InputError

START = {
    "time": "2026-11-24T06:00:00.000+00:00",
    "event": "start",
    "attempt": 1,
    "pid": 1,
    "parameters": 3_456_789,
    "active_parameters": 1_234_567,
    "steps": 500,
}
FINISHED = {"time": "2026-11-24T06:04:00.000+00:00", "event": "end", "status": "finished", "step": 500, "exit_code": 0}
EXPERTS = {"layer": [1, 2, 12], "max_over_mean": [1.25, 1.5, 2.0], "cv": [0.1, 0.2, "nan"], "dead": [0, 3, 1]}


def trained(step: int, loss: float | str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    """A line of metrics of a step of 1000 tokens and half a second."""
    about = {"attempt": attempt, "step": step, "time": "2026-11-24T06:01:00.000+00:00", "elapsed_s": step / 2}
    return about | {"tokens_global": 1000 * step, "loss": loss, "tokens_per_s": 2000.0, "mfu": 0.31} | more


def validated(step: int, loss: float) -> dict[str, Any]:
    """A line of metrics of a validation."""
    numbers = {"validation/loss": loss, "validation/bits_per_byte": loss / 2}
    return {"attempt": 1, "step": step, "time": "2026-11-24T06:01:00.000+00:00", "elapsed_s": step / 2 + 1} | numbers


def run_folder(
    root: Path,
    name: str,
    events: tuple[Mapping[str, Any], ...] = (START, FINISHED),
    metrics: tuple[Mapping[str, Any], ...] = (),
    host: str | None = None,
) -> Path:
    """A run folder on disk."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[train]\nsteps = 500\n")
    host = platform.node() if host is None else host
    (folder / "provenance.toml").write_text(
        f'command = "nmoe run x.toml"\n[code]\ncommit = "c0ffee"\ndirty = true\n[hardware]\nhost = "{host}"\n'
    )
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def dead_pid() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def problem(call: Any, *arguments: Any) -> str:
    """The one line an InputError shows."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_list_newest_first_with_each_number_in_its_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, "older", metrics=(trained(10, 4.5), validated(10, 3.25), trained(500, 2.125)))
    run_folder(tmp_path, "newer", ({**START, "time": "2026-11-24T08:00:00+01:00"}, FINISHED))
    run_folder(tmp_path, "waiting", ())
    (tmp_path / ".made.new").mkdir()
    (tmp_path / ".made.new" / "config.toml").write_text("")
    (tmp_path / "notes").mkdir()
    assert runs.list_runs(tmp_path) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["waiting", "newer", "older"]
    assert "not started" in rows[0]
    assert rows[1].split() == ["newer", "finished", "-/500", "-", "-", "-", "-", "2026-11-24", "07:00:00", "0:00:00"]
    assert rows[2].split() == (
        ["older", "finished", "500/500", "2.1250", "3.2500", "1.6250", "500,000", "2026-11-24", "06:00:00", "0:04:10"]
    )
    assert len({len(row) for row in (head, *rows[1:])}) == 1


@pytest.mark.parametrize("end", ["finished", "interrupted", "failed"])
def test_status_is_the_end_events(tmp_path: Path, end: str) -> None:
    folder = run_folder(tmp_path, "a", (START, {**FINISHED, "status": end}))
    assert runs.read_run(folder).status == end


def test_without_an_end_the_process_decides(tmp_path: Path) -> None:
    alive = run_folder(tmp_path, "alive", ({**START, "pid": os.getpid()},))
    dead = run_folder(tmp_path, "dead", ({**START, "pid": dead_pid()},))
    resumed = run_folder(tmp_path, "resumed", (START, FINISHED, {**START, "attempt": 2, "pid": dead_pid()}))
    elsewhere = run_folder(tmp_path, "elsewhere", ({**START, "pid": os.getpid()},), host="another-host")
    assert runs.read_run(alive).status == "running"
    assert runs.read_run(dead).status == "crashed"
    assert runs.read_run(resumed).status == "crashed"
    assert runs.read_run(elsewhere).status == "unknown, on another-host"


def test_duration_is_the_sum_of_the_attempts(tmp_path: Path) -> None:
    metrics = (trained(10, 4.0), trained(20, 4.0), trained(30, 4.0, attempt=2), trained(40, 4.0, attempt=2))
    assert runs.read_run(run_folder(tmp_path, "a", metrics=metrics)).duration_s == 10 + 20


def test_show_fits_a_screen_and_tells_loss_experts_and_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    falling = tuple(trained(step, 10 - step / 100, experts=EXPERTS) for step in range(10, 510, 10))
    failed = {**FINISHED, "status": "failed", "exit_code": 5, "error": "step 500: loss is finite, got 3 that were not"}
    run_folder(tmp_path, "a", (START, failed), (*falling, validated(500, 3.25)))
    assert runs.show(tmp_path, "a") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    assert lines[0].endswith("failed")
    for told in (
        "3,456,789  1,234,567 active",
        "step 500/500  500,000 tokens",
        "2,000 tokens/s  mfu 31.0 %",
        "3.2500 nats  1.6250 bits/byte  at step 500",
        "step 500: loss is finite, got 3 that were not",
        "c0ffee  with changes",
        "nmoe run x.toml",
    ):
        assert told in out
    (loss,) = (line for line in lines if line.startswith("loss"))
    assert loss.split()[1] == "9.9000" and loss.split()[3] == "5.0000"
    bars = loss.split()[2]
    assert list(bars) == sorted(bars, reverse=True) and bars[0] == "█" and bars[-1] == "▁"
    assert lines[-1].split() == ["12", "2", "nan", "1"]
    assert lines[-4].split() == ["layer", "max_over_mean", "cv", "dead"]


def test_show_says_where_a_step_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The longest part first; what takes no time is left out."""
    times = {"data": 0.0, "forward": 0.05, "exchange": 0.02, "backward": 0.13}
    line = trained(10, 4.0) | {"step_s": 0.2} | {f"time/{part}_s": seconds for part, seconds in times.items()}
    run_folder(tmp_path, "a", metrics=(line,))
    assert runs.show(tmp_path, "a") == 0
    assert "a step      200 ms: backward 65.0 %  forward 25.0 %  exchange 10.0 %\n" in capsys.readouterr().out


def test_show_of_a_run_that_has_told_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, "a", ())
    for file in ("events.jsonl", "metrics.rank0.jsonl"):
        (folder / file).unlink()
    assert runs.show(tmp_path, "a") == 0
    assert "not started" in capsys.readouterr().out


def test_json_has_the_numbers_and_what_is_not_finite_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "a", metrics=(trained(10, "nan", experts=EXPERTS), validated(10, 3.25)))
    run_folder(tmp_path, "b", ()).joinpath("provenance.toml").unlink()
    assert runs.list_runs(tmp_path, as_json=True) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert (one["name"], one["status"], one["step"], one["loss"]) == ("a", "finished", 10.0, "nan")
    assert one["started"] == "2026-11-24T06:00:00+00:00" and one["validation_loss"] == 3.25 and one["problems"] == []
    assert (other["name"], other["status"]) == ("b", "unreadable") and "provenance.toml" in other["problems"][0]
    assert runs.show(tmp_path, "a", as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["latest"]["experts"] == EXPERTS and shown["provenance"]["code"]["commit"] == "c0ffee"
    assert shown["end"]["status"] == "finished" and shown["start"]["parameters"] == START["parameters"]
    assert runs.tail(tmp_path, "a", 2, follow=False, as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("validation/loss") for line in lines] == [3.25, None] and lines[1]["event"] == "end"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 80))
def test_sparkline_shows_the_order_of_the_means(values: list[float], width: int) -> None:
    bars = sparkline(values, width)
    assert len(bars) == min(width, len(values)) and set(bars) <= set("▁▂▃▄▅▆▇█")
    if len(values) <= width:
        ranked = [bar for _, bar in sorted(zip(values, bars, strict=True))]
        assert ranked == sorted(ranked)


def test_sparkline_marks_what_is_not_finite_and_averages_the_rest() -> None:
    assert sparkline([0.0, float("nan"), 7.0, float("inf")], 4) == "▁x█x"
    assert sparkline([0.0, 8.0, 6.0, 8.0, 3.0, 5.0], 3) == "▁█▁"
    assert sparkline([5.0, 5.0], 9) == "▁▁"


def test_export_writes_the_scalars_and_one_column_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, "a", metrics=(trained(10, 4.5, experts=EXPERTS), validated(10, 3.25), trained(20, "nan")))
    assert runs.export(tmp_path, "a", None) == 0
    out = capsys.readouterr().out
    first, second, third = csv.DictReader(io.StringIO(out))
    assert (first["step"], first["loss"], first["validation/loss"]) == ("10", "4.5", "")
    assert (first["experts/cv/layer_02"], first["experts/cv/layer_12"]) == ("0.2", "nan")
    assert (first["experts/dead/layer_01"], first["experts/dead/layer_02"]) == ("0", "3")
    assert (second["loss"], second["validation/loss"], second["experts/cv/layer_02"]) == ("", "3.25", "")
    assert third["loss"] == "nan"
    assert not any(column.startswith("experts/layer") for column in first)
    target = tmp_path / "out.csv"
    target.write_text("old")
    assert runs.export(tmp_path, "a", target) == 0
    assert target.read_text() == out
    assert capsys.readouterr().out == f"{target}: 3 lines of {len(first)} columns\n"


def test_a_validation_is_shown_once_and_memory_in_the_unit_of_the_step_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {
        "event": "validation",
        "attempt": 1,
        "step": 10,
        "loss": 3.25,
        "time": "2026-11-24T06:01:00.000+00:00",
    }
    metrics = (trained(10, 4.5, memory_bytes=623_411_200), validated(10, 3.25))
    saved = {
        **validation,
        "event": "checkpoint",
        "bytes": 31_753_112,
        "seconds": 0.174,
        "checkpoint": "c",
        "stall_s": 0.03,
    }
    run_folder(tmp_path, "a", (START, validation, saved), metrics)
    assert runs.tail(tmp_path, "a", 9, follow=False) == 0
    told = capsys.readouterr().out
    assert told.count("validation") == 1 and "step 10  validation loss 3.2500 nats" in told and "mem 623 MB" in told
    assert "checkpoint  step 10  c: 31.8 MB in 0.174 s, training waited 0.03 s" in told
    assert runs.show(tmp_path, "a") == 0
    assert "memory 623 MB" in capsys.readouterr().out


def test_export_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    run_folder(tmp_path, "a", metrics=(trained(10, 4.5),))
    before = sorted(tmp_path.rglob("*"))
    assert str(tmp_path / "none" / "x.csv") in problem(runs.export, tmp_path, "a", tmp_path / "none" / "x.csv")
    assert "choose another file" in problem(runs.export, tmp_path, "a", tmp_path / "a")
    assert sorted(tmp_path.rglob("*")) == before


def test_export_without_metrics_is_refused(tmp_path: Path) -> None:
    run_folder(tmp_path, "a")
    assert "got none yet" in problem(runs.export, tmp_path, "a", None)


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20, "loss": 1.0}', "\udcc3"])
def test_a_line_being_written_is_left_out(tmp_path: Path, torn: str) -> None:
    folder = run_folder(tmp_path, "a", metrics=(trained(10, 4.5),))
    with open(folder / "metrics.rank0.jsonl", "ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert runs.read_run(folder).loss == 4.5


@pytest.mark.parametrize(
    "bad",
    [
        *(b"{", b"[1]", b"", b"\xff", b"[" * 100_000),
        *(b'{"loss": "high"}', b'{"loss": true}', b'{"loss": null}', b'{"attempt": []}'),
    ],
)
@pytest.mark.parametrize("read", ["show", "export"])
def test_any_other_bad_line_is_named(tmp_path: Path, bad: bytes, read: str) -> None:
    folder = run_folder(tmp_path, "a")
    file = folder / "metrics.rank0.jsonl"
    file.write_bytes(json.dumps(trained(10, 4.5)).encode() + b"\n" + bad + b"\n")
    call, *arguments = (runs.show, tmp_path, "a") if read == "show" else (runs.export, tmp_path, "a", None)
    assert problem(call, *arguments).startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (b"{", ["3.2500", "expected one JSON object, got b'{'; fix or delete the line"]),
        (b"\0\0\0", ["3.2500", "expected one JSON object, got b'\\x00\\x00\\x00'; fix or delete the line"]),
        (b"{\n[]", ["3.2500", "b'{'; fix or delete the line (and 1 more)"]),
        (b'{"loss": "high"}', ["unreadable", "loss: expected a number, got 'high'; fix or delete the line"]),
    ],
)
def test_a_damaged_run_is_listed_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes, told: list[str]
) -> None:
    run_folder(tmp_path, "whole", metrics=(trained(10, 4.5),))
    file = run_folder(tmp_path, "damaged") / "metrics.rank0.jsonl"
    lines = [json.dumps(each).encode() for each in (trained(10, 4.5), validated(10, 3.25))]
    file.write_bytes(b"\n".join([lines[0], lines[1], bad, b""]))
    assert runs.list_runs(tmp_path) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    found = {row.split()[0]: row for row in rows}
    assert set(found) == {"whole", "damaged"} and "4.5000" in found["whole"] and "!" not in found["whole"]
    assert f"! {file}:3: " in found["damaged"]
    assert all(part in found["damaged"] for part in told)


@pytest.mark.parametrize(
    "experts", [3, {}, {"layer": [1, 2], "cv": [0.5]}, {"layer": ["a"], "cv": [0.5]}, {"layer": [1], "cv": 0.5}]
)
def test_experts_that_fit_no_layers_are_named(tmp_path: Path, experts: Any) -> None:
    folder = run_folder(tmp_path, "a", metrics=(trained(10, 4.5, experts=experts),))
    where = f"{folder / 'metrics.rank0.jsonl'}:1: experts"
    assert problem(runs.export, tmp_path, "a", None).startswith(where)
    assert problem(runs.show, tmp_path, "a").startswith(where)


@pytest.mark.parametrize(
    "change", [{"time": "yesterday"}, {"time": None}, {"pid": "7"}, {"pid": -1}, {"steps": "many"}]
)
def test_a_bad_event_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = run_folder(tmp_path, "a", ({**START, **change},))
    assert problem(runs.show, tmp_path, "a").startswith(
        f"{folder / 'events.jsonl'}:1: {'expected the pid' if 'pid' in change else next(iter(change))}"
    )


@pytest.mark.parametrize("content", [None, b"= 3", b"\xff"])
def test_a_bad_provenance_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = run_folder(tmp_path, "a") / "provenance.toml"
    file.unlink() if content is None else file.write_bytes(content)
    assert problem(runs.show, tmp_path, "a").startswith(f"{file}: ")


def test_no_runs_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path, tmp_path / "absent"):
        assert "got none; start one with `nmoe run CONFIG`" in problem(runs.list_runs, root)
    assert f"expected the name of a run in {tmp_path / 'file'}, or a path" in problem(runs.show, tmp_path / "file", "a")


def test_an_unknown_name_suggests_one(tmp_path: Path) -> None:
    run_folder(tmp_path, "quickstart-1")
    assert problem(runs.show, tmp_path, "quikstart-1").endswith("did you mean quickstart-1?")
    assert problem(runs.show, tmp_path, "zebra").endswith(f"see `nmoe runs list --root {tmp_path}`")


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "a\\b", "..", ".", "", "a\0b"])
def test_a_path_that_is_no_run_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path starts from the current folder, never from the root."""
    run_folder(tmp_path, "outside")
    run_folder(tmp_path / "root", "a")
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    text = problem(runs.export, tmp_path / "root", name, None)
    assert "expected the name of a run in " in text or "expected config.toml of a run, got none" in text


def test_a_name_and_a_path_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "runs", "a", metrics=(trained(1, 1.5),))
    run_folder(tmp_path, "a", metrics=(trained(1, 2.5),))
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    for name in ("a", "runs/a", str(tmp_path / "runs" / "a"), "./a"):
        assert runs.export(Path("runs"), name, None) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] and "1.5" in told[0] and "2.5" in told[3]
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert runs.show(Path("runs"), ".", as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["latest"]["loss"]) == ("a", 1.5)


STRANGE = {
    "line\nbreak": b"",
    "paragraph\u2028separator": b"",
    "escape\x1b[2J": b"",
    "number": b"hardware = 3",
    "huge": b"[hardware]\nhost = 1e999",
}


@pytest.mark.parametrize("name", STRANGE)
def test_one_strange_folder_does_not_take_down_the_list(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "good", metrics=(trained(10, 4.5),))
    folder = run_folder(tmp_path, name)
    if STRANGE[name]:
        (folder / "provenance.toml").write_bytes(STRANGE[name])
    assert runs.list_runs(tmp_path) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and out.replace("\n", "").isprintable()
    assert "good" in out and name.encode("unicode_escape").decode() in out


@pytest.mark.parametrize(
    "metrics",
    [
        {**trained(10, 4.5), "elapsed_s": 1e300},
        {**trained(10, 4.5), "step": "inf"},
        {**trained(10, 4.5), "attempt": [1]},
        {**trained(10, 4.5), "loss": 10**400},
    ],
    ids=["elapsed", "step", "attempt", "loss"],
)
def test_one_strange_line_does_not_take_down_the_list(
    metrics: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "good", metrics=(trained(10, 4.5),))
    run_folder(tmp_path, "strange", ({**START, "steps": 10**400}, FINISHED), metrics=(metrics,))
    assert runs.list_runs(tmp_path) == 0
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]) == ["good", "strange"]


def test_tail_follows_through_a_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 25 of an attempt, of which the next one keeps 20: its own 21 to 25 are shown, the kept not again."""
    first = [trained(step, 4.5) for step in range(1, 26)]
    folder = run_folder(tmp_path, "a", ({**START, "pid": os.getpid()},), tuple(first))
    again = [*first[:20], *(trained(step, 4.0, attempt=2) for step in range(21, 26))]

    def resume(_: float) -> None:
        (folder / "metrics.rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))
        (folder / "events.jsonl").write_text(json.dumps(START) + "\n" + json.dumps(FINISHED) + "\n")

    monkeypatch.setattr(runs.time, "sleep", resume)
    assert runs.tail(tmp_path, "a", 3, follow=True) == 0
    steps = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.split()[2] == "step"]
    assert steps == ["23", "24", "25", "21", "22", "23", "24", "25"]
