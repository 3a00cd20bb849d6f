"""From the index to answers about runs: the table, curves, events, configs, results."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nmoe.effects.record.names import CONFIG, EVALS, PROVENANCE
from nmoe.effects.record.reading import toml_table
from nmoe.effects.runs import notes
from nmoe.effects.runs import status as run_status
from nmoe.effects.runs.show import read_scores
from nmoe.effects.runs.viz import api, words
from nmoe.effects.runs.viz.curves import HOUR_S, Axis, chosen
from nmoe.effects.runs.viz.index import Index, arrays, known, query, tags
from nmoe.errors import InputError
from nmoe.pure.watch import metrics as schema

MAX_EVENTS = 2000

ALERTS = (
    "(event in ('alert', 'nonfinite', 'spike', 'checkpoint_failed', 'checkpoint_damaged') or (event = 'end' and "
    "coalesce(json_extract_string(line, '$.status'), '') not in ('finished', 'interrupted')))"
)
"""Events that someone should look at, as a condition over table events."""

COLUMNS = tuple(
    api.Column(name=name, title=title, format=format, best=best)
    for name, title, format, best in (
        ("loss", "loss", "number", "min"),
        ("validation_loss", "val loss", "number", "min"),
        ("best_validation_loss", "best val", "number", "min"),
        ("bits_per_byte", "bits/byte", "number", "min"),
        ("tokens", "tokens", "count", ""),
        ("tokens_per_s", "tokens/s", "count", "max"),
        ("mfu", "MFU", "percent", "max"),
        ("elapsed_s", "duration", "duration", ""),
        ("left_s", "left", "duration", ""),
        ("started", "started", "ago", ""),
    )
)
"""Of the run table, here and in the browser."""


def runs(index: Index, columns: Sequence[str]) -> api.Runs:
    """The run table, newest first.

    columns  config keys and tags to add
    """
    now = datetime.now(UTC)
    numbers = query(index, "select run, name from runs")
    latest: dict[int, dict[str, tuple[float, int]]] = {}
    named = {tag: name for tag, name in query(index, "select tag, name from tags")}
    named |= {-1: "step", -2: "tokens_global", -3: "time"}
    for run, tag, value, step in query(index, "select run, tag, value, step from latest"):
        latest.setdefault(run, {})[named[tag]] = (value, step)
    counts = {
        (run, event): count
        for run, event, count in query(
            index, "select run, event, count(*) from events where event in ('alert', 'nonfinite') group by all"
        )
    }
    told_events = {
        run: (began, json.loads(start or "{}"), json.loads(last))
        for run, began, start, last in query(
            index,
            "select run, min(time_s) filter (event = 'start'), last(line order by time_s) filter (event = 'start'), "
            "last(line order by time_s) from events where event in ('start', 'end') group by run",
        )
    }
    bad = dict(query(index, "select run, sum(bad)::bigint from files group by run"))
    elapsed = dict(query(index, "select run, sum(elapsed_s) from spans group by run"))
    column = tags(index).get("validation/loss")
    best = dict(
        query(index, f"select run, min({column}) from metrics where rank = 0 and isfinite({column}) group by run")
        if column
        else ()
    )
    described = schema.described(tags(index))
    places = {entry.name: place for place, entry in enumerate(described)}
    rows: list[api.Run] = []
    keys: dict[str, None] = {}
    for run, name in numbers:
        folder = index.root / name
        values = latest.get(run, {})
        config = config_of(folder)
        keys |= dict.fromkeys(config)
        record = run_status.read(folder)
        began, start, last = told_events.get(run, (None, {}, None))
        host = str(config_of(folder, PROVENANCE).get("hardware.host", "another host"))
        status = run_status.status(record, last, host, now)
        step = _whole(values.get("step", (record.get("step"), 0))[0])
        steps = _whole(record.get("steps", start.get("steps")))
        tokens, rate = (values.get(tag, (None, 0))[0] for tag in ("tokens_global", "tokens_per_s"))
        rows.append(
            api.Run(
                name=name,
                status=status,
                attempt=_whole(record.get("attempt", start.get("attempt"))),
                step=step,
                steps=steps,
                tokens=_value(values, "tokens_global"),
                loss=_value(values, "loss"),
                validation_loss=_value(values, "validation/loss"),
                best_validation_loss=best.get(run),
                bits_per_byte=_value(values, "validation/bits_per_byte"),
                tokens_per_s=_value(values, "tokens_per_s"),
                mfu=_value(values, "mfu"),
                started=began,
                updated=_value(values, "time"),
                elapsed_s=elapsed.get(run),
                left_s=_left_s(step, steps, tokens, rate) if status in run_status.GOING else None,
                alerts=counts.get((run, "alert"), 0),
                nonfinite=counts.get((run, "nonfinite"), 0),
                bad_lines=bad.get(run) or 0,
                tags=sorted(places[tag] for tag in values if tag in places),
                notes=notes_of(folder),
                columns={key: api.plain(config.get(key, values.get(key, (None, 0))[0])) for key in columns},
            )
        )
    rows.sort(key=lambda row: (-(row.started or row.updated or math.inf), row.name))
    by_layer = [entry for entry in schema.METRICS if entry.kind == "layers"]
    return api.Runs(
        root=str(index.root),
        runs=rows,
        shown=list(COLUMNS),
        tags=[entry.name for entry in described],
        metrics=[
            api.Metric(
                name=entry.name,
                unit=entry.unit,
                kind=entry.kind,
                doc=entry.doc,
                format=entry.format(),
                bad_above=entry.bad_above,
                best=entry.best,
            )
            for entry in (*described, *by_layer)
        ],
        keys=sorted(keys),
    )


def notes_of(folder: Path) -> api.Notes:
    """What people wrote about a run, or why that cannot be read."""
    try:
        written, problem = notes.read(folder), None
    except InputError as error:
        written, problem = notes.Notes(), "\n".join(error.problems)
    return api.Notes(
        note=written.note,
        tags=list(written.tags),
        hidden=written.hidden,
        is_editable=problem is None and notes.is_editable(folder),
        problem=problem,
    )


def write_notes(index: Index, name: str, fields: Mapping[str, Any]) -> api.Notes:
    """Change what people wrote about a run; what `fields` lack stays.

    Writes:  the notes in the run folder.
    Raises:  InputError for a run that is not there, other fields, or a folder that cannot be written.
    """
    known(index, [name])
    folder = index.root / name
    with index.noting:
        notes.write(folder, notes.changed(notes.read(folder), fields, name))
    return notes_of(folder)


def events(index: Index, names: Sequence[str], axis: Axis, *, alerts: bool = False) -> api.Events:
    """What happened to some runs, with its place on an axis.

    alerts  only alerts, steps that were not finite, and ends that are failures
    """
    numbers = known(index, names)
    wanted = f"from events where run in (select unnest(?::integer[])){f' and {ALERTS}' if alerts else ''}"
    rows = query(
        index,
        f"select run, event, attempt, step, time_s, line {wanted} order by time_s desc nulls last, rowid desc limit ?",
        list(numbers),
        MAX_EVENTS + 1,
    )
    (count,) = query(index, f"select count(*) {wanted}", list(numbers))[0]
    runs_, per_step, flops = chosen(index, numbers, axis)
    rates = dict(zip(runs_, zip(per_step, flops, strict=True), strict=True))
    at = _times(index, list(numbers)) if axis.x == "time" else {}
    shown = [
        _event(numbers[run], row, row[3] if axis.x == "clock" else _event_place(axis, row[2], rates[run], at.get(run)))
        for run, *row in rows[:MAX_EVENTS]
    ]
    return api.Events(events=shown, left_out=max(0, count - MAX_EVENTS))


def _event(name: str, row: Sequence[Any], x: float | None) -> api.Event:
    event, attempt, step, time_s, line = row
    fields = json.loads(line)
    severity = str(fields.get("severity") or api.SEVERITY.get(event or "", "info"))
    if event == "end" and fields.get("status") not in ("finished", "interrupted"):
        severity = "error"
    return api.Event(
        run=name,
        event=event or "",
        severity=severity if severity in ("info", "warning", "error") else "warning",
        attempt=attempt,
        step=step,
        x=x,
        time=time_s,
        text=words.text(event or "", fields)[:500],
    )


def _event_place(
    axis: Axis, step: int | None, rates: tuple[float | None, float | None], at: tuple[np.ndarray, np.ndarray] | None
) -> float | None:
    if step is None:
        return None
    if axis.x == "step":
        return float(step)
    if axis.x == "time":
        return float(np.interp(step, *at)) if at is not None and len(at[0]) else None
    per_step, flops = rates
    factor = per_step if axis.x == "tokens" else None if per_step is None or flops is None else per_step * flops
    return None if factor is None or not math.isfinite(step * factor) else step * factor


def _times(index: Index, numbers: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Run -> steps and hours of training, thinned."""
    got = arrays(
        index,
        f"select run, m.step, max((v.before_s + m.elapsed_s) / {HOUR_S}) as hours "
        "from metrics m join valid v using (run, attempt) "
        "where m.rank = 0 and m.step < v.until and m.elapsed_s is not null "
        "and run in (select unnest(?::integer[])) group by all order by run, m.step",
        numbers,
    )
    run = np.ma.getdata(got["run"])
    return {
        number: (np.ma.getdata(got["step"])[run == number], np.ma.getdata(got["hours"])[run == number])
        for number in numbers
    }


