"""Whether the process that writes a folder still lives: by its id on this host, by its heartbeat from another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nmoe.effects.record.reading import utc

MISSED = 3
"""Heartbeats that may fail to come before a run counts as lost: a slow disk delays one, seldom three."""

GRACE_S = 5.0
"""Added to them, for clocks of two hosts differ."""


def process_start(pid: int) -> str:
    """When a process was started, in clock ticks after boot; "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_runs(pid: int, started: str | None) -> bool:
    """Whether a process of this host still runs.

    started  what `process_start` said of it; another process may have its id by now. None: not known
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return started in (None, process_start(pid))
    return started in (None, process_start(pid))


def heartbeat_age_s(record: Mapping[str, Any], now: datetime) -> float | None:
    """Seconds since the last heartbeat in a `run.json`; None when it has none."""
    try:
        return (now - utc(record["heartbeat"])).total_seconds()
    except (KeyError, ValueError):
        return None


def lost_after_s(every_s: float) -> float:
    """Age of a heartbeat, in seconds, above which its process counts as dead.

    every_s  `log.heartbeat_every_s` of the run
    """
    return MISSED * every_s + GRACE_S


def heart_stopped(record: Mapping[str, Any], now: datetime) -> bool:
    """Whether the heartbeat in a `run.json` is so old that its process counts as dead."""
    age, every = heartbeat_age_s(record, now), record.get("heartbeat_every_s")
    return age is not None and isinstance(every, int | float) and age > lost_after_s(every)
