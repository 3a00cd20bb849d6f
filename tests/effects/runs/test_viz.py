"""The index, the answers and the server of the viewer, on real files: growing, torn, replaced, resumed, hostile."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.client
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from nmoe.effects.runs import status as run_status
from nmoe.effects.runs.viz import api, curves, experts, export, folder, machine, mixture, views, words
from nmoe.effects.runs.viz.contract import contract
from nmoe.effects.runs.viz.index import Index, known, open_index, poll, query, tags
from nmoe.errors import InputError
from nmoe.pure.data.order import source_at, turns
from nmoe.pure.watch import curve as thinning
from nmoe.pure.watch import metrics as schema
from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_server import Server, serving

STATIC = Path(api.__file__).parent / "static"
IMPORTED = re.compile(r'from "\./([\w./-]+)"')


@contextmanager
def indexed(root: Path, file: Path | None = None) -> Iterator[Index]:
    """An index that knows all of `root`."""
    with open_index(root, file, threads=1) as index:
        read_all(index)
        yield index


def read_all(index: Index) -> None:
    while poll(index).read_bytes:
        pass


def table(index: Index) -> dict[str, api.Run]:
    return {run.name: run for run in views.runs(index, []).runs}


def curve(index: Index, name: str, tag: str = "loss", **axis: Any) -> dict[float, float | None]:
    series = curves.series(index, [name], tag, curves.Axis(**axis))
    return dict(zip(series.x, series.curves[0].mean, strict=True)) if series.curves else {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each kind."""
    path = tmp_path_factory.mktemp("runs")
    runs.everything(path)
    return path


@pytest.fixture(scope="module")
def index(root: Path) -> Iterator[Index]:
    with indexed(root) as opened:
        yield opened


def test_each_run_has_its_status_and_its_numbers(index: Index) -> None:
    rows = table(index)
    assert {name: row.status for name, row in rows.items()} == {
        "finished": "finished",
        "resumed": "running",
        "nan-loss": "failed",
        "crashed": "crashed",
        "lost": "lost",
        "bare": "not started",
    }
    finished = rows["finished"]
    assert (finished.step, finished.steps, finished.tokens) == (200, 200, 200 * runs.TOKENS)
    assert (finished.loss, finished.validation_loss) == (runs.loss(200), runs.loss(200) + 0.1)
    assert (finished.alerts, finished.bad_lines, finished.elapsed_s) == (1, 0, 100.0)
    assert (rows["resumed"].attempt, rows["resumed"].elapsed_s) == (2, 50 + 35)
    assert (rows["nan-loss"].loss, rows["nan-loss"].nonfinite) == ("nan", 1)
    assert (rows["crashed"].step, rows["crashed"].bad_lines) == (40, 1)
    assert (rows["bare"].step, rows["bare"].loss) == (None, None)


def test_columns_of_the_table_are_config_keys_and_tags(index: Index) -> None:
    answer = views.runs(index, ["optim.peak_lr", "grad_norm", "no such"])
    rows = {run.name: run.columns for run in answer.runs}
    assert rows["resumed"] == {"optim.peak_lr": 0.002, "grad_norm": runs.metrics(150)["grad_norm"], "no such": None}
    assert "optim.peak_lr" in answer.keys and "loss" in answer.tags


def test_the_page_knows_metrics_from_the_schema_that_the_server_sends(index: Index) -> None:
    answer = views.runs(index, [])
    metrics = {metric.name: metric for metric in answer.metrics}
    assert [metrics[tag].name for tag in answer.tags] == answer.tags and set(answer.tags) == set(tags(index))
    assert answer.tags[:4] == ["loss", "grad_norm", "lr/dense", "tokens_per_s"], "in the order of the schema"
    assert answer.tags[-1] == "exchange/bytes_per_s", "what the schema does not know is last"
    assert (metrics["loss"].unit, metrics["mfu"].format, metrics["lr/dense"].kind) == ("nats/token", "percent", "value")
    assert (metrics["tokens_per_s"].format, metrics["exchange/bytes_per_s"].format) == ("count", "number")
    assert metrics["experts/cv"].doc == schema.metric("experts/cv").doc  # type: ignore[union-attr]
    assert all(hasattr(answer.runs[0], column.name) for column in answer.shown)
    page = "".join(path.read_text() for path in STATIC.glob("*.js"))
    names = {entry.name for entry in schema.METRICS if entry.kind != "place"}
    assert [name for name in names if f'"{name}"' in page or f'"{name.removeprefix("experts/")}"' in page] == []
    assert metrics["experts/dead"].bad_above == 0 and metrics["experts/cv"].bad_above is None


def test_a_resumed_run_is_one_curve_of_the_newest_attempt(index: Index) -> None:
    assert curve(index, "resumed") == {step: runs.loss(step) for step in range(1, 151)}


def test_hours_go_on_where_the_attempt_before_ended(index: Index) -> None:
    places = list(curve(index, "resumed", x="time"))
    assert places == sorted(places) and places[-1] == pytest.approx((50 + 35) / 3600)


