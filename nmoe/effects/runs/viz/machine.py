"""From the index to answers about the machine: where a step's time is spent on each rank, and GPU telemetry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nmoe.effects.record.reading import MAX_SECONDS
from nmoe.effects.runs.viz import api, curves
from nmoe.effects.runs.viz.index import Index, known, query, tags

LAST_LINES = 50
"""Logged steps in a mean of times."""

PARTS = ("data", "gather", "forward", "exchange", "backward", "reduce", "optimizer", "log", "checkpoint")
"""Parts of a step in the order in which they happen."""

WAITED = ("gather", "exchange", "reduce")
"""Parts of a step in which a rank waits for others."""

MAX_LINES = 1000
"""Telemetry lines in a chart."""

QUANTITIES = (
    *("utilization", "memory_used_bytes", "power_w", "temperature_c", "sm_clock_mhz", "memory_clock_mhz"),
    *("ecc_corrected", "ecc_uncorrected"),
)


def timing(index: Index, name: str) -> api.Timing:
    """Where the time of a step goes, by rank: means of the last logged steps."""
    (run,) = known(index, [name])
    columns = tags(index)
    parts = {tag: columns[tag] for tag in sorted((tag for tag in columns if tag.startswith("time/")), key=_order)}
    if not parts:
        return api.Timing(run=name, parts=[], ranks=[], slowest=None, steps=0)
    # Times that no step takes are left out, so that their mean is finite.
    wanted = "".join(f", avg({column}) filter ({column} between 0 and {MAX_SECONDS})" for column in parts.values())
    present = " or ".join(f"{column} is not null" for column in parts.values())
    rows = query(
        index,
        f"select rank, count(*){wanted} from (select *, row_number() over (partition by rank order by attempt desc, "
        f"step desc) as back from metrics where run = ? and ({present})) where back <= ? group by rank order by rank",
        run,
        LAST_LINES,
    )
    used = [place for place in range(len(parts)) if any(row[2 + place] is not None for row in rows)]
    ranks = [
        api.RankTime(
            rank=row[0],
            total_s=sum(row[2 + place] or 0.0 for place in used),
            parts_s=[row[2 + place] for place in used],
        )
        for row in rows
    ]
    names = [_part(tag) for tag in parts]
    return api.Timing(
        run=name,
        parts=[names[place] for place in used],
        ranks=ranks,
        slowest=_slowest(ranks, [names[place] for place in used]),
        steps=max((row[1] for row in rows), default=0),
    )


def _order(tag: str) -> tuple[int, str]:
    """Where a part of a step stands; an unknown one is last."""
    part = _part(tag)
    return (PARTS.index(part) if part in PARTS else len(PARTS), part)


def _part(tag: str) -> str:
    return tag.removeprefix("time/").removesuffix("_s")


def _slowest(ranks: list[api.RankTime], parts: list[str]) -> int | None:
    """The rank that the others wait for: its own work takes longest."""
    if len(ranks) < 2:
        return None
    own = [place for place, part in enumerate(parts) if part not in WAITED]
    return max(ranks, key=lambda rank: sum(rank.parts_s[place] or 0.0 for place in own)).rank


def gpus(index: Index, name: str) -> api.Gpus:
    """The GPUs of a run: as last seen, and over time."""
    (run,) = known(index, [name])
    lines = query(
        index,
        "with numbered as (select t.rank, t.time_s, v.before_s + t.elapsed_s as elapsed_s, t.line, "
        "row_number() over (partition by t.rank order by t.time_s desc) as back, "
        "count(*) over (partition by t.rank) as total "
        "from telemetry t left join valid v using (run, attempt) where run = ?) "
        "select rank, time_s, elapsed_s, line from numbered where (back - 1) % ceil(total / ?)::bigint = 0 "
        "order by time_s",
        run,
        MAX_LINES,
    )
    samples = [(rank, time_s, elapsed_s, json.loads(line)) for rank, time_s, elapsed_s, line in lines]
    last = {rank: (time_s, fields) for rank, time_s, _, fields in samples}
    seen = {
        (rank, _index(gpu, place)): _gpu(rank, place, gpu)
        for rank, (_, fields) in last.items()
        for place, gpu in enumerate(_gpus(fields))
    }
    about = query(index, "select line from events where run = ? and event = 'gpus' order by time_s desc limit 1", run)
    fields = json.loads(about[0][0]) if about else {}
    first = next((time_s for _, time_s, _, _ in samples if time_s is not None), 0.0)
    return api.Gpus(
        run=name,
        driver=str(fields.get("driver") or ""),
        cuda=str(fields.get("cuda") or ""),
        seen=max((time_s for time_s, _ in last.values() if time_s is not None), default=None),
        gpus=[seen[key] for key in sorted(seen)],
        x=[
            (((time_s or first) - first) if elapsed_s is None else elapsed_s) / curves.HOUR_S
            for _, time_s, elapsed_s, _ in samples
        ],
        curves=_curves(samples),
        host=api.plain(next((fields.get("host") for _, fields in last.values()), None) or {}),
    )


def _curves(samples: list[tuple[int, float | None, float | None, dict[str, Any]]]) -> list[api.GpuCurve]:
    """One chart a quantity; a line a GPU, or one for the host."""
    keys = sorted({(rank, _index(item, place)) for rank, _, _, f in samples for place, item in enumerate(_gpus(f))})
    by_line = [
        {(rank, _index(item, place)): item for place, item in enumerate(_gpus(fields))}
        for rank, _, _, fields in samples
    ]
    names = [
        f"GPU {number}" if len({r for r, _ in keys}) == 1 else f"rank {rank} GPU {number}" for rank, number in keys
    ]
    curves = [
        api.GpuCurve(
            quantity=quantity,
            names=names,
            values=[[_float(gpus.get(key, {}).get(quantity)) for gpus in by_line] for key in keys],
        )
        for quantity in QUANTITIES
    ]
    host_keys = dict.fromkeys(
        key for _, _, _, fields in samples for key in _host(fields) if not key.endswith("_total_bytes")
    )
    curves += [
        api.GpuCurve(quantity=f"host {key}", names=["host"], values=[[_float(_host(f).get(key)) for *_, f in samples]])
        for key in host_keys
    ]
    return [item for item in curves if any(value is not None for values in item.values for value in values)]


def _gpu(rank: int, place: int, gpu: Mapping[str, Any]) -> api.Gpu:
    throttle = gpu.get("throttle")
    return api.Gpu(
        rank=rank,
        index=_index(gpu, place),
        name=str(gpu.get("name", "")),
        uuid=str(gpu.get("uuid", "")),
        power_limit_w=_float(gpu.get("power_limit_w")),
        memory_total_bytes=_float(gpu.get("memory_total_bytes")),
        throttle=[str(reason) for reason in throttle] if isinstance(throttle, list) else [],
        **{quantity: _float(gpu.get(quantity)) for quantity in QUANTITIES},
    )


def _gpus(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    gpus = fields.get("gpus")
    return [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []


def _host(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    host = fields.get("host")
    return host if isinstance(host, dict) else {}


def _index(gpu: Mapping[str, Any], place: int) -> int:
    index = gpu.get("index")
    return index if isinstance(index, int) else place


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None
