"""Run folders of strangers: lines beyond every bound, files that are no files, text that steers a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nmoe.effects.record import lines as lines_of
from nmoe.effects.runs import show
from nmoe.effects.runs.track import follow
from nmoe.effects.runs.viz import curves, experts, export, machine, mixture, tables, views
from nmoe.effects.runs.viz.contract import to_json
from nmoe.effects.runs.viz.index import Index, open_index, poll
from nmoe.errors import InputError
from tests.effects.runs import viz_runs as runs

DIGITS = "9" * 5000
DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Whatever a test opens answers within 30 seconds."""

    def late(*_: object) -> None:
        raise TimeoutError("30 seconds without an answer")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def answers(index: Index, name: str) -> list[Callable[[], Any]]:
    """Everything the server can be asked about a run."""
    axes = [curves.Axis(x=x) for x in curves.AXES]
    return [
        lambda: views.runs(index, ["loss", "train.steps", "no such"]),
        *(lambda axis=axis: curves.series(index, [name], "loss", axis) for axis in axes),
        *(lambda axis=axis: views.events(index, [name], axis) for axis in axes),
        lambda: curves.series(index, [name], "loss", curves.Axis(points=100, log_x=True)),
        lambda: views.configs(index, [name]),
        lambda: views.evaluations(index, [name]),
        lambda: views.samples(index, [name]),
        lambda: experts.experts(index, name),
        *(lambda axis=axis: experts.layers(index, name, "entropy", axis) for axis in axes),
        lambda: experts.load(index, name, None),
        lambda: experts.load(index, name, 1 << 49),
        lambda: experts.load_history(index, name, 2),
        lambda: machine.timing(index, name),
        lambda: machine.gpus(index, name),
        lambda: mixture.mixture(index, name),
    ]