def test_a_spike_of_one_step_survives_thinning(index: Index) -> None:
    series = curves.series(index, ["finished"], "loss", curves.Axis(points=100))
    (thin,) = series.curves
    assert len(series.x) == 100
    assert max(v for v in thin.high if v is not None) == runs.loss(77)
    assert max(v for v in thin.mean if v is not None) < runs.loss(77)


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """Two long runs of noise with values that are not finite; the second resumed, its last steps told twice.

    1009 steps lie between the first and the last, a prime: no step is on a border between two cells.
    """
    source = random.Random(3)
    path = tmp_path_factory.mktemp("rough")
    for name, first in (("a", 1), ("b", 301)):
        lines = [
            {"attempt": 1, "step": step, "elapsed_s": step / 2, "tokens_global": step * 64.0, "loss": noise(source)}
            for step in range(first, 1011)
        ]
        runs.append(runs.folder(path, name) / "metrics.rank0.jsonl", lines)
    lines = [{"attempt": 2, "step": step, "loss": noise(source)} for step in range(900, 1011)]
    runs.append(path / "b" / "metrics.rank0.jsonl", lines)
    with indexed(path) as opened:
        yield opened


def noise(source: random.Random) -> float | str:
    return source.choice(["nan", "inf", "-inf"]) if source.random() < 0.1 else source.gauss(0, 1)


@pytest.mark.parametrize(
    "axis",
    [
        {},
        {"log_x": True},
        {"x": "tokens"},
        {"bands": False},
        {"low": 2.5, "high": 700.25, "points": 130},
        {"low": 0.25, "high": 1e6},
    ],
)
def test_what_the_index_thins_is_what_thinning_its_points_gives(rough: Index, axis: dict[str, Any]) -> None:
    told: dict[str, Any] = {"points": 100} | axis
    asked = curves.Axis(**told)
    series = curves.series(rough, ["b", "a"], "loss", asked)
    numbers = known(rough, ["b", "a"])
    points = curves.points(rough, numbers, tags(rough)["loss"], asked)
    low = asked.low or min(x[0] for x, _, _ in points.values())
    high = asked.high or max(x[-1] for x, _, _ in points.values())
    assert len(series.x) == asked.points
    for found, run in zip(series.curves, numbers, strict=True):
        x, step, y = points[run]
        assert len(set(step)) == len(step), "each step once"
        borders = thinning.edges(low, high, asked.points, log=asked.log_x)
        wanted = thinning.thin(x, y, y, borders)
        assert found.mean == pytest.approx(api.numbers(wanted.mean), abs=1e-12)
        assert (found.low, found.high) == (
            (api.numbers(wanted.low), api.numbers(wanted.high)) if asked.bands else ([], [])
        )
        assert found.nonfinite == wanted.nonfinite.tolist() and len(found.nonfinite) > 10
        assert found.last == api.plain(float(y[(x >= low) & (x <= high)][-1])), "as logged, not a mean of its cell"


def test_what_is_not_finite_is_marked_where_it_was(index: Index) -> None:
    (broken,) = curves.series(index, ["nan-loss"], "loss", curves.Axis(smooth=5.0)).curves
    assert broken.nonfinite == [float(step) for step in range(61, 71)]
    assert broken.last == "nan"
    assert broken.mean[60:] == [None] * 10 == broken.smooth[60:]


def test_every_axis(index: Index) -> None:
    for x, last in (("step", 200), ("tokens", 200 * runs.TOKENS), ("flops", 200 * runs.TOKENS * 6e6), ("time", 1 / 36)):
        places = list(curve(index, "finished", x=x))
        assert places[-1] == pytest.approx(last)
    validations = curve(index, "finished", tag="validation/loss", x="tokens")
    assert list(validations) == [step * runs.TOKENS for step in (50, 100, 150, 200)], (
        "lines without tokens have a place"
    )
    assert curves.series(index, ["bare", "crashed"], "loss", curves.Axis(x="flops")).without == ["bare", "crashed"]


def test_a_zoom_shows_what_lies_in_it(index: Index) -> None:
    assert list(curve(index, "finished", low=40.5, high=44.0)) == [41, 42, 43, 44]
    assert curve(index, "finished", low=500.0, high=600.0) == {}
    assert curves.series(index, ["finished"], "loss", curves.Axis(points=50, log_x=True)).x[0] < 2


def test_events_have_their_place_on_the_axis(index: Index) -> None:
    told = {event.event: event for event in views.events(index, ["finished"], curves.Axis(x="tokens")).events}
    assert told["checkpoint"].x == 50 * runs.TOKENS
    assert (told["alert"].severity, told["alert"].text) == ("warning", "layer 2: 1 expert is dead")
    failed = {event.event: event for event in views.events(index, ["nan-loss"], curves.Axis()).events}
    assert (failed["end"].severity, failed["nonfinite"].severity, failed["nonfinite"].x) == ("error", "error", 61)


def test_configs_side_by_side(index: Index) -> None:
    answer = views.configs(index, ["finished", "resumed"])
    assert [(row.key, row.values) for row in answer.rows if row.differs] == [("optim.peak_lr", [0.001, 0.002])]


