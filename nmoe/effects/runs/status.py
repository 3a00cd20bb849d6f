"""What became of a run: its `run.json` and its events, held against the clock and the processes of this host."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nmoe.effects.record import names
from nmoe.effects.record.alive import heart_stopped, process_runs
from nmoe.effects.record.lines import Line
from nmoe.effects.record.reading import json_object, read_bytes
from nmoe.errors import InputError

GOING = ("starting", "running")
"""Words for a run from which more will come."""


def read(folder: Path) -> Mapping[str, Any]:
    """What `run.json` holds; nothing when there is none, or none that is whole."""
    try:
        return json_object(read_bytes(folder / names.RUN))
    except (OSError, ValueError):
        return {}


def status(record: Mapping[str, Any], last: Mapping[str, Any] | None, host: str, now: datetime) -> str:
    """One word, or `unknown, on HOST`.

    record   what run.json holds, empty for a run without one
    last     the newest event that is a start or an end
    host     where the run was started
    returns  the last recorded status; else `running`, `starting`, `lost` (its heartbeat has stopped), `crashed` (its
             process is gone), `not started`, or unknown without a heartbeat on another host
    """
    if last is not None and last.get("event") == "end":
        ended = str(last.get("status", "ended"))
        recorded = record.get("status")
        # A resumed run writes run.json before its start event, and an end has the attempt that ended.
        if recorded not in GOING or _integer(record.get("attempt")) <= _integer(last.get("attempt")):
            return ended
    recorded = record.get("status")
    if recorded is None and last is None:
        return "not started"
    if recorded is not None and recorded not in GOING:
        return str(recorded)
    pid = record.get("pid") if recorded is not None else (last or {}).get("pid")
    here = str(record.get("host") or host) == platform.node()
    if here and isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 1 << 31:
        started = record.get("process_start")
        if not process_runs(pid, started if isinstance(started, str) else None):
            return "crashed"
    elif recorded is None:
        return f"unknown, on {host}"
    if heart_stopped(record, now):
        return "lost"
    return str(recorded or "running")


def of(folder: Path, events: Sequence[Line], host: str) -> str:
    """What became of the last attempt at the run in a folder, as `status` says it.

    host     where the run was started

    Raises:  InputError when a start event has no process.
    """
    last = next((line for line in reversed(events) if line.fields.get("event") in ("start", "end")), None)
    if last is not None and last.fields["event"] == "start":
        pid = last.fields.get("pid")
        if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
            raise InputError(f"{last.where}: expected the pid of a process in a start event, got {pid!r}; fix the line")
    return status(read(folder), last.fields if last else None, host, datetime.now(UTC))


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0
