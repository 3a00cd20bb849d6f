"""What became of a run: its `run.json` and its events, held against the clock and the processes of this host."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "run.json"
MISSED = 3
"""Heartbeats that may fail to come before a run counts as lost."""

GRACE_S = 5.0


def read(folder: Path) -> Mapping[str, Any]:
    """What `run.json` holds; nothing when there is none, or none that is whole."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def status(record: Mapping[str, Any], last: Mapping[str, Any] | None, host: str, now: datetime) -> str:
    """One word, or `unknown, on HOST`.

    record   what run.json holds, empty for a run without one
    last     the newest event that is a start or an end
    host     where the run was started
    returns  the status told at the end; else `running`, `starting`, `lost` (its heartbeat has stopped), `crashed` (its
             process is gone), `not started`, or unknown without a heartbeat on another host
    """
    if last is not None and last.get("event") == "end":
        ended = str(last.get("status", "ended"))
        told = record.get("status")
        # A resumed run writes run.json before its start event, and an end has the attempt that ended.
        if told not in ("starting", "running") or _integer(record.get("attempt")) <= _integer(last.get("attempt")):
            return ended
    told = record.get("status")
    if told is None and last is None:
        return "not started"
    if told is not None and told not in ("starting", "running"):
        return str(told)
    pid = record.get("pid") if told is not None else (last or {}).get("pid")
    here = str(record.get("host") or host) == platform.node()
    if here and isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 1 << 31:
        if not alive(pid):
            return "crashed"
    elif told is None:
        return f"unknown, on {host}"
    age = heartbeat_age_s(record, now)
    every = record.get("heartbeat_every_s")
    if age is not None and isinstance(every, int | float) and age > MISSED * every + GRACE_S:
        return "lost"
    return str(told or "running")


def heartbeat_age_s(record: Mapping[str, Any], now: datetime) -> float | None:
    """Seconds since a run's last heartbeat; None when it has told none."""
    try:
        return (now - datetime.fromisoformat(str(record["heartbeat"])).astimezone(UTC)).total_seconds()
    except (KeyError, ValueError):
        return None


def alive(pid: int) -> bool:
    """Whether a process of this host has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0