def ask_everything(index: Index, name: str) -> None:
    """Ask about a run as the server does: an answer that is JSON, or an error that a person understands."""
    for answer in answers(index, name):
        try:
            json.loads(to_json(answer()))
        except InputError:
            continue
    assert export.export(index, [name], "csv") and export.export(index, [name], "parquet")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.rank0", '{"attempt": 2147483647, "step": 9223372036854775807}'),
        ("metrics.rank0", '{"attempt": 1, "step": 9223372036854775807, "loss": 1.0, "elapsed_s": 1}'),
        ("metrics.rank0", '{"attempt": 2147483647, "step": 3, "loss": 1.0}'),
        ("metrics.rank0", '{"attempt": 1, "step": -9223372036854775808, "loss": 1.0}'),
        ("metrics.rank0", f'{{"attempt": 1, "step": {DIGITS}}}'),
        ("metrics.rank0", DEEP),
        ("metrics.rank1", '{"attempt": 2147483647, "step": 9223372036854775807, "time/data_s": 1}'),
        ("arrays.rank0", '{"attempt": 2147483647, "step": 9223372036854775807, "layers": [1], "load": [[1]]}'),
        ("telemetry.rank0", f'{{"attempt": 1, "elapsed_s": 1, "gpus": [{{"index": {DIGITS}}}], "host": {{}}}}'),
        ("telemetry.rank0", DEEP),
        ("events", f'{{"event": "sample", "text": {DIGITS}}}'),
        ("events", f'{{"event": "start", "pid": {DIGITS}}}'),
        ("events", f'{{"event": "mixture", "step": {DIGITS}}}'),
        ("events", f'{{"event": "validation", "loss": {DIGITS}}}'),
        ("events", f'{{"event": "gpus", "a": {DIGITS}}}'),
        ("events", DEEP),
        ("events", '{"event": "validation", "loss": NaN}'),
    ],
)
def test_a_line_beyond_every_bound_costs_that_line(tmp_path: Path, file: str, line: str) -> None:
    runs.finished(tmp_path, "good", steps=50)
    with open(runs.finished(tmp_path, "bad", steps=50) / f"{file}.jsonl", "a") as opened:
        opened.write(line + "\n")
    with open_index(tmp_path, None, threads=1) as index:
        assert poll(index).problems == ()
        rows = {run.name: run for run in views.runs(index, []).runs}
        assert (rows["good"].step, rows["bad"].step) == (50, 50)
        assert (rows["good"].bad_lines, rows["bad"].bad_lines) == (0, 1)
        ask_everything(index, "good")
        ask_everything(index, "bad")
    assert tables.compare(tmp_path, ["good", "bad"]) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"time": "infinity"},
        {"time": "294000-01-01T00:00:00Z"},
        {"time": "9999-12-31T23:59:59-14:00"},
        {"time": "0001-01-01T00:00:00+14:00"},
        {"elapsed_s": 1e308},
        {"elapsed_s": "inf"},
        {"elapsed_s": "nan"},
        {"tokens_global": 1e308},
        {"experts": {"layer": [1e308, "nan"], "entropy": ["inf", 1e308]}},
    ],
)
def test_a_number_beyond_its_bounds_is_no_number(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = runs.finished(tmp_path, "bad", steps=50)
    runs.append(
        folder / "metrics.rank0.jsonl",
        [{**runs.metrics(step, attempt), **fields} for attempt, step in ((1, 61), (2, 62), (3, 63))],
    )
    runs.append(folder / "telemetry.rank0.jsonl", [{**runs.telemetry(61), **fields}])
    runs.append(folder / "events.jsonl", [{**runs.event("start", 61, pid=1, steps=63), **fields}])
    runs.append(folder / "arrays.rank0.jsonl", [{"step": 61, "layers": [1], "load": [[1]], **fields}])
    with open_index(tmp_path, None, threads=1) as index:
        assert poll(index).problems == ()
        ask_everything(index, "bad")
        assert next(run.step for run in views.runs(index, []).runs) == 63


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        f'{{"attempt": {DIGITS}, "steps": {DIGITS[:4000]}}}',
        f'{{"steps": {DIGITS[:4000]}, "attempt": 1e999, "layers": [1e999], "num_experts": {DIGITS[:400]}}}',
        '{"steps": NaN, "flops_per_token": Infinity}',
        '{"status": "running", "pid": 1, "heartbeat": "9999-12-31T23:59:59-14:00", "heartbeat_every_s": 1}',
        '{"status": "running", "pid": 1, "heartbeat": "0001-01-01T00:00:00+14:00", "heartbeat_every_s": 1}',
        '{"status": "running", "host": "elsewhere", "heartbeat": "2026-01-01", "heartbeat_every_s": 1e999}',
        '{"status": {"a": 1}, "pid": true, "host": [], "process_start": 7, "layers": {"a": []}}',
        '{"flops_per_token": 1e308, "tokens_per_step": 1e308}',
        "[]",
    ],
)
def test_a_run_record_beyond_every_bound_is_one_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    runs.finished(tmp_path, "good", steps=50)
    (runs.finished(tmp_path, "bad", steps=50) / "run.json").write_text(content)
    assert show.list_runs(tmp_path) == 0 and show.show(tmp_path, "bad") == 0
    assert "50/50" in capsys.readouterr().out
    with open_index(tmp_path, None, threads=1) as index:
        poll(index)
        ask_everything(index, "bad")
        ask_everything(index, "good")


def test_layers_whose_numbers_are_infinite_are_not_taken(tmp_path: Path) -> None:
    folder = runs.finished(tmp_path, "bad", steps=50)
    (folder / "run.json").write_text("{}")
    path = folder / "metrics.rank0.jsonl"
    path.write_text(path.read_text().replace('"layer": [1, 2, 3]', '"layer": [1, 2, "inf"]'))
    with open_index(tmp_path, None, threads=1) as index:
        poll(index)
        assert experts.experts(index, "bad").layers == [1, 2, 3], "those of the loads"


