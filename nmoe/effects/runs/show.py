"""`nmoe runs`: what run folders say. Reads text files only and never imports torch.

A run folder is a folder with a `config.toml`. Its append-only files may be read while the run writes them: a last line
without its line end is one being written, and is left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects import files
from nmoe.effects.record import address, lines
from nmoe.effects.record.lines import Line
from nmoe.effects.record.names import CONFIG, EVALS, EVENTS, METRICS, PROVENANCE
from nmoe.effects.record.reading import MAX_ATTEMPT, MAX_SECONDS, MAX_STEP, toml_table, utc
from nmoe.effects.runs import status as run_status
from nmoe.effects.runs.viz import words
from nmoe.effects.terminal import say, say_json, sparkline, table
from nmoe.errors import InputError, printable
from nmoe.pure.units import decimals, plain, quantity, time_of
from nmoe.pure.watch.metrics import metric, summary

FOLLOW_S = 0.5
SPARKLINE_WIDTH = 60


@attrs.frozen(kw_only=True)
class Run:
    """A run folder, read. Numbers are None until the run has reported them."""

    folder: Path
    status: str
    events: tuple[Line, ...]
    metrics: tuple[Line, ...]
    provenance: Mapping[str, Any]
    started: datetime | None
    steps: int | None
    step: float | None
    tokens: float | None
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    duration_s: float  # of all attempts


def list_runs(root: Path, as_json: bool = False) -> int:
    """Print the runs under `root`, newest first; behind a run what of it cannot be read, if anything.

    returns  exit code 0
    Raises:  InputError when there are none.
    """
    listed = sorted((_listed(folder) for folder in run_folders(root)), key=lambda entry: entry[0])
    if as_json:
        say_json([{**numbers, "problems": problems} for _, _, numbers, problems in listed])
        return 0
    head = ("name", "status", "step", "loss", "val loss", "bits/byte", "tokens", "started (UTC)", "duration")
    texts = table(head, [row for _, row, _, _ in listed], left=2).splitlines()
    say(texts[0])
    for line, (_, _, _, problems) in zip(texts[1:], listed, strict=True):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        say(f"{line}  ! {printable(problems[0])}{more}" if problems else line)
    return 0


def _listed(folder: Path) -> tuple[tuple[bool, float, str], tuple[str, ...], dict[str, Any], list[str]]:
    """What a run is sorted by, its row in the list, its numbers, and what of it cannot be read: nothing a folder holds
    takes down the list of all."""
    problems: list[str] = []
    try:
        run = read_run(folder, problems.append)
        return _age(folder, run), tuple(map(printable, _row(folder, run))), _numbers(run), problems
    except InputError as error:
        problems += error.problems
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        problems.append(f"{folder}: expected what `nmoe run` writes, got {type(error).__name__}: {error}; move it away")
    unreadable = {"name": folder.name, "folder": str(folder), "status": "unreadable"}
    return _age(folder, None), (printable(folder.name), "unreadable", *"-------"), unreadable, problems


def _numbers(run: Run) -> dict[str, Any]:
    """Where a run stands, for a program."""
    about = attrs.asdict(run, filter=lambda field, _: field.name not in ("events", "metrics", "provenance"))
    return {"name": run.folder.name, **about, "started": None if run.started is None else run.started.isoformat()}


def _row(folder: Path, run: Run) -> tuple[str, ...]:
    """A run in the list."""
    return (
        folder.name,
        run.status,
        f"{_count(run.step)}/{_count(run.steps)}",
        _digits(run.loss),
        _digits(run.validation_loss),
        _digits(run.bits_per_byte),
        _count(run.tokens),
        f"{run.started:%Y-%m-%d %H:%M:%S}" if run.started else "-",
        _duration(run.duration_s),
    )


def show(root: Path, name: str, as_json: bool = False) -> int:
    """Print one run on one screen: where it stands, the loss as a sparkline, the experts at the last logged step.

    returns  exit code 0
    Raises:  InputError when there is no such run or it cannot be read.
    """
    run = read_run(address.find_run(name, root))
    start, end = _last(run.events, "event", "start"), _last(run.events, "event", "end")
    trained, validated = _last(run.metrics, "loss"), _last(run.metrics, "validation/loss")
    if as_json:
        ends = {"start": start and start.fields, "end": end and end.fields}
        say_json({**_numbers(run), "latest": trained and trained.fields, **ends, "provenance": run.provenance})
        return 0
    hardware, code = run.provenance.get("hardware", {}), run.provenance.get("code", {})
    parts = [
        ("run", f"{run.folder}  {run.status}"),
        (
            "started",
            f"{run.started:%Y-%m-%d %H:%M:%S} UTC on {hardware.get('host', '-')}" if run.started else "not yet",
        ),
        ("command", str(run.provenance.get("command", "-"))),
        ("code", f"{code.get('commit', '-')}{'  with changes' if code.get('dirty') else ''}"),
    ]
    if start:
        fields = start.fields
        parts.append(
            (
                "parameters",
                f"{_count(number(start, 'parameters'))}  {_count(number(start, 'active_parameters'))} active",
            )
        )
        parts.append(("attempt", f"{fields.get('attempt', '-')}  pid {fields.get('pid', '-')}"))
    parts.append(
        (
            "progress",
            f"step {_count(run.step)}/{_count(run.steps)}  {_count(run.tokens)} tokens  {_duration(run.duration_s)}",
        )
    )
    if trained:
        rate, mfu, held = (number(trained, key) for key in ("tokens_per_s", "mfu", "memory_bytes"))
        losses = [value for line in run.metrics if (value := number(line, "loss")) is not None]
        parts.append(
            ("speed", f"{_count(rate)} tokens/s  mfu {_digits(mfu and 100 * mfu, 1)} %  memory {_bytes(held)}")
        )
        if split := _split(trained):
            parts.append(("a step", split))
        parts.append(("loss", f"{_digits(losses[0])} {sparkline(losses, SPARKLINE_WIDTH)} {_digits(losses[-1])} nats"))
    if validated:
        at = f"{_digits(run.validation_loss)} nats  {_digits(run.bits_per_byte)} bits/byte"
        parts.append(("validation", f"{at}  at step {_count(number(validated, 'step'))}"))
    if end and "error" in end.fields:
        parts.append(("error", str(end.fields["error"])))
    say("\n".join(f"{label:<12}{printable(text)}" for label, text in parts))
    if trained and "experts" in trained.fields:
        experts = _experts(trained)
        rows = [tuple(f"{float(value):.4g}" for value in row) for row in zip(*list(experts.values())[1:], strict=True)]
        layers = [str(layer) for layer in experts["layer"]]
        say(f"\nexperts at step {_count(number(trained, 'step'))}")
        say(table(tuple(experts), [(layer, *row) for layer, row in zip(layers, rows, strict=True)], left=0))
    if scores := read_scores(run.folder / EVALS):
        say(f"\n{table(('task', 'score', 'std error', 'items', 'step', 'judged (UTC)'), scores, left=1)}")
    return 0


def _split(line: Line) -> str:
    """Where the time of a logged step goes, the longest part first; nothing where the line does not say so."""
    whole = number(line, "step_s")
    parts = {key[5:-2]: number(line, key) or 0.0 for key in line.fields if fnmatchcase(key, "time/*_s")}
    if whole is None or not 0 < whole < MAX_SECONDS:
        return ""
    shares = sorted(((seconds / whole, part) for part, seconds in parts.items()), reverse=True)
    shown = [f"{part} {100 * share:.1f} %" for share, part in shares if 0.0005 <= share <= 1]
    return f"{time_of(whole)}: {'  '.join(shown)}"


def read_scores(path: Path) -> list[tuple[str, ...]]:
    """What `nmoe eval` and evaluations in training measured: a row a task; none where nothing was.

    Raises:  InputError when the file holds something else.
    """
    if not files.is_file(path):
        return []
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
        return [
            (
                str(task),
                decimals(float(x["value"])),
                decimals(float(x["error"])),
                _count(float(x["count"])),
                _count(None if x.get("step") is None else float(x["step"])),
                str(x["at"])[:16].replace("T", " "),
            )
            for task, x in saved.items()
        ]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected the scores that `nmoe eval` writes, got {type(error).__name__}: {error}; delete the file"
        ) from error


def export(root: Path, name: str, to: Path | None) -> int:
    """The metrics of a run as CSV, one row a line of metrics; a value of each layer gets a column of its own.

    to       file to replace, whole or not at all; None: standard output
    returns  exit code 0
    Raises:  InputError when there is no such run, it has no metrics, cannot be read, or `to` cannot be written.
    """
    run = read_run(address.find_run(name, root))
    if not run.metrics:
        raise InputError(
            f"{run.folder / METRICS}: expected metrics to export, got none yet; wait for the first logged step"
        )
    rows = [flatten(line) for line in run.metrics]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if to is None:
        say(text.getvalue().removesuffix("\n"))
        return 0
    try:
        files.write_text(to, text.getvalue())
    except OSError as error:
        raise InputError(
            f"{to}: expected a file that can be written, got {error.strerror}; choose another file"
        ) from error
    say(f"{to}: {len(rows)} lines of {len(columns)} columns")
    return 0


def tail(root: Path, name: str, count: int, follow: bool, as_json: bool = False) -> int:
    """Print the last `count` logged steps and events of a run, and with `follow` what comes until it ends.

    as_json  print each as one line of JSON, as it is in its file
    returns  exit code 0
    Raises:  InputError when there is no such run or it cannot be read.
    """
    folder = address.find_run(name, root)
    host = str(read_provenance(folder / PROVENANCE).get("hardware", {}).get("host", ""))
    printed: Counter[tuple[str, float | None]] = Counter()  # lines of a file and attempt
    first = True
    while True:
        # Asked before reading: what a run writes last is there once it counts as ended.
        going = follow and run_status.of(folder, read_lines(folder / EVENTS), host) in run_status.GOING
        fresh: list[Line] = []
        for file in (EVENTS, METRICS):
            # A resumed attempt cuts the lines of those before it, and appends its own: places in the file do not last.
            there: Counter[tuple[str, float | None]] = Counter()
            for line in read_lines(folder / file):
                if not as_json and line.fields.get("event") == "validation":
                    continue  # the metrics have a line of it, which says the same
                key = (file, number(line, "attempt"))
                there[key] += 1
                if there[key] > printed[key]:
                    fresh.append(line)
            printed |= there
        fresh.sort(key=lambda line: str(line.fields.get("time", "")))
        for line in fresh[len(fresh) - min(count, len(fresh)) :] if first else fresh:
            say(json.dumps(plain(line.fields)) if as_json else printable(_summary(line)))
        if not going:
            return 0
        first = False
        time.sleep(FOLLOW_S)


def _summary(line: Line) -> str:
    """A line of metrics or an event, for the screen."""
    fields = dict(line.fields)
    at = str(fields.pop("time", "-"))[:19].replace("T", " ")
    attempt = fields.pop("attempt", 1)
    again = f"  attempt {attempt}" if attempt != 1 else ""
    if "event" in fields:
        event, step = str(fields.pop("event")), number(line, "step")
        return f"{at}  {event}{again}{'' if step is None else f'  step {_count(step)}'}  {words.text(event, fields)}"
    step = f"{at}  step {_count(number(line, 'step'))}{again}"
    shown = {key: number(line, key) for key in fields if (entry := metric(key)) is not None and entry.screen}
    return f"{step}  {summary({**shown, 'experts': _experts(line)} if 'experts' in fields else shown)}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else quantity(value, "B")


def run_folders(root: Path) -> tuple[Path, ...]:
    """The run folders under `root`.

    Raises:  InputError when there are none.
    """
    try:
        folders = tuple(path for path in sorted(root.iterdir()) if _is_run(path))
    except FileNotFoundError:
        folders = ()
    except OSError as error:
        raise InputError(
            f"{root}: expected a folder of run folders, got {error.strerror}; pass another --root"
        ) from error
    # A name with a leading dot is a run folder still being made.
    folders = tuple(path for path in folders if not path.name.startswith("."))
    if not folders:
        raise InputError(
            f"{root}: expected run folders, got none; start one with `nmoe run CONFIG` or pass another --root"
        )
    return folders


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's; one that cannot be looked into may be, and whoever reads it says why not."""
    try:
        return (folder / CONFIG).is_file()
    except OSError:
        return True