def test_layers_and_loads_are_those_that_were_logged(index: Index) -> None:
    about = experts.experts(index, "finished")
    assert (about.layers, about.num_experts, about.top_k) == (runs.LAYERS, runs.EXPERTS, 2)
    assert about.steps == list(range(10, 201, 10)) and about.latest["dead"] == [0, 1, 0]
    assert experts.load(index, "finished", None).load == [runs.loads(200, layer) for layer in runs.LAYERS]
    assert experts.load(index, "finished", 62).step == 60
    history = experts.load_history(index, "finished", 2)
    assert (history.rows[-1], history.load[-1][5]) == (200, 0) and history.load[0] == runs.loads(10, 2)
    entropy = experts.layers(index, "finished", "entropy", curves.Axis())
    assert entropy.values[2][99] == 2.7 - 0.001 * 100 - 0.01 * 3
    with pytest.raises(InputError, match="crashed: expected loads of its experts, got none"):
        experts.load(index, "crashed", None)


def test_curves_of_layers_reach_the_last_step_at_each_cadence(index: Index, tmp_path: Path) -> None:
    steps = experts.layers(index, "finished", "entropy", curves.Axis(points=160)).x
    assert steps[-1] > 199 and len(steps) == 160, "200 steps of 3 layers in 160 cells"
    many = runs.folder(tmp_path, "many")
    lines = [runs.metrics(step) for step in range(10, 4010, 10)]
    for line in lines:
        line["experts"] = {"layer": list(range(26)), "entropy": [0.1 * layer + line["step"] for layer in range(26)]}
    runs.append(many / "metrics.rank0.jsonl", lines)
    with indexed(tmp_path) as opened:
        entropy = experts.layers(opened, "many", "entropy", curves.Axis())
    assert entropy.x == [float(line["step"]) for line in lines]
    assert [values[-1] for values in entropy.values] == [0.1 * layer + 4000 for layer in range(26)]


def test_only_a_checkpoint_in_the_folder_of_the_run_is_listed(tmp_path: Path) -> None:
    names = ("../../b/checkpoints/step-00000001.0001-0001", "..", "", "step-00000002.0001-0001", 7, None)
    for place in ("a", "b"):
        saved = runs.folder(tmp_path, place) / "checkpoints" / "step-00000001.0001-0001"
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text("{}")
    events = [runs.event("checkpoint", 1, step=1, checkpoint=name) for name in names]
    runs.append(tmp_path / "a" / "events.jsonl", [*events, runs.event("checkpoint", 2, step=1, checkpoint=saved.name)])
    with indexed(tmp_path) as index:
        told = folder.checkpoints(index, "a")
    assert [each.name for each in told.checkpoints] == [saved.name] and told.deleted == 1
    assert told.checkpoints[0].command.endswith(f"--train.resume={tmp_path}/a/checkpoints/{saved.name}")
    assert (told.checkpoints[0].validation_loss, told.checkpoints[0].size_bytes) == (None, None)


def test_the_console_is_its_end_in_whole_lines(tmp_path: Path) -> None:
    path = runs.folder(tmp_path, "a") / "console.log"
    with indexed(tmp_path) as index:
        assert not folder.console(index, "a").is_there
        path.write_bytes(b"one\xff\r\nold\rnew\n\x1b[31mred\x1b[0m")
        assert folder.console(index, "a").lines == ["one\ufffd", "new", "red"]
        path.write_text("".join(f"{number:07d}\n" for number in range(100_000)))
        told = folder.console(index, "a")
        assert told.lines[-1] == "0099999" and len(told.lines) < 40_000
        assert told.left_out_bytes == 8 * int(told.lines[0]), "the first line that is shown is whole"
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match=r"console.log: expected a file to read, got no regular file"):
            folder.console(index, "a")


EVENTS = ("start", "end", "checkpoint", "checkpoint_skipped", "validation", "sample", "mixture", "gpus", "resume", "x")
FIELDS = (
    "parameters",
    "bytes",
    "seconds",
    "loss",
    "tokens",
    "sources",
    "accepted",
    "new",
    "error",
    "status",
    "prompt",
    "left_out",
    "reached",
)


@pytest.mark.parametrize("event", [*EVENTS, "nonfinite", "checkpoint_failed", "spike", "rewind"])
def test_any_event_has_words(event: str) -> None:
    """Fields may be missing or of any type: a stranger wrote them."""
    for value in (None, True, "x", 1e308, 1 << 62, [], [{}], {}, {"a": {"b": []}}):
        assert isinstance(words.text(event, dict.fromkeys(FIELDS, value)), str)
    assert isinstance(words.text(event, {}), str)
    assert words.text(event, {"message": "as it says"}) == "as it says"


def test_a_rewind_and_a_spike_are_told_by_their_numbers() -> None:
    rewind = {"step": 100, "reached": 1250, "left_out": [[800, 9000], [20_000, 20_010]]}
    assert words.text("rewind", rewind) == "from step 1,250: 8,210 sequences are left out"
    scores = {"bits/code": {"value": 2.5, "error": 0.1, "count": 6}, "of a stranger": 3}
    assert words.text("evaluation", {"scores": scores}) == "bits/code 2.5000"
    assert words.text("spike", {"new": 2}) == "2 more skipped, far above recent losses or gradient norms"


def test_the_slowest_rank_is_named(index: Index) -> None:
    told = machine.timing(index, "finished")
    assert (len(told.ranks), told.slowest, told.steps) == (4, 2, 50)
    assert told.ranks[2].parts_s[told.parts.index("data")] == pytest.approx(0.11)
    assert told.parts == ["data", "forward", "backward", "reduce", "optimizer"], "in the order of a step"
    assert machine.timing(index, "crashed").slowest is None


