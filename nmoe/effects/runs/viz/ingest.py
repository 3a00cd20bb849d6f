"""From lines of JSONL to rows of the index; a line that is no JSON object of its kind is counted, never guessed at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs

from nmoe.effects.record import lines
from nmoe.effects.record.lines import LINE_BYTES
from nmoe.effects.record.reading import MAX_ATTEMPT, MAX_INTEGER, MAX_SECONDS, MAX_STEP, utc
from nmoe.effects.runs.viz.api import number

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


CHUNK_BYTES = 256 << 20
"""Bytes of one file taken in at a time: a quarter of it takes twice as long in all."""

MAX_TAGS = 256
"""Each is a column, and adding one costs time that grows with their number: 256 take seconds, 1000 a minute."""

TYPED = MappingProxyType(
    {
        "attempt": "INTEGER",
        "step": "BIGINT",
        "time": "VARCHAR",
        "elapsed_s": "DOUBLE",
        "tokens_global": "DOUBLE",
        "experts": "MAP(VARCHAR, DOUBLE[])",
    }
)
"""Keys of a line of metrics that have columns of their own."""

MAX_TAG_LENGTH = 200
RESERVED = ("run", "rank")
"""Names of columns that are no tags."""

OWN_TAGS = MappingProxyType({"step": -1, "tokens_global": -2, "time": -3})
"""Numbers in table latest of what has a column of its own."""

OPTIONS = f"ignore_errors=true, filename=true, maximum_object_size={LINE_BYTES}"
READ = f"read_json(?, format='newline_delimited', columns=?, {OPTIONS})"
OBJECTS = f"read_ndjson_objects(?, {OPTIONS})"

FIRST_TIME = datetime(1, 1, 2, tzinfo=UTC).timestamp()
LAST_TIME = datetime(9999, 12, 30, tzinfo=UTC).timestamp()
FOUND_BY = f"step between 0 and {MAX_STEP - 1} and attempt between 1 and {MAX_ATTEMPT - 1}"
"""What holds for the place of a line; another line is a bad one."""


def _seconds(text: str) -> str:
    """A text in ISO 8601 as seconds since 1970; null outside the years that Python knows."""
    time = f"epoch(try_cast({text} as timestamptz))"
    return f"case when {time} between {FIRST_TIME} and {LAST_TIME} then {time} end"


def _bounded(column: str, limit: float) -> str:
    """A column from 0 to `limit`; null where it lies elsewhere."""
    return f"case when {column} between 0 and {limit} then {column} end as {column}"


@attrs.frozen(kw_only=True)
class Piece:
    """Whole lines of one file, copied from it."""

    run: int
    rank: int
    file: str


@attrs.frozen(kw_only=True)
class Taken:
    """What became of some pieces."""

    good: Mapping[str, int]  # lines taken in, by file of the piece
    bad: Mapping[str, int]  # lines that could not be
    refused: tuple[str, ...] = ()  # tags that found no room


def take_(cursor: DuckDBPyConnection, kind: str, pieces: Sequence[Piece]) -> Taken:
    """Take in pieces of files of one kind, no two of one file. Writes: the tables of the kind."""
    cursor.execute("create or replace temp table pieces(run integer, rank integer, filename varchar)")
    cursor.executemany("insert into pieces values (?, ?, ?)", [(piece.run, piece.rank, piece.file) for piece in pieces])
    files = [piece.file for piece in pieces]
    refused = KINDS[kind](cursor, files)
    rows = cursor.execute("select filename, count(*) filter (whole), count(*) from chunk group by filename").fetchall()
    return Taken(
        good={file: good for file, good, _ in rows},
        bad={file: count - good for file, good, count in rows},
        refused=tuple(refused),
    )


def _metrics_(cursor: DuckDBPyConnection, files: list[str]) -> list[str]:
    """Take in lines of metrics. Writes: tables metrics, tags, latest and spans."""
    columns, refused = _columns_(cursor, files)
    # By position, so that no tag's name is part of the SQL.
    places = "".join(f", #{len(TYPED) + place} as {column}" for place, column in enumerate(columns.values(), 1))
    cursor.execute(
        f"create or replace temp table chunk as select filename, coalesce({FOUND_BY}, false) as whole, "
        f"attempt, step, {_seconds('time')} as time_s, elapsed_s, tokens_global as tokens, "
        f"experts{places} from (select * replace (coalesce(attempt, 1) as attempt, "
        f"{_bounded('elapsed_s', MAX_SECONDS)}, {_bounded('tokens_global', MAX_INTEGER)}) from {READ})",
        [files, {**TYPED, **dict.fromkeys(columns, "DOUBLE")}],
    )
    cursor.execute(
        "insert into metrics by name "
        "select run, rank, chunk.* exclude (filename, whole) from chunk join pieces using (filename) where whole"
    )
    _latest_(cursor, columns)
    _spans_(cursor)
    return refused


def _columns_(cursor: DuckDBPyConnection, files: list[str]) -> tuple[dict[str, str], list[str]]:
    """Tag -> its column, for the tags in some files; the tags that find no room. Writes: tables tags and metrics."""
    keys = cursor.execute(f"select distinct unnest(json_keys(json)) from {OBJECTS}", [files]).fetchall()
    numbers: dict[str, int] = dict(cursor.execute("select name, tag from tags").fetchall())
    columns: dict[str, str] = {}
    refused: list[str] = []
    # DuckDB takes names that differ in case only for one.
    taken = {name.lower(): name for name in (*numbers, *TYPED, *RESERVED)}
    # What is known comes first, then lower case: a misspelt key never takes the place of the right one.
    for name in sorted((name for (name,) in keys), key=lambda name: (name not in numbers, name.swapcase())):
        if name in TYPED:
            continue
        if not 0 < len(name) <= MAX_TAG_LENGTH or taken.setdefault(name.lower(), name) != name or name in RESERVED:
            refused.append(name)
        elif name not in numbers and len(numbers) >= MAX_TAGS:
            refused.append(name)
        else:
            if name not in numbers:
                numbers[name] = len(numbers)
                cursor.execute("insert into tags values (?, ?)", [numbers[name], name])
                cursor.execute(f"alter table metrics add column c{numbers[name]} double")
            columns[name] = f"c{numbers[name]}"
    return columns, refused


def _latest_(cursor: DuckDBPyConnection, columns: Mapping[str, str]) -> None:
    """Keep the last value of each tag. Writes: table latest."""
    sources = {"step": "step", "tokens_global": "tokens", "time": "time_s"} | dict(columns)
    numbers = OWN_TAGS | dict(cursor.execute("select name, tag from tags").fetchall())
    # Rows come in any order; a later attempt wins over an earlier one.
    order = "(attempt::bigint << 40) + step"
    wanted = ", ".join(
        f"arg_max({column}, {order}), arg_max(step, {order}) filter ({column} is not null)"
        for column in sources.values()
    )
    rows = cursor.execute(
        f"select run, {wanted} from chunk join pieces using (filename) where whole and rank = 0 group by run"
    ).fetchall()
    reported = [
        (row[0], numbers[tag], float(row[1 + 2 * place]), row[2 + 2 * place])
        for row in rows
        for place, tag in enumerate(sources)
        if row[1 + 2 * place] is not None
    ]
    if reported:
        runs, tags, values, steps = (list(column) for column in zip(*reported, strict=True))
        cursor.execute(
            "create or replace temp table reported as select unnest(?) as run, unnest(?) as tag", [runs, tags]
        )
        cursor.execute(
            "delete from latest using reported where latest.run = reported.run and latest.tag = reported.tag"
        )
        cursor.execute(
            "insert into latest select unnest(?), unnest(?), unnest(?::double[]), unnest(?)",
            [runs, tags, values, steps],
        )


def _spans_(cursor: DuckDBPyConnection) -> None:
    """Keep where each attempt began and how long it went on. Writes: table spans."""
    cursor.execute(
        "create or replace temp table span as "
        "select run, attempt, min(step) as first_step, max(elapsed_s) as elapsed_s "
        "from (select run, attempt, step, elapsed_s from chunk join pieces using (filename) where whole and rank = 0 "
        "union all select run, attempt, first_step, elapsed_s from spans where run in (select run from pieces)) "
        "group by run, attempt"
    )
    cursor.execute("delete from spans where run in (select run from pieces)")
    cursor.execute("insert into spans select run, attempt, first_step, coalesce(elapsed_s, 0) from span")


def _loads_(cursor: DuckDBPyConnection, files: list[str]) -> list[str]:
    """Take in the loads of experts. Writes: table loads."""
    types = {"attempt": "INTEGER", "step": "BIGINT", "tokens_global": "DOUBLE"}
    types |= {"layers": "INTEGER[]", "load": "BIGINT[][]"}
    cursor.execute(
        "create or replace temp table chunk as select filename, "
        f"coalesce({FOUND_BY} and len(layers) = len(load), false) as whole, "
        "attempt, step, tokens_global as tokens, layers, load from (select * replace "
        f"(coalesce(attempt, 1) as attempt, {_bounded('tokens_global', MAX_INTEGER)}) from {READ})",
        [files, types],
    )
    cursor.execute(
        "insert into loads select run, attempt, step, tokens, layers, load "
        "from chunk join pieces using (filename) where whole"
    )
    return []


def _telemetry_(cursor: DuckDBPyConnection, files: list[str]) -> list[str]:
    """Take in telemetry. Writes: table telemetry."""
    _lines_(cursor, files)
    cursor.execute(
        "insert into telemetry select run, rank, attempt, time_s, elapsed_s, line "
        "from chunk join pieces using (filename) where whole"
    )
    return []


def _events_(cursor: DuckDBPyConnection, files: list[str]) -> list[str]:
    """Take in events. Writes: table events."""
    _lines_(cursor, files)
    cursor.execute(
        "insert into events select run, attempt, step, time_s, event, line "
        "from chunk join pieces using (filename) where whole"
    )
    return []


def _lines_(cursor: DuckDBPyConnection, files: list[str]) -> None:
    """Read whole lines, with what they are found by. Writes: table chunk."""
    rows = [row for file in files for row in _rows(file)]
    types = ("varchar", "boolean", "integer", "bigint", "double", "double", "varchar", "varchar")
    names = ("filename", "whole", "attempt", "step", "time_s", "elapsed_s", "event", "line")
    columns = ", ".join(f"unnest(?::{kind}[]) as {name}" for kind, name in zip(types, names, strict=True))
    cursor.execute(
        f"create or replace temp table chunk as select {columns}",
        [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in names],
    )


def _rows(file: str) -> list[tuple[Any, ...]]:
    """The lines of a piece as rows of table chunk; read here, not by DuckDB, for here what they hold is read again."""
    rows: list[tuple[Any, ...]] = []

    def damaged(problem: str) -> None:
        rows.append((file, False, None, None, None, None, None, None))

    for line in lines.read(Path(file), damaged):
        fields = line.fields
        attempt, step, elapsed_s = fields.get("attempt", 1), fields.get("step"), number(fields.get("elapsed_s"))
        if not _is_place(attempt, 1, MAX_ATTEMPT) or (isinstance(step, int) and not _is_place(step, 0, MAX_STEP)):
            damaged(line.where)
            continue
        try:
            time_s = utc(fields.get("time")).timestamp()
        except ValueError:
            time_s = None
        if elapsed_s is not None and not 0 <= elapsed_s <= MAX_SECONDS:
            elapsed_s = None
        event = fields.get("event")
        # An event's name may hold half of a surrogate pair, which is no UTF-8.
        event = event.encode("utf-8", "backslashreplace").decode() if isinstance(event, str) else None
        step = step if _is_place(step, 0, MAX_STEP) else None
        rows.append((file, True, attempt, step, time_s, elapsed_s, event, json.dumps(fields)))
    return rows


def _is_place(value: Any, low: int, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < limit


KINDS: Mapping[str, Callable[[DuckDBPyConnection, list[str]], list[str]]] = MappingProxyType(
    {"metrics": _metrics_, "arrays": _loads_, "telemetry": _telemetry_, "events": _events_}
)
"""What takes in the files of each kind, by the start of their names; gives back the tags that found no room."""
