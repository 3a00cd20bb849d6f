"""The run folder: what is written while a run goes on, and the lines on the screen.

`metrics.rank<r>.jsonl` and `events.jsonl` are append-only, one JSON object a line; numbers that are not finite are the
strings "nan", "inf" and "-inf", because JSON has none of them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import attrs

from nmoe.effects import files
from nmoe.effects.record import names
from nmoe.errors import InputError


def now() -> str:
    """The time in UTC, ISO 8601 to the millisecond. A label, never a measure of duration."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def plain(value: Any) -> Any:
    """`value` with every number that JSON cannot hold as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def _unheard(event: Mapping[str, Any]) -> None:
    """For a log nobody listens to."""


@attrs.frozen(kw_only=True)
class Log:
    """Where a run writes what happens to it; threads may share it."""

    folder: Path
    attempt: int
    metrics_file: TextIO
    events_file: TextIO | None  # None: another rank tells the events
    heard: Callable[[Mapping[str, Any]], None] = _unheard  # called with each event after it is written
    lock: threading.RLock = attrs.field(factory=threading.RLock)  # a line is written whole

    def metrics(self, **fields: Any) -> None:
        """Append one line of metrics. Writes: this rank's metrics."""
        self.append(self.metrics_file, fields)

    def event(self, name: str, **fields: Any) -> None:
        """Append one event. Writes: events.jsonl, on the first rank."""
        if self.events_file is None:
            return
        self.append(self.events_file, {"event": name, **fields})
        self.heard({"event": name, **fields})

    def append(self, file: TextIO, fields: Mapping[str, Any]) -> None:
        """Append one line with the attempt and the time. Writes: `file`."""
        told = {"attempt": self.attempt, "time": now(), **fields}
        try:
            line = json.dumps(told, allow_nan=False)
        except ValueError:  # a number that is not finite; to look for one each time costs more than the text does
            line = json.dumps(plain(told), allow_nan=False)
        with self.lock:
            file.write(line + "\n")
            file.flush()

    def sync(self) -> None:
        """Bring the lines so far to the disk. Writes: what the operating system still holds of both files."""
        for file in (self.metrics_file, self.events_file):
            if file is not None:
                os.fsync(file.fileno())


def create_folder(root: Path, name: str, contents: Mapping[str, str]) -> Path:
    """A new run folder with these text files in it; whole or absent.

    Raises:  InputError when the name is taken or the folder cannot be written.
    """
    folder = root / name
    temporary = root / f".{name}.new"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            raise InputError(f"run.name: a run folder is new, got {folder}, which exists; choose another name")
        temporary.mkdir(exist_ok=True)
        for file, text in contents.items():
            files.write_text(temporary / file, text)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"run.root: run folders can be written, got {error.strerror} at {error.filename or root}; "
            "choose another run.root or fix its permissions"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return folder


@contextmanager
def open_log(folder: Path, attempt: int, rank: int = 0) -> Iterator[Log]:
    """Open the append-only files of a run folder: a rank's own metrics, and on the first rank the events."""
    with ExitStack() as scope:
        metrics = scope.enter_context(open(folder / names.metrics(rank), "a", encoding="utf-8"))
        events = None if rank else scope.enter_context(open(folder / names.EVENTS, "a", encoding="utf-8"))
        yield Log(folder=folder, attempt=attempt, metrics_file=metrics, events_file=events)