@pytest.mark.parametrize("part", ["gather", "exchange", "reduce"])
def test_a_rank_that_waits_is_not_the_slowest(tmp_path: Path, part: str) -> None:
    """Rank 1 waits longest."""
    path = runs.folder(tmp_path, "two")
    for rank, (forward, waited) in enumerate([(0.2, 0.0), (0.1, 0.3)]):
        line = {"attempt": 1, "step": 1, "time/forward_s": forward, f"time/{part}_s": waited}
        runs.append(path / f"metrics.rank{rank}.jsonl", [line])
    with indexed(tmp_path) as index:
        assert machine.timing(index, "two").slowest == 0


def test_gpus_are_what_the_telemetry_says(index: Index) -> None:
    told = machine.gpus(index, "finished")
    assert (told.driver, told.cuda, len(told.gpus)) == ("570.86.15", "12.8", 2)
    assert (told.gpus[1].utilization, told.gpus[1].throttle) == (91, ["sw_power_cap"])
    power = next(each for each in told.curves if each.quantity == "power_w")
    assert power.values[0][:2] == [600.5, 600.5 + 10 % 7] and power.names == ["GPU 0", "GPU 1"]
    assert machine.gpus(index, "bare").gpus == []


@pytest.mark.parametrize(
    ("name", "step", "position"),
    [("finished", 200, 200 * 8), ("resumed", 150, 640 + 70 * 4)],
)
def test_what_was_read_of_a_mixture_follows_from_the_step(index: Index, name: str, step: int, position: int) -> None:
    told = mixture.mixture(index, name)
    read: Counter[tuple[str, str]] = Counter()
    first = 0
    for stage, quotas in runs.STAGES.items():
        order = turns(quotas)
        for place in range(first, min(position, first + sum(quotas))):
            read[stage, ("web", "code", "books")[source_at(order, place - first)[0]]] += 1
        first += sum(quotas)
    assert told.step == step
    assert {(each.stage, each.name): each.read for each in told.sources if each.read} == {
        key: 128 * count for key, count in read.items()
    }
    rows = {(each.stage, each.name): each for each in told.sources}
    assert list(rows) == [("pretrain", "web"), ("pretrain", "code")] + [
        ("anneal", source) for source in ("web", "code", "books")
    ]
    code = rows["pretrain", "code"]
    assert (code.planned, code.planned_share) == (300 * 128, 0.25)
    assert code.passes == read["pretrain", "code"] / 400 and code.read_share == pytest.approx(0.25, abs=0.01)
    assert (rows["anneal", "web"].read_share is None) == (position < 1200)


@pytest.mark.parametrize("step", [10, 40, 100, 151, 160, 200])
def test_what_a_rewind_left_out_counts_as_not_read(tmp_path: Path, step: int) -> None:
    """Counted window by window: 8 a step, and two stretches that nobody reads, the second over the end of a stage."""
    left_out = [[80, 240], [1100, 1300]]
    path = runs.folder(tmp_path, "rewound")
    runs.append(path / "events.jsonl", [runs.mixture(0.0, left_out=left_out)])
    runs.append(path / "metrics.rank0.jsonl", [runs.metrics(step)])
    with indexed(tmp_path) as index:
        rows = mixture.mixture(index, "rewound").sources
    read: Counter[tuple[str, str]] = Counter()
    without: Counter[tuple[str, str]] = Counter()
    first = position = 0
    for stage, quotas in runs.STAGES.items():
        order = turns(quotas)
        for place in range(sum(quotas)):
            key = stage, ("web", "code", "books")[source_at(order, place)[0]]
            if any(begin <= first + place < end for begin, end in left_out):
                without[key] += 1
            elif position < 8 * step:
                read[key] += 1
                position += 1
        first += sum(quotas)
    assert position == 8 * step
    assert {(row.stage, row.name): (row.read, row.left_out) for row in rows} == {
        (row.stage, row.name): (128 * read[row.stage, row.name], 128 * without[row.stage, row.name]) for row in rows
    }


@pytest.mark.parametrize(
    "broken",
    [
        {"stages": []},
        {"stages": [{"name": "a", "windows": [1, 2]}]},
        {"stages": [{"name": "a", "windows": [0, 0, 0]}]},
        {"stages": [{"name": "a", "windows": [1, -1, 1]}]},
        {"stages": [{"name": "a", "windows": [1, 2, "x"]}]},
        {"stages": [{"name": "a", "windows": [1, 1, 1]}] * 5000},
        {"stages": 5},
        {"sources": [{"name": "a", "windows": 0}] * 3},
        {"sources": None},
        {"cursor": None},
        {"step": 1.5},
        {"batch_size": True},
        {"left_out": 5},
        {"left_out": [[3, 3]]},
        {"left_out": [[8, 16], [0, 8]]},
        {"left_out": [[0, 9], [8, 16]]},
        {"left_out": [[0, 1 << 40]]},
        {"left_out": [[0]]},
        {"left_out": [[0, 1]] * 2000},
    ],
)
def test_a_plan_that_is_none_is_told(tmp_path: Path, broken: dict[str, Any]) -> None:
    runs.append(runs.folder(tmp_path, "a") / "events.jsonl", [runs.mixture(0.0, **broken)])
    with indexed(tmp_path) as index, pytest.raises(InputError, match="a: expected an event `mixture` with the quotas"):
        mixture.mixture(index, "a")


