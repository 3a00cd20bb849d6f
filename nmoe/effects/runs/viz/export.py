"""The metrics of runs as a file: CSV or Parquet, one row a step of what the newest attempt logged."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from nmoe.effects.runs.viz.index import Index, known, query, quoted, tags
from nmoe.errors import InputError

MEDIA_TYPES = MappingProxyType({"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"})
MAX_LINES = 1_000_000
"""Lines in a file that is made in memory."""

OPTIONS = MappingProxyType({"csv": "format csv, header", "parquet": "format parquet, compression zstd"})


def export(index: Index, names: Sequence[str], kind: str) -> bytes:
    """The metrics of some runs.

    Raises:  InputError for another kind than `csv` and `parquet`, or a run that is not here.
    """
    if kind not in MEDIA_TYPES:
        raise InputError(f"format: expected one of {', '.join(MEDIA_TYPES)}, got {kind[:40]!r}; choose one of them")
    numbers = list(known(index, names))
    (lines,) = query(index, "select count(*) from metrics where run in (select unnest(?::integer[]))", numbers)[0]
    if lines > MAX_LINES:
        raise InputError(f"export: expected at most {MAX_LINES:,} lines, got {lines:,}; choose fewer runs")
    with tempfile.TemporaryDirectory(dir=index.work) as folder:
        file = Path(folder) / "metrics"
        write_(file, index, names, kind)
        return file.read_bytes()


def write_(file: Path, index: Index, names: Sequence[str], kind: str) -> None:
    """Write the metrics of some runs. Writes: `file`."""
    numbers = known(index, names)
    present = {
        tag
        for (tag,) in query(
            index,
            "select distinct name from latest join tags using (tag) where run in (select unnest(?::integer[]))",
            list(numbers),
        )
    }
    columns = "".join(f", {column} as {quoted(tag)}" for tag, column in tags(index).items() if tag in present)
    experts = ", experts" if kind == "parquet" else ", experts::json::varchar as experts"
    index.connection.cursor().execute(
        f"copy (select r.name as run, m.rank, m.attempt, m.step, to_timestamp(m.time_s) as time, m.elapsed_s, "
        f"m.tokens as tokens_global{columns}{experts} from metrics m join runs r using (run) "
        "join valid v using (run, attempt) where m.step < v.until and m.run in "
        f"({', '.join(str(int(run)) for run in numbers)}) order by r.name, m.rank, m.step) "
        f"to {_literal(str(file))} ({OPTIONS[kind]})"
    )


def _literal(text: str) -> str:
    """A text as an SQL literal: COPY takes no bound parameters."""
    return "'" + text.replace("'", "''") + "'"