@pytest.mark.parametrize("name", ["config.toml", "provenance.toml"])
@pytest.mark.parametrize(
    "content", ["a = " + "[" * 100_000, f"a = 0x{'f' * 20_000}", "a = inf\nb = nan", ".".join("a" * 5000) + " = 1"]
)
def test_toml_beyond_every_bound_is_named(tmp_path: Path, name: str, content: str) -> None:
    runs.finished(tmp_path, "good", steps=50)
    (runs.finished(tmp_path, "bad", steps=50) / name).write_text(content)
    assert show.list_runs(tmp_path) == 0
    with open_index(tmp_path, None, threads=1) as index:
        poll(index)
        ask_everything(index, "bad")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("events.jsonl", {"event": "start", "pid": 1, "time": "9999-12-31T23:59:59-14:00"}),
        ("events.jsonl", {"event": "start", "pid": 1, "time": "0001-01-01T00:00:00+14:00"}),
        ("events.jsonl", {"event": "start", "pid": 1, "steps": "inf", "time": runs.at(0)}),
        ("metrics.rank0.jsonl", {"step": "nan", "elapsed_s": "inf"}),
        ("metrics.rank0.jsonl", {"step": 1, "elapsed_s": 1e300}),
    ],
)
def test_a_field_that_no_calendar_and_no_count_holds_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, change: dict[str, Any]
) -> None:
    runs.finished(tmp_path, "good", steps=50)
    folder = runs.folder(tmp_path, "bad")
    runs.append(folder / file, [change])
    assert show.list_runs(tmp_path) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad")]
    assert f"{folder / file}:1: " in row
    with pytest.raises(InputError, match=f"{file}:1: "):
        show.show(tmp_path, "bad")


