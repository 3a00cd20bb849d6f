"""The run folder: what is written while it runs, and the lines on the screen.

`metrics.rank<r>.jsonl` and `events.jsonl` are append-only, one JSON object a line; numbers that are not finite are the
strings "nan", "inf" and "-inf", because JSON has none of them.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects import files
from nmoe.effects.record import names
from nmoe.effects.terminal import warn
from nmoe.errors import InputError
from nmoe.pure.units import plain


def now() -> str:
    """The time in UTC, ISO 8601 to the millisecond. A label, never a measure of duration."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@attrs.frozen(kw_only=True)
class LineFile:
    """An append-only file, each line of which is whole or absent. Nothing is buffered: closing writes nothing."""

    path: Path
    descriptor: int

    def append(self, line: str) -> None:
        """Append one line.

        Writes:  the file; of a line there is no room for, nothing.
        Raises:  InputError when it cannot be written.
        """
        text = line.encode() + b"\n"
        with files.refusing(self.path, "room for one more line", "free space, then start the same command again"):
            written = os.write(self.descriptor, text)
            try:
                while written < len(text):
                    written += os.write(self.descriptor, text[written:])
            except OSError:
                os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - written)
                raise


@contextmanager
def open_lines(path: Path) -> Iterator[LineFile]:
    """Open a file to append to. Raises: InputError when it cannot be opened."""
    with files.refusing(path, "a file to append to"):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield LineFile(path=path, descriptor=descriptor)
    finally:
        os.close(descriptor)


def _unheard(event: Mapping[str, Any]) -> None:
    """For a log nobody listens to."""


class Console:
    """The record of the screen. What is only shown ends no run: a line that cannot be written is the last one."""

    def __init__(self, file: LineFile) -> None:
        self._file: LineFile | None = file

    def __call__(self, text: str) -> None:
        """Append lines. Writes: the file."""
        file, self._file = self._file, None  # a warning about this file is not recorded in it
        if file is None:
            return
        try:
            file.append(text)
        except InputError as error:
            warn(f"nmoe: {error}; the screen is recorded no further")
        else:
            self._file = file


@contextmanager
def open_console(folder: Path, rank: int) -> Iterator[Callable[[str], None]]:
    """Open the record of the screen in a run folder; ranks but the first, which say nothing, record nothing."""
    if rank:
        yield lambda text: None
        return
    with open_lines(folder / names.CONSOLE) as file:
        yield Console(file)


@attrs.frozen(kw_only=True)
class Log:
    """Where a run writes what happens to it; threads may share it."""

    folder: Path
    attempt: int
    metrics_file: LineFile
    events_file: LineFile | None  # None: another rank writes the events
    heard: Callable[[Mapping[str, Any]], None] = _unheard  # called with each event, written or not
    lock: threading.RLock = attrs.field(factory=threading.RLock)  # a line is written whole

    def metrics(self, **fields: Any) -> None:
        """Append one line of metrics. Writes: this rank's metrics. Raises: as `append`."""
        self.append(self.metrics_file, fields)

    def event(self, name: str, **fields: Any) -> None:
        """Append one event. Writes: events.jsonl, on the first rank. Raises: as `append`."""
        if self.events_file is None:
            return
        try:
            self.append(self.events_file, {"event": name, **fields})
        finally:
            self.heard({"event": name, **fields})

    def append(self, file: LineFile, fields: Mapping[str, Any]) -> None:
        """Append one line with the attempt and the time. Writes: `file`. Raises: InputError when it cannot."""
        whole = {"attempt": self.attempt, "time": now(), **fields}
        try:
            line = json.dumps(whole, allow_nan=False)
        except ValueError:  # a number that is not finite; to look for one each time costs more than the text does
            line = json.dumps(plain(whole), allow_nan=False)
        with self.lock:
            file.append(line)

    def sync(self) -> None:
        """Bring the lines so far to the disk. Writes: what the operating system still holds of both files."""
        for file in (self.metrics_file, self.events_file):
            if file is not None:
                with files.refusing(file.path, "its lines to reach the disk"):
                    os.fsync(file.descriptor)


def create_folder(root: Path, name: str, contents: Mapping[str, str]) -> Path:
    """A new run folder with these text files in it; whole or absent.

    Raises:  InputError when the name is taken or the folder cannot be written.
    """
    folder = root / name
    temporary = root / f".{name}.new"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            raise InputError(f"run.name: expected a new run folder, got {folder}, which exists; choose another name")
        temporary.mkdir(exist_ok=True)
        for file, text in contents.items():
            files.write_text(temporary / file, text)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"run.root: expected a folder with room for run folders, got {error.strerror} at {error.filename or root}; "
            "choose another run.root, free space or fix permissions"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return folder


@contextmanager
def open_log(folder: Path, attempt: int, rank: int = 0) -> Iterator[Log]:
    """Open the append-only files of a run folder: a rank's own metrics, and on the first rank the events."""
    with ExitStack() as scope:
        metrics = scope.enter_context(open_lines(folder / names.metrics(rank)))
        events = None if rank else scope.enter_context(open_lines(folder / names.EVENTS))
        yield Log(folder=folder, attempt=attempt, metrics_file=metrics, events_file=events)
