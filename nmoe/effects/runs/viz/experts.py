"""From the index to answers about experts: what each layer's mixture does, and which experts do the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nmoe.effects.runs import status as run_status
from nmoe.effects.runs.viz import api, curves, views
from nmoe.effects.runs.viz.index import Index, arrays, known, query
from nmoe.errors import InputError
from nmoe.pure.watch import curve

MAX_COLUMNS = 240
"""Steps in a heat map over time."""

VALID = "from loads l join valid v using (run, attempt) where l.run = ? and l.step < v.until"


def experts(index: Index, name: str) -> api.Experts:
    """What there is to see of a run's experts."""
    (run,) = known(index, [name])
    record, config = run_status.read(index.root / name), views.config_of(index.root / name)
    newest = query(
        index,
        "select m.step, m.experts from metrics m join valid v using (run, attempt) where m.run = ? and m.rank = 0 "
        "and m.experts is not null and m.step < v.until order by m.step desc limit 1",
        run,
    )
    steps = [step for (step,) in query(index, f"select distinct l.step {VALID} order by l.step", run)]
    step, reported = newest[0] if newest else (None, {})
    latest = {tag: [_finite(value) for value in values or []] for tag, values in _items(reported) if tag != "layer"}
    return api.Experts(
        run=name,
        layers=_layers(index, run, record, dict(_items(reported))),
        num_experts=_whole(record.get("num_experts", config.get("model.moe.num_experts"))),
        top_k=_whole(record.get("top_k", config.get("model.moe.top_k"))),
        tags=list(latest),
        latest=latest,
        step=step,
        steps=steps,
    )


def layers(index: Index, name: str, tag: str, axis: curves.Axis) -> api.Layers:
    """A quantity of the experts of each layer, smoothed and thinned."""
    numbers = known(index, [name])
    got = arrays(
        index,
        f"select x, step, unnest(q) as y, generate_subscripts(q, 1) as place from "
        f"(select {curves.place(axis)} as x, m.step, m.experts[?] as q {curves.CHOSEN} "
        f"where m.rank = 0 and m.step < v.until and m.experts is not null) "
        f"where x between 0 and {curves.MAX_PLACE} order by step",
        tag,
        *curves.chosen(index, numbers, axis),
    )
    x, step, y, at = (np.ma.getdata(got[key]) for key in ("x", "step", "y", "place"))
    y = np.where(np.ma.getmaskarray(got["y"]), np.nan, y.astype(np.float64))
    count = int(at.max()) if len(at) else 0
    # A step has a row a layer: the grid is made of its places, each once.
    grid = curves.grid_of([np.unique(x)], axis, max(count, 1)) if len(x) else None
    if grid is None:
        return api.Layers(tag=tag, x=[], layers=[], values=[])
    values: list[api.Numbers] = []
    for layer in range(1, count + 1):
        here = at == layer
        smoothed = curve.smooth(step[here].astype(np.float64), y[here], axis.smooth)
        thinned = curve.thin(x[here].astype(np.float64), y[here], smoothed, grid[0])
        values.append(api.numbers(thinned.smooth if axis.smooth > 0 else thinned.mean))
    named = experts(index, name).layers
    return api.Layers(
        tag=tag, x=grid[1].tolist(), layers=named if len(named) == count else list(range(count)), values=values
    )


def load(index: Index, name: str, step: int | None) -> api.Load:
    """Rows of each expert by layer at the logged step next to `step`; None: the last.

    Raises:  InputError when the run has reported no loads.
    """
    (run,) = known(index, [name])
    order, value = ("l.step desc", []) if step is None else ("abs(l.step - ?)", [step])
    rows = query(
        index, f"select l.step, l.layers, l.load {VALID} order by {order}, l.attempt desc limit 1", run, *value
    )
    if not rows:
        raise InputError(_no_loads(name))
    at_step, named, loads = rows[0]
    return api.Load(
        run=name, rows=named, step=at_step, load=[[count or 0 for count in counts or []] for counts in loads]
    )


def load_history(index: Index, name: str, layer: int) -> api.Load:
    """Rows of each expert of one layer by step, at most `MAX_COLUMNS` steps.

    Raises:  InputError when the run has reported no loads, or none of this layer.
    """
    (run,) = known(index, [name])
    rows = query(
        index,
        f"with found as (select l.step, l.load[list_position(l.layers, ?::integer)] as load {VALID} "
        "and list_contains(l.layers, ?::integer)), "
        "numbered as (select *, row_number() over (order by step) as n, count(*) over () as total from found) "
        "select step, load from numbered where n = total or (n - 1) % ceil(total / ?)::bigint = 0 order by step",
        layer,
        run,
        layer,
        MAX_COLUMNS,
    )
    if not rows:
        raise InputError(f"{_no_loads(name)}, or choose another layer than {layer}")
    return api.Load(
        run=name,
        rows=[step for step, _ in rows],
        step=None,
        load=[[n or 0 for n in counts or []] for _, counts in rows],
    )


def _no_loads(name: str) -> str:
    return f"{name}: expected loads of its experts, got none; wait for the next, or log arrays"


def _items(reported: Any) -> list[tuple[str, list[float | None] | None]]:
    return list(reported.items()) if isinstance(reported, Mapping) else []


def _layers(index: Index, run: int, record: Mapping[str, Any], reported: Mapping[str, Any]) -> list[int]:
    """The layers that have a mixture, from what the run says of itself."""
    for layers in (record.get("layers"), reported.get("layer")):
        if isinstance(layers, list) and all(_is_finite(layer) for layer in layers):
            return [int(layer) for layer in layers]
    rows = query(index, "select layers from loads where run = ? limit 1", run)
    return list(rows[0][0]) if rows else []


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that `int` takes; an integer of any length is."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
