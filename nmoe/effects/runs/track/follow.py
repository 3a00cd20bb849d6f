"""`nmoe track`: mirror what a run's files say to another tracker. A process of its own that only reads the run's files.

How far it has come stands in `track/<target>.json` in the run folder, written after the target has the lines before it.
A resumed run cuts its file and continues: what was sent of steps after the cut stays sent, and the new attempt follows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import attrs

from nmoe.effects import files
from nmoe.effects.record import lines as jsonl
from nmoe.effects.record.names import CONFIG, EVENTS, METRICS, TRACK
from nmoe.effects.record.reading import json_object, read_bytes, utc
from nmoe.effects.runs import status
from nmoe.errors import InputError

BLOCK = 1 << 20
TRIES = 6
"""Times lines are given to a target that fails, each twice as long after the one before."""


@attrs.frozen(kw_only=True)
class Position:
    """How far a follower has come."""

    offset: int = 0  # bytes of METRICS
    line: int = 0  # lines of METRICS
    attempt: int = 0  # of the last line
    target: int = 0  # what the target keeps of itself: bytes of its file
    mark: str = ""  # end of what stands before `offset`
    cuts: tuple[tuple[int, int], ...] = ()  # line a resumed run went on at, and sent lines that it cut off

    def index(self) -> int:
        """Number of the next line to be sent, of all that ever were."""
        return self.line + sum(lost for at, lost in self.cuts if at <= self.line)


@attrs.frozen(kw_only=True)
class Line:
    """One whole line of metrics."""

    index: int
    line: int  # its number in the file, from 0
    end: int  # offset after it
    mark: str  # its end
    time: float  # seconds since 1970
    step: int
    attempt: int
    new_attempt: bool  # whether the line before was of another attempt
    values: Mapping[str, float]


class Sink(Protocol):
    """A target that is open."""

    remembers: bool  # whether it knows itself which lines it has

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What a later try may not meet."""
        ...

    def write(self, lines: list[Line]) -> int:
        """Take lines, durably; returns what the position keeps of the target."""
        ...


Open = Callable[[Path, Position], AbstractContextManager[Sink]]