def test_a_run_of_one_source_has_no_mixture(index: Index) -> None:
    assert mixture.mixture(index, "crashed").sources == []


def test_export_has_every_step_once(index: Index) -> None:
    rows = list(csv.DictReader(io.StringIO(export.export(index, ["resumed"], "csv").decode())))
    assert [int(row["step"]) for row in rows] == list(range(1, 151))
    assert [float(row["loss"]) for row in rows] == [runs.loss(step) for step in range(1, 151)]
    assert {row["attempt"] for row in rows[80:]} == {"2"}


def test_parquet_reads_back(root: Path, index: Index, tmp_path: Path) -> None:
    file = tmp_path / "it's.parquet"
    export.write_(file, index, ["finished"], "parquet")
    found = duckdb.connect().execute("select max(step), max(loss) from read_parquet(?)", [str(file)]).fetchone()
    assert found == (200, max(runs.loss(step) for step in range(1, 201)))


def test_a_line_being_written_waits_for_its_end(tmp_path: Path) -> None:
    path = runs.folder(tmp_path, "a") / "metrics.rank0.jsonl"
    whole = json.dumps(runs.metrics(1)) + "\n"
    with indexed(tmp_path) as index:
        for cut in (1, len(whole) // 2, len(whole) - 1):
            path.write_text(whole[:cut])
            assert poll(index).read_bytes == 0 and poll(index).left_bytes == 0
        with open(path, "a") as file:
            file.write(whole[len(whole) - 1 :])
        assert poll(index).grown == ("a",)
        assert curve(index, "a") == {1: runs.loss(1)} and table(index)["a"].bad_lines == 0


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = runs.folder(tmp_path, "a") / "metrics.rank0.jsonl"
    runs.append(path, (runs.metrics(step) for step in range(1, 1001)))
    with indexed(tmp_path, tmp_path / "index") as index:
        runs.append(path, [runs.metrics(1001)])
        assert poll(index).read_bytes == len(json.dumps(runs.metrics(1001))) + 1
    with open_index(tmp_path, tmp_path / "index") as index:
        assert poll(index).read_bytes == 0
        assert len(curve(index, "a", points=2000)) == 1001


def test_a_file_that_shrank_a_folder_that_went_and_one_that_came_back(tmp_path: Path) -> None:
    folder = runs.folder(tmp_path, "a")
    runs.append(folder / "metrics.rank0.jsonl", (runs.metrics(step) for step in range(1, 11)))
    with indexed(tmp_path) as index:
        (folder / "metrics.rank0.jsonl").write_text(json.dumps(runs.metrics(7)) + "\n")
        read_all(index)
        assert list(curve(index, "a")) == [7]
        shutil.rmtree(folder)
        assert poll(index).gone == ("a",)
        assert table(index) == {} and query(index, "select count(*) from metrics") == [(0,)]
        with pytest.raises(InputError, match="run: expected the name of a run here, got 'a'"):
            curves.series(index, ["a"], "loss", curves.Axis())
        runs.append(runs.folder(tmp_path, "a") / "metrics.rank0.jsonl", [runs.metrics(3)])
        read_all(index)
        assert list(curve(index, "a")) == [3]


@pytest.mark.parametrize("again", [3, 4, 5, 8])
def test_a_resumed_run_that_cut_its_file_and_wrote_on_between_two_looks(tmp_path: Path, again: int) -> None:
    """Killed after step 6, resumed at 2: by the next look the file may be as long as it was, or longer."""
    path = runs.folder(tmp_path, "a") / "metrics.rank0.jsonl"
    lines = [json.dumps(runs.metrics(step)) + "\n" for step in range(1, 7)]
    path.write_text("".join(lines))
    with indexed(tmp_path) as index:
        os.truncate(path, len("".join(lines[:2])))
        runs.append(path, (runs.metrics(step, 2, 1.0, loss=50.0 + step) for step in range(3, 3 + again)))
        read_all(index)
        assert table(index)["a"].bad_lines == 0
        assert curve(index, "a") == {step: runs.loss(step) if step < 3 else 50.0 + step for step in range(1, 3 + again)}


def test_hostile_lines_are_counted_and_harm_nothing(tmp_path: Path) -> None:
    folder = runs.folder(tmp_path, "a'; drop table runs; --")
    hostile = [
        "\x00\x01",
        "[" * 5000,
        '{"step": "x"}',
        '{"step": 1e400}',
        '{"step": -1, "loss": {"a": 1}}',
        '{"step": 2, "a\\"; drop table metrics; --": 5, "Loss": 1, "loss": 2, "": 3}',
        "7",
        "null",
        '{"step": 3, "experts": 5, "time": [], "attempt": "x", "loss": true}',
    ]
    (folder / "metrics.rank0.jsonl").write_text("\n".join(hostile) + "\n")
    for name in ("arrays.rank0.jsonl", "telemetry.rank0.jsonl", "events.jsonl"):
        (folder / name).write_text(
            "\n".join([*hostile, '{"gpus": 5, "host": [1]}', '{"gpus": [{"index": "x"}]}']) + "\n"
        )
    (folder / "run.json").write_text('{"status": 5, "layers": "x", "attempt": "y", "heartbeat": 3')
    (folder / "config.toml").write_text("= broken")
    runs.append(folder / "metrics.rank0.jsonl", [runs.metrics(5)])
    with indexed(tmp_path) as index:
        name = folder.name
        row = table(index)[name]
        assert row.step == 5 and row.bad_lines >= 5
        assert curve(index, name)[5] == runs.loss(5)
        assert curve(index, name, tag='a"; drop table metrics; --') == {2: 5.0}
        views.events(index, [name], curves.Axis())
        machine.gpus(index, name)
        machine.timing(index, name)
        experts.experts(index, name)
        assert b"drop table" in export.export(index, [name], "csv")


def test_more_tags_than_there_is_room_for_are_named(tmp_path: Path) -> None:
    folder = runs.folder(tmp_path, "a")
    runs.append(folder / "metrics.rank0.jsonl", [{"step": 1, **{f"tag{n:05d}": n for n in range(261)}}])
    with open_index(tmp_path, None, threads=1) as index:
        (problem,) = poll(index).problems
    assert problem == (
        "metrics: expected tags that the index has room for, got also tag00256, tag00257, tag00258, "
        "tag00259, tag00260; "
        "rename them"
    )


def test_an_index_of_another_version_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    runs.append(runs.folder(tmp_path / "runs", "a") / "metrics.rank0.jsonl", [runs.metrics(1)])
    with indexed(tmp_path / "runs", tmp_path / "index") as index:
        index.connection.execute("update format set version = 99")
    with indexed(tmp_path / "runs", tmp_path / "index") as index:
        assert curve(index, "a") == {1: runs.loss(1)}


def test_a_second_process_is_told_who_has_the_index(tmp_path: Path) -> None:
    file = tmp_path / "index"
    code = f"import duckdb; c = duckdb.connect({str(file)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="an index that no other process has open"), open_index(tmp_path, file):
            pytest.fail("two processes have it open")
        other.communicate("\n")


STARTED = {"event": "start", "attempt": 1, "pid": 1}
ENDED = {"event": "end", "attempt": 1, "status": "finished"}
BEATING = {"status": "running", "attempt": 1, "heartbeat_every_s": 10, "host": "there"}


@pytest.mark.parametrize(
    ("record", "age_s", "last", "status"),
    [
        ({}, 0, None, "not started"),
        ({}, 0, ENDED, "finished"),
        ({}, 0, STARTED, "unknown, on there"),
        (BEATING, 0, STARTED, "running"),
        (BEATING, 34, STARTED, "running"),
        (BEATING, 36, STARTED, "lost"),
        (BEATING | {"status": "starting"}, 0, None, "starting"),
        (BEATING | {"status": "interrupted"}, 999, STARTED, "interrupted"),
        (BEATING, 0, ENDED, "finished"),
        (BEATING | {"attempt": 2}, 0, ENDED, "running"),
    ],
)
def test_status_is_what_is_told_held_against_the_clock(
    record: dict[str, Any], age_s: float, last: dict[str, Any] | None, status: str
) -> None:
    now = datetime.now(UTC)
    told = record | ({"heartbeat": (now - timedelta(seconds=age_s)).isoformat()} if record else {})
    assert run_status.status(told, last, "there", now) == status


def test_a_process_that_is_gone_has_crashed_whatever_its_heartbeat(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    told = {"status": "running", "heartbeat": now.isoformat(), "heartbeat_every_s": 10, "host": platform.node()}
    assert run_status.status(told | {"pid": runs.dead_pid()}, None, "", now) == "crashed"
    assert run_status.status(told | {"pid": os.getpid()}, None, "", now) == "running"


def test_the_page_asks_for_its_modules_at_once() -> None:
    """A module that is found only in another costs a round trip before the first picture."""
    page = (STATIC / "index.html").read_text()
    modules = {f"/static/{name}" for file in STATIC.glob("*.js") for name in IMPORTED.findall(file.read_text())}
    assert len(modules) > 10
    assert set(re.findall(r'modulepreload" href="([^"]+)"', page)) == modules


def test_vendored_files_are_those_that_are_listed() -> None:
    lines = [line.split() for line in (STATIC / "vendor" / "VENDORED").read_text().splitlines() if line[:1] != "#"]
    listed = {file: digest for digest, file, *_ in lines}
    found = {path.name: path for path in (STATIC / "vendor").iterdir() if path.name != "VENDORED"}
    assert set(listed) == set(found)
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name


# The server, as a process.


@pytest.fixture(scope="module")
def server(root: Path, data: Path) -> Iterator[Server]:
    with serving(root, "--data", str(data)) as running:
        yield running


def test_documents_are_decoded_and_links_out_refused(server: Server) -> None:
    folders = server.json("/api/folders")["folders"]
    assert [Path(folder["path"]).name for folder in folders] == ["linked", "prepared"]
    assert folders[1]["splits"][0]["documents"] == 3 and folders[1]["problems"] == []
    document = server.json("/api/document?folder=1&split=train&number=1")
    assert document["text"].startswith("sat on <b>é</b>") and document["documents"] == 3
    assert "".join(token["text"] for token in document["tokens"])[:6] == "sat on"
    code, body = server.get("/api/document?folder=0&split=train&number=1")
    assert code == 400 and "leads out" in body and "CANARY" not in body
    for bad in ("folder=9&split=train&number=0", "folder=1&split=x&number=0", "folder=1&split=train&number=3"):
        assert server.get(f"/api/document?{bad}")[0] == 400


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "", "[::2]:{port}"])
def test_another_host_name_is_refused(server: Server, host: str) -> None:
    code, body = server.get("/api/runs", Host=host.format(port=server.port))
    assert code in (400, 421) and "finished" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_get(server: Server, method: str) -> None:
    assert server.get("/api/runs", method=method)[0] == 405


