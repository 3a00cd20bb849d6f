"""The verbs of `nmoe runs` that read many runs at once, on an index in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmoe.effects import files
from nmoe.effects.record import address
from nmoe.effects.record.names import ALL_METRICS
from nmoe.effects.runs.viz import curves, export, views
from nmoe.effects.runs.viz.index import Index, open_index, poll
from nmoe.effects.terminal import say, say_json, table
from nmoe.errors import InputError

COMPACTED = "metrics.parquet"


def compare(root: Path, names: Sequence[str], as_json: bool = False) -> int:
    """Print some runs side by side: where they stand, their loss at equal steps, the config keys that differ.

    names    of runs under `root`, or paths of folders beside each other
    returns  exit code 0
    Raises:  InputError for fewer than two runs, or one that is not there.
    """
    folders = [address.find_run(name, root) for name in names]
    names = list(dict.fromkeys(folder.name for folder in folders))
    root, *others = dict.fromkeys(folder.resolve().parent for folder in folders)
    if others:
        raise InputError(
            f"runs compare: expected runs of one folder, got some of {root} and {others[0]}; link them there"
        )
    if len(names) < 2:
        raise InputError(f"runs compare: expected at least two runs, got {', '.join(names)}; name another")
    with open_index(root, None) as index:
        _read_all(index, names)
        run_rows = {run.name: run for run in views.runs(index, []).runs}
        numbers = [(column.name, column.title) for column in views.COLUMNS if column.format != "ago"]
        shown = [("status", "status"), ("step", "step"), *numbers]
        rows = [(title, *(getattr(run_rows[name], field) for name in names)) for field, title in shown]
        rows += _losses(index, names)
        rows += [
            (row.key, *row.values)
            for row in views.configs(index, names).rows
            if row.differs and not row.key.startswith("provenance.")
        ]
    if as_json:
        say_json([{"row": title, **dict(zip(names, values, strict=True))} for title, *values in rows])
        return 0
    say(table(("", *names), [(title, *map(_shown, values)) for title, *values in rows], left=1))
    return 0


def _losses(index: Index, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The loss of each run around the same steps, quarter by quarter of what all have."""
    series = curves.series(index, names, "loss", curves.Axis(points=4000, smooth=0.0))
    if len(series.curves) != len(names):
        return []
    ends = [
        max((x for x, v in zip(series.x, c.mean, strict=True) if v is not None), default=0.0) for c in series.curves
    ]
    rows: list[tuple[Any, ...]] = []
    for quarter in (1, 2, 3, 4):
        limit = min(ends) * quarter / 4
        last = [
            [v for x, v in zip(series.x, curve.mean, strict=True) if x <= limit and v is not None][-1:]
            for curve in series.curves
        ]
        rows.append((f"loss by step {limit:,.0f}", *(values[0] if values else None for values in last)))
    return rows


def compact(root: Path, name: str) -> int:
    """Write a run's metrics as Parquet into its folder, each step once, as its newest attempt reported it.

    Writes:  metrics.parquet in the run folder, whole or not at all; the lines of JSON stay.
    Raises:  InputError when the run is not there, has no metrics or its folder cannot be written.
    """
    return export_parquet(root, name, address.find_run(name, root) / COMPACTED)


def export_parquet(root: Path, name: str, to: Path) -> int:
    """Write a run's metrics as Parquet.

    Writes:  `to`, whole or not at all.
    Raises:  InputError when the run is not there, has no metrics or `to` cannot be written.
    """
    folder = address.find_run(name, root)
    name = folder.name
    with open_index(folder.parent.resolve(), None) as index:
        _read_all(index, [name])
        if not any(run.name == name and run.step is not None for run in views.runs(index, []).runs):
            raise InputError(f"{folder}: expected metrics to export, got none yet; wait for the first logged step")
        try:
            with files.replacing(to) as temporary:
                export.write_(temporary, index, [name], "parquet")
        except OSError as error:
            raise InputError(
                f"{to}: expected a file that can be written, got {error.strerror}; choose another file"
            ) from error
    size = sum(file.stat().st_size for file in folder.glob(ALL_METRICS))
    say(f"{to}  {os.path.getsize(to):,} bytes, from {size:,} bytes of JSON lines")
    return 0


def _read_all(index: Index, names: Sequence[str]) -> None:
    """Read some runs to their ends. Writes: the index."""
    while True:
        progress = poll(index, names=names)
        if progress.problems:
            raise InputError(*progress.problems)
        if not progress.read_bytes:
            return


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value}"