def read_run(folder: Path, damaged: Callable[[str], None] = lines.refuse) -> Run:
    """Everything in a run folder.

    damaged  takes what is wrong with a line that is no JSON object; the line is left out when it returns

    Raises:  InputError with file and line of what cannot be read.
    """
    events, metrics = read_lines(folder / EVENTS, damaged), read_lines(folder / METRICS, damaged)
    provenance = read_provenance(folder / PROVENANCE)
    host = str(provenance.get("hardware", {}).get("host", ""))
    first, start = (
        next((line for line in events if line.fields.get("event") == "start"), None),
        _last(events, "event", "start"),
    )
    longest: dict[float | None, float] = {}
    for line in metrics:
        attempt = _below(line, "attempt", MAX_ATTEMPT)
        longest[attempt] = max(longest.get(attempt, 0.0), _below(line, "elapsed_s", MAX_SECONDS) or 0.0)
        _below(line, "step", MAX_STEP)
    steps = _below(start, "steps", MAX_STEP) if start else None
    return Run(
        folder=folder,
        status=run_status.of(folder, events, host),
        events=events,
        metrics=metrics,
        provenance=provenance,
        started=_time(first) if first else None,
        steps=None if steps is None else int(steps),
        step=_newest(metrics, "step"),
        tokens=_newest(metrics, "tokens_global"),
        loss=_newest(metrics, "loss"),
        validation_loss=_newest(metrics, "validation/loss"),
        bits_per_byte=_newest(metrics, "validation/bits_per_byte"),
        duration_s=sum(longest.values()),
    )