def test_every_answer_says_what_a_page_may_do(server: Server) -> None:
    for path in ("/", "/api/runs", "/static/app.js", "/nothing", "/api/series"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with closing(connection):
            connection.request("GET", path)
            headers = connection.getresponse().headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy, path


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (
            "/api/series?run=nobody&tag=loss",
            "run: expected the name of a run here, got 'nobody'; reload the list of runs",
        ),
        ("/api/series?tag=loss", "run: expected the name of a run, got none; add run=NAME"),
        ("/api/series?run=finished", "tag: expected one value, got 0; add tag=VALUE"),
        (
            "/api/series?run=finished&tag=loss&x=y",
            "x: expected one of step, tokens, time, clock, flops, got 'y'; choose one of them",
        ),
        ("/api/series?run=finished&tag=loss&smooth=nan", "smooth: expected a number from 0, got 'nan'; write another"),
        (
            "/api/series?run=finished&tag=loss&points=-1",
            "points: expected a whole number from 0, got '-1'; write digits",
        ),
        ("/api/export?run=finished&format=exe", "format: expected one of csv, parquet, got 'exe'; choose one of them"),
    ],
)
def test_bad_parameters_are_told(server: Server, path: str, problem: str) -> None:
    code, body = server.get(path)
    assert (code, json.loads(body)["problems"]) == (400, [problem])


