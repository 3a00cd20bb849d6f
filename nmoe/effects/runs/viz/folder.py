"""From a run folder to answers about what lies in it: its checkpoints, and what it printed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from nmoe.effects.checkpoint import manifest
from nmoe.effects.record.names import CHECKPOINTS, CONFIG, CONSOLE
from nmoe.effects.record.reading import open_regular
from nmoe.effects.runs.viz import api
from nmoe.effects.runs.viz.index import Index, known, query
from nmoe.errors import InputError

MAX_CONSOLE_BYTES = 256 << 10
"""Of the end of what a run printed, that is shown."""

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""Colours and moves of the cursor."""


def checkpoints(index: Index, name: str) -> api.Checkpoints:
    """The checkpoints that a run has reported and still holds, newest first, each with the command that resumes it."""
    (run,) = known(index, [name])
    folder = index.root / name
    rows = query(
        index,
        "select event, attempt, step, time_s, line from events where run = ? and event in ('checkpoint', 'validation') "
        "order by time_s, rowid",
        run,
    )
    losses = [(step, api.number(json.loads(line).get("loss"))) for event, _, step, _, line in rows if event[0] == "v"]
    saved: dict[str, api.SavedState] = {}
    gone: set[str] = set()
    for event, attempt, step, time_s, line in rows:
        fields: Mapping[str, Any] = json.loads(line) if event == "checkpoint" else {}
        called = str(fields.get("checkpoint", ""))
        # an event of a stranger may name any path: what is no name of a checkpoint is not looked at
        if step is None or manifest.name_fields(called) is None:
            continue
        place = folder / CHECKPOINTS / called
        if not (place / manifest.FILE).is_file():
            gone.add(called)
            continue
        saved[called] = api.SavedState(
            name=called,
            step=step,
            attempt=attempt,
            time=time_s,
            validation_loss=next((loss for at, loss in reversed(losses) if at is not None and at <= step), None),
            size_bytes=_whole(fields.get("bytes")),
            seconds=api.number(fields.get("seconds")),
            command=shlex.join(["nmoe", "run", str(folder / CONFIG), f"--train.resume={place}"]),
        )
    newest = sorted(saved.values(), key=lambda each: (each.step, each.name), reverse=True)
    return api.Checkpoints(run=name, checkpoints=newest, deleted=len(gone))


def console(index: Index, name: str) -> api.Console:
    """The end of what a run printed, as lines of text without the codes of a terminal.

    Raises:  InputError when its file cannot be read.
    """
    known(index, [name])
    path = index.root / name / CONSOLE
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            begin = file.seek(max(0, size - MAX_CONSOLE_BYTES))
            content = file.read(MAX_CONSOLE_BYTES)
    except FileNotFoundError:
        return api.Console(run=name, lines=[], left_out_bytes=0, is_there=False)
    except OSError as error:
        raise InputError(f"{path}: expected a file to read, got {error.strerror}; fix or remove it") from error
    if begin:
        first = content.find(b"\n") + 1
        begin, content = begin + first, content[first:]
    text = ESCAPE.sub("", content.decode("utf-8", "replace"))
    # A line that a carriage return wrote anew is what it was last.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return api.Console(run=name, lines=lines[:-1] if lines[-1] == "" else lines, left_out_bytes=begin, is_there=True)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
