"""From the index to curves: one tag of many runs on one grid, thinned where the rows are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from nmoe.effects.runs import status as run_status
from nmoe.effects.runs.viz import api
from nmoe.effects.runs.viz.index import Index, arrays, known, query, tags
from nmoe.pure.watch import curve

AXES = ("step", "tokens", "time", "clock", "flops")
HOUR_S = 3600.0
MAX_CELLS = 60_000
"""Cells of all runs of a chart together."""

MAX_PLACE = 1e150
"""Of a point on an axis: the product of two must be finite, for a logarithmic grid."""

MAX_NONFINITE = 500
"""Places of a curve that are marked as not finite."""


@attrs.frozen(kw_only=True)
class Axis:
    """What a chart asks for."""

    x: str = "step"
    smooth: float = 0.0  # steps
    points: int = 800  # cells of a run
    log_x: bool = False
    bands: bool = True
    low: float | None = None
    high: float | None = None


@attrs.frozen(kw_only=True)
class Extent:
    """Where the points of one run lie on an axis."""

    low: float
    high: float
    shown: int  # points in the stretch asked for
    last: float | None  # of them
    min: float | None  # of them, where finite
    max: float | None
    nonfinite: int


def series(index: Index, names: Sequence[str], tag: str, axis: Axis) -> api.Series:
    """One tag of some runs, smoothed, then thinned, on one grid.

    What is not smoothed and has more points than cells is thinned by the index, so that its points need not be taken
    out of it; the rest here, because a mean of what came before needs every point.
    """
    numbers = known(index, names)
    column = tags(index).get(tag)
    extents = {} if column is None else _extents(index, numbers, column, axis)
    curves: list[api.Curve] = []
    grid = None
    if column is not None and extents:
        low = min(extent.low for extent in extents.values()) if axis.low is None else axis.low
        high = max(extent.high for extent in extents.values()) if axis.high is None else axis.high
        cells = _cells(axis, len(extents))
        if axis.smooth == 0 and low < high and max(extent.shown for extent in extents.values()) > cells:
            grid = _grid(low, high, cells, axis)
        if grid is not None:
            named = {run: numbers[run] for run in numbers if run in extents}
            curves = _thinned_by_index(index, named, column, axis, (low, high), cells, extents)
        else:
            sampled = points(index, numbers, column, axis)
            grid = grid_of([x for x, _, _ in sampled.values()], axis, len(sampled))
            curves = [_curve(numbers[run], sampled[run], grid, axis, extents[run]) for run in numbers if run in sampled]
    return api.Series(
        tag=tag,
        x=[] if grid is None else grid[1].tolist(),
        curves=curves,
        without=[name for run, name in numbers.items() if run not in extents],
    )


def _extents(index: Index, numbers: Mapping[int, str], column: str, axis: Axis) -> dict[int, Extent]:
    """Run -> where its points lie; without the runs that have none on this axis."""
    rows = query(
        index,
        "select run, min(x), max(x), count(*) filter (inside), arg_max(y, step) filter (inside), "
        "count(*) filter (not isfinite(y)), min(y) filter (inside and isfinite(y)), "
        "max(y) filter (inside and isfinite(y)) "
        f"from (select *, x between ? and ? as inside from ({_points(axis, column)})) group by run",
        *_stretch(axis),
        *chosen(index, numbers, axis),
    )
    return {
        run: Extent(low=low, high=high, shown=shown, last=last, nonfinite=nonfinite, min=least, max=most)
        for run, low, high, shown, last, nonfinite, least, most in rows
    }


def _points(axis: Axis, column: str) -> str:
    """Places `x` and values `y` of some runs as a query, bound by `chosen`; of each step the newest attempt's."""
    return (
        f"select * from (select m.run, m.step, {place(axis)} as x, {column} as y {CHOSEN} "
        f"where m.rank = 0 and m.step < v.until and {column} is not null) "
        f"where x between 0 and {MAX_PLACE}{' and x > 0' if axis.log_x else ''}"
    )


def _stretch(axis: Axis) -> tuple[float, float]:
    """Ends of what is asked for."""
    return -math.inf if axis.low is None else axis.low, math.inf if axis.high is None else axis.high


def _thinned_by_index(
    index: Index,
    numbers: Mapping[int, str],
    column: str,
    axis: Axis,
    ends: tuple[float, float],
    cells: int,
    extents: Mapping[int, Extent],
) -> list[api.Curve]:
    """What `curve.thin` makes of unsmoothed points, made by the index."""
    low, high = ends
    share = "ln(x / ?) / ln(? / ?)" if axis.log_x else "(x - ?) / (? - ?)"
    bands = ", min(y), max(y)" if axis.bands else ""
    got = arrays(
        index,
        f"select run, cell, avg(y) as mean{bands} from (select run, case when isfinite(y) then y end as y, "
        f"greatest(0, least({cells} - 1, floor({cells} * {share})))::integer as cell "
        f"from ({_points(axis, column)}) where x between ? and ?) group by run, cell",
        *((low, high, low)),
        *chosen(index, numbers, axis),
        low,
        high,
    )
    rows = {run: row for row, run in enumerate(numbers)}
    cell = np.array([rows[run] for run in got["run"].tolist()], np.int64), np.ma.getdata(got["cell"])
    spread = {name: np.full((len(rows), cells), np.nan) for name in list(got)[2:]}
    for name, values in spread.items():
        values[cell] = np.ma.filled(got[name], np.nan)
    mean, *extremes = spread.values()
    lost = _nonfinite(index, {run: numbers[run] for run in numbers if extents[run].nonfinite}, column, axis)
    return [
        api.Curve(
            run=name,
            mean=api.numbers(mean[row]),
            low=api.numbers(extremes[0][row]) if axis.bands else [],
            high=api.numbers(extremes[1][row]) if axis.bands else [],
            smooth=[],
            last=api.plain(extents[run].last),
            min=extents[run].min,
            max=extents[run].max,
            nonfinite=lost.get(run, []),
        )
        for row, (run, name) in enumerate(numbers.items())
    ]


