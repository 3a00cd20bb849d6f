"""What a run's mixture planned and what was read of it.

The order of a mixture follows from its quotas alone, so that the step tells what was read: a run tells its plan once,
in an event, and nothing of it while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nmoe.effects.runs.viz import api
from nmoe.effects.runs.viz.index import Index, known, query
from nmoe.effects.runs.viz.views import config_of
from nmoe.errors import InputError
from nmoe.pure.data.order import kept
from nmoe.pure.data.stages import Stage, stages_of, windows_read

MAX_SOURCES = 10_000
MAX_WINDOWS = 1 << 62
MAX_STRETCHES = 1000
"""Stretches that rewinds left out: each is a rewind, or a part of one."""


def mixture(index: Index, name: str) -> api.Mixture:
    """The plan of a run's mixture against what its newest attempt has read, stage by stage.

    Raises:  InputError when the event that tells the plan is none.
    """
    (run,) = known(index, [name])
    config = {key: value for key, value in config_of(index.root / name).items() if key.startswith("data.")}
    events = query(
        index,
        "select attempt, line from events where run = ? and event = 'mixture' "
        "order by attempt desc, rowid desc limit 1",
        run,
    )
    if not events:
        return api.Mixture(run=name, step=None, sources=[], config=api.plain(config))
    attempt, line = events[0]
    ((last,),) = query(index, "select max(step) from metrics where run = ? and attempt = ? and rank = 0", run, attempt)
    plan = json.loads(line)
    try:
        began = _whole(plan["step"])
        step = max(began, last or 0)
        position = _whole(plan["cursor"]) + (step - began) * _whole(plan["batch_size"])
        sources = _sources(plan, position)
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(
            f"{name}: expected an event `mixture` with the quotas of its stages, got another ({error}); fix the line"
        ) from error
    return api.Mixture(run=name, step=step, sources=sources, config=api.plain(config))


def _sources(plan: Mapping[str, Any], position: int) -> list[api.Source]:
    """A row a stage and source that it reads.

    position  windows read, without those that rewinds left out
    """
    length = _whole(plan["sequence_length"])
    if len(plan["sources"]) * len(plan["stages"]) > MAX_SOURCES:
        raise ValueError(f"{len(plan['sources'])} sources in {len(plan['stages'])} stages")
    sources = [(str(entry["name"]), _whole(entry["windows"])) for entry in plan["sources"]]
    quotas = [(str(stage["name"]), tuple(_whole(entry) for entry in stage["windows"])) for stage in plan["stages"]]
    if not quotas or any(len(entry) != len(sources) for _, entry in quotas) or not all(entry for _, entry in sources):
        raise ValueError("no stage, quotas of other sources, or an empty source")
    stages = stages_of(quotas)
    stretches = _stretches(plan.get("left_out", []), stages[-1].end())
    read_of = _windows(stages, kept(0, position, stretches))
    left_out_of = _windows(stages, [(first, end - first) for first, end in stretches])
    rows: list[api.Source] = []
    for stage, read, without in zip(stages, read_of, left_out_of, strict=True):
        for (name, windows), quota, taken, lost in zip(sources, stage.quotas, read, without, strict=True):
            if quota:
                rows.append(
                    api.Source(
                        stage=stage.name,
                        name=name,
                        planned=quota * length,
                        read=taken * length,
                        left_out=lost * length,
                        planned_share=quota / stage.turns.count,
                        read_share=taken / sum(read) if sum(read) else None,
                        passes=taken / windows,
                    )
                )
    return rows


def _windows(stages: Sequence[Stage], pieces: Sequence[tuple[int, int]]) -> list[list[int]]:
    """How many windows each stage takes from each source in some stretches of the stream.

    pieces  first position and length
    """
    counts = [[0] * len(stage.quotas) for stage in stages]
    for first, length in pieces:
        before, after = windows_read(stages, first), windows_read(stages, first + length)
        for count, low, high in zip(counts, before, after, strict=True):
            for source in range(len(count)):
                count[source] += high[source] - low[source]
    return counts


def _stretches(value: Any, end: int) -> tuple[tuple[int, int], ...]:
    """First and end of each stretch of the stream that nobody reads, in order, apart from each other."""
    if not isinstance(value, list) or len(value) > MAX_STRETCHES:
        raise ValueError(f"left_out {value!r}"[:40])
    stretches = tuple((_whole(first), _whole(last)) for first, last in value)
    places = [0, *(place for stretch in stretches for place in stretch), end]
    if places != sorted(places) or any(first == last for first, last in stretches):
        raise ValueError(f"left_out {value!r}"[:40])
    return stretches


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_WINDOWS:
        raise ValueError(f"{value!r}"[:40])
    return value