def read_lines(path: Path, damaged: Callable[[str], None] = lines.refuse) -> tuple[Line, ...]:
    """The whole lines of a file with one JSON object a line; none when the file is not there yet."""
    return tuple(lines.read(path, damaged))


def read_provenance(path: Path) -> Mapping[str, Any]:
    """Where a run comes from.

    Raises:  InputError when the file is missing or no TOML.
    """
    try:
        return toml_table(path)
    except OSError as error:
        raise InputError(
            f"{path}: expected in each run folder, got {error.strerror}; move the folder elsewhere"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: expected TOML in UTF-8, got {error}; fix the file") from error


def number(line: Line, key: str) -> float | None:
    """A number of a line; None when the line has none by that name.

    Raises:  InputError when it is something else.
    """
    if key not in line.fields:
        return None
    value = line.fields[key]
    if value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        return float(value)
    raise InputError(f"{line.where}: {key}: expected a number, got {value!r}; fix or delete the line")


def _below(line: Line, key: str, limit: float) -> float | None:
    """A number of a line from 0 to below `limit`; None when the line has none by that name. Raises: InputError."""
    value = number(line, key)
    if value is not None and not 0 <= value < limit:
        raise InputError(
            f"{line.where}: {key}: expected from 0 to below {limit:g}, got {value}; fix or delete the line"
        )
    return value


def flatten(line: Line) -> dict[str, Any]:
    """The fields of a line of metrics by column; `experts` become one column a quantity and layer."""
    flat = {key: value for key, value in line.fields.items() if key != "experts"}
    if "experts" in line.fields:
        experts = _experts(line)
        for key, values in experts.items():
            if key != "layer":
                flat |= {
                    f"experts/{key}/layer_{layer:02d}": v for layer, v in zip(experts["layer"], values, strict=True)
                }
    return flat


def _experts(line: Line) -> dict[str, list[Any]]:
    """The health of each mixture: quantity -> one value a layer, `layer` first."""
    experts: Any = line.fields["experts"]
    layers: Any = experts.get("layer") if isinstance(experts, dict) else None
    if (
        not isinstance(layers, list)
        or not all(isinstance(layer, int) for layer in layers)
        or not all(isinstance(values, list) and len(values) == len(layers) for values in experts.values())
    ):
        raise InputError(
            f"{line.where}: experts: expected `layer` and lists as long, got {experts!r}; fix or delete the line"
        )
    return {"layer": layers, **experts}


def _last(lines: Sequence[Line], key: str, value: str | None = None) -> Line | None:
    return next((x for x in reversed(lines) if key in x.fields and value in (None, x.fields[key])), None)


def _newest(lines: Sequence[Line], key: str) -> float | None:
    line = _last(lines, key)
    return number(line, key) if line else None


def _time(line: Line) -> datetime:
    try:
        return utc(line.fields.get("time"))
    except ValueError as error:
        raise InputError(f"{line.where}: time: {error}; fix the line") from error


def _age(folder: Path, run: Run | None) -> tuple[bool, float, str]:
    """Sorts newest first; what has not started is newest, what cannot be read is last."""
    return run is None, -run.started.timestamp() if run and run.started else -math.inf, folder.name


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _digits(value: float | None, places: int = 4) -> str:
    return "-" if value is None else f"{float(value):.{places}f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