def numbers(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a line by its path; lists by layer, where the table names its layers; not by time or attempt."""
    layers = fields.get("layer")
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if isinstance(value, bool) or name in ("attempt", "time", "step", "experts/layer"):
            continue
        if isinstance(value, int | float):
            yield name, float(value)
        elif value in ("nan", "inf", "-inf"):
            yield name, float(value)
        elif isinstance(value, dict):
            yield from numbers(value, f"{name}/")
        elif isinstance(value, list) and isinstance(layers, list):
            pairs = dict(zip((str(layer) for layer in layers), value, strict=False))
            yield from numbers(pairs, f"{name}/")


def new_lines(path: Path, position: Position) -> list[Line]:
    """The whole lines after a position, a block at most; a last line without its line end is one being written.

    Raises:  InputError when a whole line is not one of a run's.
    """
    begin, lines = position.offset, list[Line]()
    for raw in jsonl.read(path, offset=position.offset, number=position.line):
        line = _line(raw, position)
        position = after(position, line)
        lines.append(line)
        if line.end - begin >= BLOCK:
            break
    return lines


def _line(raw: jsonl.Line, position: Position) -> Line:
    """The line at a position."""
    fields = raw.fields
    try:
        return Line(
            index=position.index(),
            line=position.line,
            end=raw.end,
            mark=raw.mark.decode("latin-1"),
            time=utc(fields["time"]).timestamp(),
            step=fields["step"],
            attempt=fields["attempt"],
            new_attempt=fields["attempt"] != position.attempt,
            values=dict(numbers(fields)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{raw.where}: expected time, step and attempt, got {str(dict(fields))[:60]}; fix or remove the line"
        ) from error


def after(position: Position, line: Line) -> Position:
    """The position after a line."""
    return attrs.evolve(position, offset=line.end, line=line.line + 1, attempt=line.attempt, mark=line.mark)


def found_again(path: Path, position: Position) -> Position:
    """`position`, or where a file that was cut before it continues: at its first line of a newer attempt, or its end.

    Raises:  InputError when a whole line is not one of a run's.
    """
    try:
        if jsonl.is_same(path, position.offset, position.mark.encode("latin-1")):
            return position
    except OSError as error:
        raise InputError(f"{path}: expected a file to read, got {error.strerror}; fix or remove it") from error
    here = Position(target=position.target)
    for raw in jsonl.read(path):
        line = _line(raw, here)
        if line.attempt > position.attempt:
            break
        here = after(here, line)
    kept = tuple(cut for cut in position.cuts if cut[0] < here.line)
    lost = position.index() - here.line - sum(gone for _, gone in kept)
    return attrs.evolve(here, cuts=(*kept, (here.line, lost)))


def ended(folder: Path) -> str | None:
    """Why no more lines will come, in the words of `nmoe runs list`; None while the run may write more."""
    word = status.of(folder, tuple(jsonl.read(folder / EVENTS)), "another host")
    return None if word in status.GOING else word


def _load(path: Path) -> Position:
    """The position in a file; the beginning when there is none."""
    if not path.exists():
        return Position()
    try:
        fields = json_object(read_bytes(path))
        fields["cuts"] = tuple((at, lost) for at, lost in fields["cuts"])
        return Position(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: expected a position of `nmoe track`, got {error}; remove the track folder to begin anew"
        ) from error


def _given(sink: Sink, name: str, lines: list[Line], every_s: float, say: Callable[[str], None]) -> int:
    """What `sink.write` returns, tried again while the target fails.

    Raises:  InputError when it has failed `TRIES` times.
    """
    for attempt in range(1, TRIES):
        try:
            return sink.write(lines)
        except sink.failures as error:
            pause = every_s * 2**attempt
            say(f"{name}  failed with {type(error).__name__}: {error}; tries again in {pause:.3g} s")
            time.sleep(pause)
    try:
        return sink.write(lines)
    except sink.failures as error:
        raise InputError(
            f"--to {name}: expected a target that takes lines, got {type(error).__name__}: {error}, "
            f"{TRIES} times; fix that "
            "and start `nmoe track` again, it resumes where it was"
        ) from error


def follow(folder: Path, name: str, open_sink: Open, *, every_s: float, once: bool, say: Callable[[str], None]) -> int:
    """Send a target every line, once, until the run has ended.

    name   of the target
    once   stop at the last line there is
    Raises:  InputError when the folder is not a run's, a line is not a line, or the target keeps failing.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"RUN: expected the folder of a run, got {folder}, which has no config.toml; see `nmoe runs list`"
        )
    record = folder / TRACK / f"{name}.json"
    record.parent.mkdir(exist_ok=True)
    position = _load(record)
    with open_sink(folder, position) as sink:
        metrics = folder / METRICS
        if sink.remembers:  # it may have less than was given to it, and drops what it has
            position = Position(cuts=found_again(metrics, position).cuts if metrics.exists() else ())
        began, first = time.monotonic(), position.index()
        while True:
            why = "read" if once else ended(folder)  # before reading: what was written until then is read
            while metrics.exists() and (lines := new_lines(metrics, here := found_again(metrics, position))):
                target = _given(sink, name, lines, every_s, say)
                position = attrs.evolve(after(here, lines[-1]), target=target)
                files.write_text(record, json.dumps(attrs.asdict(position)))
                rate = (position.index() - first) / (time.monotonic() - began)
                share = position.offset / metrics.stat().st_size
                say(f"{name}  step {lines[-1].step}  {position.index()} lines  {100 * share:.0f} %  {rate:.0f}/s")
            if why is not None:
                say(f"{name}  {folder.name} {why}, {position.index()} lines")
                return 0
            time.sleep(every_s)