def test_gpus_whose_numbers_are_none_are_counted(tmp_path: Path) -> None:
    lines = [{"gpus": [{"index": "x"}, {"index": 1}, {"index": None}]}]
    runs.append(runs.folder(tmp_path, "bad") / "telemetry.rank0.jsonl", lines)
    with open_index(tmp_path, None, threads=1) as index:
        poll(index)
        assert [gpu.index for gpu in machine.gpus(index, "bad").gpus] == [0, 1, 2]


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("gone"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", [*SPECIAL, "socket"])
@pytest.mark.parametrize(
    "name",
    ["metrics.rank0.jsonl", "events.jsonl", "telemetry.rank0.jsonl", "run.json", "provenance.toml", "config.toml"],
)
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    runs.finished(tmp_path, "good", steps=50)
    folder = runs.finished(tmp_path, "bad", steps=50)
    (folder / name).unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "socket":
            monkeypatch.chdir(folder)
            bound.bind(name)
        else:
            SPECIAL[kind](folder / name)
        assert show.list_runs(tmp_path) == 0
        rows = capsys.readouterr().out
        assert "good" in rows and (name == "config.toml" or "bad" in rows)
        with open_index(tmp_path, None, threads=1) as index:
            for _ in range(2):
                poll(index)
            assert {run.name: run.step for run in views.runs(index, []).runs}["good"] == 50
            ask_everything(index, "good")
            if name != "config.toml":
                ask_everything(index, "bad")


ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def test_text_from_files_never_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = runs.finished(tmp_path, f"bad{ESCAPE}\n\u2028".replace("/", ""), steps=20)
    runs.append(
        bad / "events.jsonl",
        [
            runs.event(f"e{ESCAPE}", 1, **{f"key{ESCAPE}": ESCAPE, "more": {"a": ESCAPE}, "list": [ESCAPE]}),
            runs.event("end", 200, status=f"failed{ESCAPE}", error=f"no{ESCAPE}\nmore"),
        ],
    )
    runs.append(
        bad / "metrics.rank0.jsonl",
        [
            {**runs.metrics(21), f"tag{ESCAPE}": 1.0, "experts": {"layer": [1], f"q{ESCAPE}": [1.0]}},
            {"step": 22, "time": ESCAPE, f"validation/{ESCAPE}": ESCAPE},
        ],
    )
    (bad / "provenance.toml").write_text(f'command = "run {json.dumps(ESCAPE)[1:-1]}"\n[hardware]\nhost = "h"\n')
    (bad / "config.toml").write_text(f'a = "{json.dumps(ESCAPE)[1:-1]}"\n')
    runs.finished(tmp_path, "good", steps=20)
    assert show.list_runs(tmp_path) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    show.show(tmp_path, bad.name)
    show.tail(tmp_path, bad.name, 1000, False)
    show.export(tmp_path, bad.name, None)
    tables.compare(tmp_path, [bad.name, "good"])
    tables.compact(tmp_path, bad.name)
    out = capsys.readouterr().out
    assert "owned" in out and not [c for c in out if not c.isprintable() and c != "\n"]


def test_a_name_that_is_no_text_is_left_out_by_the_dashboard_and_shown_by_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.finished(tmp_path, "good", steps=20)
    runs.finished(tmp_path, "bad\udcff", steps=20)
    assert show.list_runs(tmp_path) == 0
    assert "bad\\udcff" in capsys.readouterr().out
    with open_index(tmp_path, None, threads=1) as index:
        (problem,) = poll(index).problems
        assert problem.startswith("'bad\\udcff': expected a name in UTF-8")
        assert [run.name for run in views.runs(index, []).runs] == ["good"]


VALUES = (
    *("null", "true", "[]", "{}", '""', "-1", "0", "1e308", "-1e308", "1e-320", "1e999", "NaN", '"nan"', '"-inf"'),
    *(str(1 << 31), str(1 << 40), str(1 << 63), str((1 << 63) - 1), "9" * 400, DIGITS, "[" * 200 + "]" * 200),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"9999-12-31T23:59:59-14:00"', '"infinity"', '[["a"], 1e300, {}]'),
)
"""What takes the place of a value."""


def mutated(line: str, source: random.Random) -> bytes:
    """A line with some values or keys replaced, or some bytes flipped, taken out or doubled."""
    if source.random() < 0.6:
        parts = re.split(r'("[^"]*"|-?\d[\d.e+-]*|true|null)', line)
        for place in source.sample(range(1, len(parts), 2), k=min(len(parts) // 2, source.randint(1, 3))):
            is_key = place + 1 < len(parts) and parts[place + 1].startswith(":")
            parts[place] = (
                source.choice([part for part in parts[1::2] if part[0] == '"'])
                if is_key
                else (source.choice([*VALUES, *parts[1::2]]))
            )
        return "".join(parts).encode()
    content = bytearray(line.encode())
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(content))
        action = source.randrange(3)
        if action == 0:
            content[place] ^= 1 << source.randrange(8)
        elif action == 1:
            del content[place : place + source.randint(1, 40)]
        else:
            content[place:place] = content[place : place + source.randint(1, 40)]
        content = content or bytearray(b"{")
    return bytes(content).replace(b"\n", b" ")


def check_mutants(root: Path, seed: int, count: int) -> None:
    """Mutate `count` lines of a run's files, two thirds of them its lines of JSON; read all in every way there is."""
    source = random.Random(seed)
    runs.finished(root, "good", steps=50)
    folder = runs.finished(root, "bad", steps=50)
    names = [file for file in sorted(os.listdir(folder)) if file.endswith(".jsonl")]
    whole = {name: (folder / name).read_text().splitlines() for name in names}
    for name in names:
        lines = [mutated(source.choice(whole[name]), source) for _ in range(count // (len(names) + 3))]
        (folder / name).write_bytes(b"\n".join([whole[name][0].encode(), *lines, whole[name][-1].encode(), b""]))
    with open_index(root, None, threads=1) as index:
        assert not [problem for problem in poll(index).problems if "tags" not in problem]
        ask_everything(index, "good")
        ask_everything(index, "bad")
        assert {run.name: run.step for run in views.runs(index, []).runs}["good"] == 50
        files = {name: (folder / name).read_text() for name in ("run.json", "provenance.toml", "config.toml")}
        for name, text in files.items():
            for _ in range(count // (len(names) + 3)):
                (folder / name).write_bytes(mutated(text, source))
                views.runs(index, ["optim.peak_lr"])
                views.configs(index, ["bad", "good"])
                experts.experts(index, "bad")
            (folder / name).write_text(text)
    problems: list[str] = []
    show.list_runs(root)
    for name in names:
        list(lines_of.read(folder / name, problems.append))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: show.show(root, "bad"),
        lambda: show.tail(root, "bad", 100, False),
        lambda: follow.new_lines(folder / "metrics.rank0.jsonl", follow.Position()),
    )
    for call in calls:
        with contextlib.suppress(InputError):
            call()


def test_mutated_run_folders_answer_or_say_what_is_wrong(tmp_path: Path) -> None:
    check_mutants(tmp_path, seed=20261128, count=110)