def evaluations(index: Index, names: Sequence[str]) -> api.Evaluations:
    """What validations and evaluations of some runs measured, and the newest score of each task."""
    numbers = known(index, names)
    rows = query(
        index,
        "select run, attempt, step, time_s, event, line from events where run in (select unnest(?::integer[])) "
        "and event in ('validation', 'evaluation') order by time_s desc nulls last, rowid desc limit ?",
        list(numbers),
        MAX_EVENTS,
    )
    answers: list[api.Evaluation] = []
    scored: list[api.Scored] = []
    for run, attempt, step, time_s, event, line in rows:
        fields = api.plain(json.loads(line))
        if event == "evaluation":
            measured = _scores(fields.get("scores"))
            scored.append(api.Scored(run=numbers[run], attempt=attempt, step=step, time=time_s, scores=measured))
            continue
        results = {key: v for key, v in fields.items() if key not in ("time", "event", "attempt", "step")}
        answers.append(api.Evaluation(run=numbers[run], attempt=attempt, step=step, time=time_s, results=results))
    names_ = dict.fromkeys(key for row in answers for key in row.results)
    scores: list[api.Score] = []
    problems: list[str] = []
    for name in numbers.values():
        try:
            measured = read_scores(index.root / name / EVALS)
        except InputError as error:
            problems += error.problems
        else:
            scores += [
                api.Score(run=name, task=task, value=value, error=error, items=items, step=step, at=at)
                for task, value, error, items, step, at in measured
            ]
    tasks = dict.fromkeys(task for row in scored for task in row.scores)
    return api.Evaluations(
        names=list(names_), rows=answers, tasks=list(tasks), scored=scored, scores=scores, problems=problems
    )