def test_answers_have_the_fields_of_the_contract(server: Server) -> None:
    told = server.json("/api/contract")
    assert told == contract()

    def held(kind: str, value: Any) -> None:
        for each in value if isinstance(value, list) else [value]:
            assert set(each) == set(told[kind])
            for name, inner in told[kind].items():
                if inner:
                    held(inner, each[name])

    for kind, path in (
        *(("Runs", "runs"), ("Series", "series?run=finished&tag=loss"), ("Events", "events?run=finished")),
        *(("Configs", "configs?run=finished"), ("Evaluations", "evaluations?run=finished")),
        *(("Samples", "samples?run=finished"), ("Experts", "experts?run=finished"), ("Load", "load?run=finished")),
        *(("Layers", "layers?run=finished&tag=cv"), ("Timing", "timing?run=finished"), ("Gpus", "gpus?run=finished")),
        *(("Folders", "folders"), ("Mixture", "mixture?run=finished")),
        ("Document", "document?folder=1&split=train&number=0"),
        *(("Checkpoints", "checkpoints?run=finished"), ("Console", "console?run=finished")),
    ):
        held(kind, server.json(f"/api/{path}"))


def test_a_token_opens_and_nothing_else_does(root: Path) -> None:
    with serving(root, "--token", "abcdefgh12345678") as running:
        assert running.get("/api/runs")[0] == 401 == running.get("/")[0] == running.get("/static/app.js")[0]
        assert running.get("/?token=abcdefgh12345679")[0] == 401
        assert running.get("/api/runs?token=abcdefgh12345678")[0] == 401
        assert running.get("/api/runs", Cookie="nmoe_viz=abcdefgh12345678")[0] == 200
        assert running.get("/api/runs", Cookie="nmoe_viz=ä")[0] == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{running.url}/?view=charts&token=abcdefgh12345678") as answer:
            assert answer.url == f"{running.url}/?view=charts"
        with opener.open(f"{running.url}/api/runs") as answer:
            assert answer.status == 200


def test_the_stream_tells_of_a_new_line(tmp_path: Path) -> None:
    folder = runs.folder(tmp_path, "a")
    runs.append(folder / "metrics.rank0.jsonl", [runs.metrics(1)])
    with serving(tmp_path) as running, urllib.request.urlopen(f"{running.url}/api/stream", timeout=60) as stream:
        while not stream.readline().startswith(b"data:"):
            pass
        runs.append(folder / "metrics.rank0.jsonl", [runs.metrics(2)])
        messages_until(stream, grown=["a"])
        # What cannot be read is told, and the next look that can takes it back.
        (folder / "metrics.rank1.jsonl").mkdir()
        (problem,) = next_message(stream)["problems"]
        assert "metrics.rank1.jsonl: expected a regular file, got another" in problem
        (folder / "metrics.rank1.jsonl").rmdir()
        messages_until(stream, problems=[])
        folder.rename(tmp_path / "b")
        (tmp_path / "a").symlink_to(tmp_path / "a")
        messages_until(stream, gone=["a"], grown=["b"])


def next_message(stream: Any) -> dict[str, Any]:
    """The next message of a stream, which has two lines without one every 15 seconds."""
    text = next((line for line in itertools.islice(stream, 20) if line.startswith(b"data:")), None)
    assert text is not None, "no message in two minutes"
    return json.loads(text[5:])


def messages_until(stream: Any, **wanted: list[str]) -> None:
    """Read until each field has had its value: a look at the folders may fall between two changes, or into one."""
    while wanted:
        message = next_message(stream)
        wanted = {field: value for field, value in wanted.items() if message[field] != value}