def _nonfinite(index: Index, numbers: Mapping[int, str], column: str, axis: Axis) -> dict[int, list[float]]:
    """Run -> places of the points that are not finite."""
    if not numbers:
        return {}
    rows = query(
        index,
        f"select run, list_sort(list(x))[:{MAX_NONFINITE}] from ({_points(axis, column)}) "
        "where not isfinite(y) and x between ? and ? group by run",
        *chosen(index, numbers, axis),
        *_stretch(axis),
    )
    return dict(rows)


def points(
    index: Index, numbers: Mapping[int, str], column: str, axis: Axis
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Run -> places on the axis, steps and values of a column; of each step what the newest attempt says."""
    got = arrays(
        index,
        _points(axis, column),
        *chosen(index, numbers, axis),
    )
    run, step, x, y = (np.ma.getdata(got[key]) for key in ("run", "step", "x", "y"))
    # Rows come nearly in order, which a stable sort makes use of.
    key = (run.astype(np.int64) << 40) + step
    if np.any(np.diff(key) < 0):
        order = np.argsort(key, kind="stable")
        run, step, x, y = run[order], step[order], x[order], y[order]
    if len(run) == 0:
        return {}
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    return {
        int(run[start]): (x[start:stop], step[start:stop].astype(np.float64), y[start:stop])
        for start, stop in zip(starts, (*starts[1:], len(run)), strict=True)
    }


CHOSEN = (
    "from metrics m join valid v using (run, attempt) "
    "join (select unnest(?::integer[]) as run, unnest(?::double[]) as per_step, unnest(?::double[]) as flops) c "
    "using (run)"
)
"""Metrics of some runs, with the attempts `v` and the rates `c`; bound by `chosen`."""


def chosen(index: Index, numbers: Mapping[int, str], axis: Axis) -> tuple[list[Any], list[Any], list[Any]]:
    """Runs, tokens of a step and FLOPs of a token; of the FLOPs only where the axis needs them."""
    by_run = {
        run: tokens / step
        for run, tokens, step in query(index, "select run, value, step from latest where tag = -2 and step > 0")
    }
    flops = [
        api.number(run_status.read(index.root / name).get("flops_per_token")) if axis.x == "flops" else None
        for name in numbers.values()
    ]
    return list(numbers), [by_run.get(run) for run in numbers], flops


def place(axis: Axis) -> str:
    """The axis as an expression over `CHOSEN`."""
    tokens = "coalesce(m.tokens, m.step * c.per_step)"
    expressions = {
        "step": "m.step::double",
        "tokens": tokens,
        "time": f"(v.before_s + m.elapsed_s) / {HOUR_S}",
        "clock": "m.time_s",
        "flops": f"{tokens} * c.flops",
    }
    return expressions[axis.x]


def grid_of(places: Sequence[np.ndarray], axis: Axis, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Borders and places of a grid for some curves: the points themselves while they are few."""
    if not places:
        return None
    low = min(x[0] for x in places) if axis.low is None else axis.low
    high = max(x[-1] for x in places) if axis.high is None else axis.high
    if not low <= high:
        return None
    cells = _cells(axis, count)
    # More than `cells` of one curve are more than `cells` in all, however many there are.
    own = np.unique(np.concatenate([_within(x, low, high)[: cells + 1] for x in places]))
    if len(own) == 0:
        return None
    if len(own) <= cells:
        return np.concatenate([own[:1], (own[1:] + own[:-1]) / 2, own[-1:]]), own
    return _grid(low, high, cells, axis)


def _cells(axis: Axis, count: int) -> int:
    """Cells of each of `count` curves."""
    return max(100, min(axis.points, MAX_CELLS // count))


def _grid(low: float, high: float, cells: int, axis: Axis) -> tuple[np.ndarray, np.ndarray] | None:
    """Borders and middles of equal cells; None where there are none."""
    if (axis.log_x and low <= 0) or not math.isfinite(high - low):
        return None
    borders = curve.edges(low, high, cells, log=axis.log_x)
    return borders, np.sqrt(borders[1:] * borders[:-1]) if axis.log_x else (borders[1:] + borders[:-1]) / 2


def _within(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return x[(x >= low) & (x <= high)]


def _curve(
    name: str,
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
    grid: tuple[np.ndarray, np.ndarray] | None,
    axis: Axis,
    extent: Extent,
) -> api.Curve:
    x, step, y = points
    if grid is None:
        return api.Curve(run=name, mean=[], low=[], high=[], smooth=[], last=None, min=None, max=None, nonfinite=[])
    thinned = curve.thin(x, y, curve.smooth(step, y, axis.smooth), grid[0])
    return api.Curve(
        run=name,
        mean=api.numbers(thinned.mean),
        low=api.numbers(thinned.low) if axis.bands else [],
        high=api.numbers(thinned.high) if axis.bands else [],
        smooth=api.numbers(thinned.smooth) if axis.smooth > 0 else [],
        last=api.plain(extent.last),
        min=extent.min,
        max=extent.max,
        nonfinite=thinned.nonfinite[:MAX_NONFINITE].tolist(),
    )