def _scores(value: Any) -> dict[str, api.Numbers]:
    """Task -> score and standard error of an event, which a stranger may have written; what is no number is None."""
    tasks = value.items() if isinstance(value, Mapping) else ()
    return {
        str(task): [api.number(score.get(key)) for key in ("value", "error")]
        for task, score in tasks
        if isinstance(score, Mapping)
    }


def samples(index: Index, names: Sequence[str]) -> api.Samples:
    """The texts that some runs wrote."""
    numbers = known(index, names)
    rows = query(
        index,
        "select run, step, time_s, line from events where run in (select unnest(?::integer[])) "
        "and event in ('sample', 'samples') order by time_s desc nulls last, rowid desc limit 200",
        list(numbers),
    )
    return api.Samples(
        samples=[
            api.Sample(run=numbers[run], step=step, time=time_s, prompt=_text(line, "prompt"), text=_text(line, "text"))
            for run, step, time_s, line in rows
        ]
    )


def configs(index: Index, names: Sequence[str], *, differing: bool = False) -> api.Configs:
    """The configs of some runs side by side: what differs first, and where the runs come from.

    differing  only the keys that differ
    """
    folders = [index.root / name for name in known(index, names).values()]
    tables = [
        {**config_of(folder), **{f"provenance.{k}": v for k, v in config_of(folder, PROVENANCE).items()}}
        for folder in folders
    ]
    rows = [
        api.ConfigRow(
            key=key,
            values=[api.plain(table.get(key)) for table in tables],
            differs=any(key not in table or table[key] != tables[0].get(key) for table in tables),
        )
        for key in dict.fromkeys(key for table in tables for key in table)
    ]
    rows.sort(key=lambda row: (not row.differs, row.key.startswith("provenance.")))
    return api.Configs(runs=list(names), rows=[row for row in rows if row.differs or not differing])


def config_of(folder: Path, file: str = CONFIG) -> Mapping[str, Any]:
    """The keys of a TOML file of a run with dots between; empty when it cannot be read."""
    try:
        stat = (folder / file).stat()
    except OSError:
        return {}
    return _flat(folder / file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)
def _flat(path: Path, changed_ns: int, size: int) -> Mapping[str, Any]:
    try:
        return flatten(toml_table(path))
    except (OSError, ValueError) as error:
        return {"(unreadable)": f"{path.name}: {error}"}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _left_s(step: int | None, steps: int | None, tokens: float | None, rate: float | None) -> float | None:
    """Seconds to the last step at `rate` tokens a second."""
    if not step or steps is None or tokens is None or rate is None or not 0 < rate < math.inf:
        return None
    left = (steps - step) * tokens / step / rate
    return left if 0 <= left < math.inf else None


def _value(values: Mapping[str, tuple[float, int]], tag: str) -> Any:
    """A last value, by its name when it is not finite; None when there is none."""
    return api.plain(values.get(tag, (None, 0))[0])


def _whole(value: Any) -> int | None:
    number = api.number(value)
    return None if number is None or not math.isfinite(number) else int(number)


def _text(line: str, key: str) -> str:
    return str(json.loads(line).get(key, ""))[:20_000]