PIECES = (
    *("finished", "resumed", "loss", "cv", "step", "tokens", "1", "0", "-1", "99999999999999999999", "1e308", "nan"),
    *(
        "../../secret",
        "..%2f..%2fsecret",
        "/etc/passwd",
        "%00",
        "%ff",
        "' or 1=1 --",
        '"; drop table runs; --',
        "<script>",
    ),
    *("", "a" * 5000, "é", "\u202e", "*", "\\", "%", "parquet", "csv", "train", "inf", "c0", "$.x"),
)
NAMES = ("run", "tag", "x", "smooth", "points", "low", "high", "step", "layer", "folder", "split", "number", "column")
PATHS = (
    *("runs", "series", "events", "configs", "evaluations", "samples", "experts", "layers", "load", "load_history"),
    *(
        "timing",
        "gpus",
        "mixture",
        "checkpoints",
        "console",
        "folders",
        "document",
        "export",
        "contract",
        "nothing",
        "../secret",
        "%2e%2e/secret",
    ),
)


def hostile_path(source: random.Random) -> str:
    """An address that nobody should be able to harm with."""
    if source.random() < 0.1:
        return "/" + "/".join(source.choice(("static", "..", "%2e%2e", ".", "secret", "inside", "")) for _ in range(5))
    quote = source.choice((urllib.parse.quote, lambda text: text.encode("ascii", "ignore").decode().replace(" ", "+")))
    pairs = [(source.choice((*NAMES, "format", "log_x")), source.choice(PIECES)) for _ in range(source.randrange(7))]
    if source.random() < 0.5:
        pairs += [("run", "finished"), ("tag", "loss")]
    query_ = "&".join(f"{name}={quote(value)}" for name, value in pairs)
    return "".join(c for c in f"/api/{source.choice(PATHS)}?{query_}" if c > " ")


def bombard(server: Server, count: int, seed: int) -> dict[int, int]:
    """Ask `count` hostile questions over one connection; how often each code came. Fails on a 5xx or the canary."""
    source, codes = random.Random(seed), dict[int, int]()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        for _ in range(count):
            path = hostile_path(source)
            connection.request(source.choice(("GET", "GET", "GET", "HEAD", "POST")), path)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status < 500, path
            assert b"CANARY" not in body and b"root:" not in body, path
            codes[answer.status] = codes.get(answer.status, 0) + 1
    return codes


def test_hostile_requests_get_no_error_and_no_canary(server: Server) -> None:
    codes = bombard(server, 250, 1)
    assert codes[200] > 20 and codes[400] > 20, codes
    assert server.json("/api/runs")["runs"], "the index is whole"


@pytest.mark.long
def test_a_hundred_thousand_hostile_requests(server: Server) -> None:
    codes = bombard(server, 100_000, 2)
    assert codes[200] > 5000 and codes[400] > 5000, codes
    assert len(server.json("/api/runs")["runs"]) == 6


def _requested(server: Server, text: bytes) -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    opened.sendall(text)
    return opened


def test_half_a_request_is_not_waited_for_and_connections_are_bounded(tmp_path: Path) -> None:
    runs.folder(tmp_path, "a")
    whole = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(tmp_path) as server, ExitStack() as scope:
        halves = [scope.enter_context(_requested(server, text)) for text in (b"", b"GET / HT", whole + b"GET / HT")]
        stream = _requested(server, whole.replace(b"/ ", b"/api/stream "))
        scope.enter_context(stream)
        for half in halves:
            while half.recv(1 << 16):
                continue
        assert b"200 OK" in stream.recv(1 << 16), "a stream is an answer"
        stream.setblocking(False)
        time.sleep(2)
        with contextlib.suppress(BlockingIOError):
            assert stream.recv(1 << 16), "a stream goes on when the time for a request is over"
        many = [scope.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(300)]
        many[-1].settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert many[-1].recv(1) == b"", "more than the bound are closed at once"


@pytest.mark.parametrize(("first", "pause_s"), [(signal.SIGINT, 0.0), (signal.SIGINT, 0.15), (signal.SIGTERM, 0.15)])
def test_two_quick_signals_end_it_in_order_while_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: signal.Signals, pause_s: float
) -> None:
    """Also with a page that listens and a thread that reads: no abort, no traceback, nothing left behind."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    folder = runs.folder(tmp_path / "runs", "a")
    (folder / "metrics.rank0.jsonl").write_text((json.dumps(runs.metrics(1)) + "\n") * 4000)
    with serving(tmp_path / "runs") as server:
        with _requested(server, b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as stream:
            assert stream.recv(1 << 16)
            with _requested(server, b"GET /api/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
                time.sleep(0.1)
                server.process.send_signal(first)
                time.sleep(pause_s)
                server.process.send_signal(signal.SIGINT)
                assert server.process.wait(60) == 128 + first
        assert list((tmp_path / "tmp").glob("nmoe-*")) == []


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path: Path) -> None:
    runs.folder(tmp_path / "runs", "a")
    file = tmp_path / "home" / "index"
    for _ in range(2):
        with open_index(tmp_path / "runs", file) as index:
            assert list(index.work.iterdir()) == []
            (index.work / "left").write_text("x")
            shutil.copytree(index.work, tmp_path / "kept", dirs_exist_ok=True)
        assert not index.work.exists()
        shutil.copytree(tmp_path / "kept", index.work)
