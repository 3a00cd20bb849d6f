"""The index: a DuckDB file of what the runs under one folder have logged, grown by reading their JSONL further.

Derived and disposable: deleting it costs the time to read the runs again. One process owns it. Text from a run folder
never becomes SQL: tags are columns `c0`, `c1`, ... by the number they have in table `tags`, values are bound.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs

from nmoe.effects.parallel.launch import handling
from nmoe.effects.record.lines import LINE_BYTES, MARK_BYTES, is_same, whole
from nmoe.effects.record.names import CONFIG
from nmoe.effects.record.reading import open_regular
from nmoe.effects.runs.viz import ingest
from nmoe.effects.runs.viz.ingest import CHUNK_BYTES
from nmoe.errors import InputError, pip_install, printable

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


FORMAT = 3
MAX_FILES = 256
"""Files taken in at a time."""

FILES = re.compile(r"(metrics|arrays|telemetry)\.rank(\d{1,6})\.jsonl|events\.jsonl")

SCHEMA = """
create table format(version integer);
create sequence run_ids;
create table runs(run integer, name varchar, inode ubigint);
create table files(run integer, file varchar, inode ubigint, "offset" bigint, lines bigint, bad bigint,
                   mark blob);
create table tags(tag integer, name varchar);
create table metrics(run integer, rank integer, attempt integer, step bigint, time_s double, elapsed_s double,
                     tokens double, experts map(varchar, double[]));
create table latest(run integer, tag integer, value double, step bigint);
create table spans(run integer, attempt integer, first_step bigint, elapsed_s double);
create table loads(run integer, attempt integer, step bigint, tokens double, layers integer[], load bigint[][]);
create table telemetry(run integer, rank integer, attempt integer, time_s double, elapsed_s double, line varchar);
create table events(run integer, attempt integer, step bigint, time_s double, event varchar, line varchar);
create view valid as
  select run, attempt, elapsed_s,
    coalesce(min(first_step) over (partition by run order by attempt desc
             rows between unbounded preceding and 1 preceding), 4611686018427387904) as until,
    coalesce(sum(elapsed_s) over (partition by run order by attempt
             rows between unbounded preceding and 1 preceding), 0) as before_s
  from spans;
"""
TABLES = ("files", "metrics", "latest", "spans", "loads", "telemetry", "events", "runs")


@attrs.frozen(kw_only=True)
class Index:
    """An open index of the runs under `root`."""

    root: Path
    work: Path  # folder of what is read or made right now
    connection: DuckDBPyConnection
    writing: threading.Lock = attrs.field(factory=threading.Lock)
    noting: threading.Lock = attrs.field(factory=threading.Lock)  # of notes in run folders


@attrs.frozen(kw_only=True)
class Poll:
    """What one look at the run folders found."""

    grown: tuple[str, ...]
    gone: tuple[str, ...]
    problems: tuple[str, ...]
    read_bytes: int
    left_bytes: int


@attrs.frozen(kw_only=True)
class Tail:
    """A file that has more than the index knows."""

    run: int
    name: str
    path: Path
    inode: int
    offset: int
    size: int


@attrs.frozen(kw_only=True)
class Known:
    """How far a file has been read."""

    inode: int
    offset: int
    mark: bytes  # what stood before `offset`


@contextmanager
def open_index(root: Path, file: Path | None, threads: int = 2) -> Iterator[Index]:
    """The index of the runs under `root`.

    file    where it is kept from one time to the next; None: in memory

    Raises:  InputError when the package duckdb is absent, another process has the index open or it cannot be written.
    """
    try:
        import duckdb
    except ImportError as error:
        raise InputError(
            f"viz: expected the package duckdb, got none; install it with: {pip_install('viz')}"
        ) from error
    connection = None
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        connection = duckdb.connect(
            str(file or ":memory:"), config={"threads": threads, "memory_limit": "1GB", "checkpoint_threshold": "64MB"}
        )
        _prepare(connection)
        with _work_folder(file) as work:
            yield Index(root=root, work=work, connection=connection)
    except duckdb.IOException as error:
        if connection is not None:
            raise
        holder = re.search(r"PID \d+", str(error))
        raise InputError(
            f"{file}: expected an index that no other process has open, got {holder[0] if holder else error}; "
            "end the other `nmoe viz`, or delete the file if there is none"
        ) from error
    except OSError as error:
        if connection is not None:
            raise
        raise InputError(
            f"{file}: expected an index that can be written, got {error.strerror}; set NMOE_HOME elsewhere"
        ) from error
    finally:
        if connection is not None:
            connection.close()


@contextmanager
def _work_folder(file: Path | None) -> Iterator[Path]:
    """An empty folder until the block ends, or a signal ends the process.

    It lies beside the file of the index: what a process left there that was killed, the next one removes.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handling(leave, signal.SIGTERM, signal.SIGHUP):
        if file is None:
            with tempfile.TemporaryDirectory(prefix="nmoe-viz-") as folder:
                yield Path(folder)
            return
        work = file.with_name(f"{file.name}.work")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work)


def index_file(home: Path, root: Path) -> Path:
    """Where the index of the runs under `root` is kept."""
    return home / "viz" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.duckdb"


def run_folders(root: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The run folders under `root`, newest first, none when there is no such folder; and what is wrong with others.

    A name with a leading dot is a run folder still being made.
    """
    problems: list[str] = []
    started: list[tuple[float, str]] = []
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return (), ()
    for entry in entries:
        try:
            if not entry.name.startswith(".") and os.path.isfile(f"{entry.path}/{CONFIG}"):
                entry.name.encode()
                started.append((entry.stat().st_mtime, entry.name))
        except UnicodeEncodeError:
            problems.append(f"{printable(repr(entry.name))}: expected a name in UTF-8, got other bytes; rename it")
        except OSError as error:
            problems.append(f"{entry.path}: expected a run folder, got {error.strerror}; move it elsewhere")
    return tuple(root / name for _, name in sorted(started, reverse=True)), tuple(problems)


def poll(index: Index, budget_bytes: int = CHUNK_BYTES, names: Sequence[str] | None = None) -> Poll:
    """Take in what the runs have logged since the last look, newest runs first, up to about `budget_bytes`.

    A last line without its line end is one being written: it waits. A file that shrank or was replaced is read anew, a
    folder that is gone is forgotten.

    names    the runs to look at; None: all

    Writes:  the index.
    Raises:  OSError when a file cannot be read, duckdb.Error when the index cannot be written.
    """
    with index.writing:
        present, unusable = run_folders(index.root)
        folders = tuple(folder for folder in present if names is None or folder.name in names)
        gone = _forget_missing_(index, folders)
        known = _register_(index, folders)
        read: dict[int, dict[str, Known]] = {}
        for run, file, inode, offset, mark in query(index, 'select run, file, inode, "offset", mark from files'):
            read.setdefault(run, {})[file] = Known(inode=inode, offset=offset, mark=mark)
        runs = [(folder, known[folder.name]) for folder in folders]
        tails = [_tails_(index, folder, run, read.get(run, {})) for folder, run in runs]
        waiting = [tail for grown, _ in tails for tail in grown]
        taken, problems, left = _take_(index, waiting, budget_bytes)
        return Poll(
            grown=tuple(dict.fromkeys(tail.name for tail in waiting if tail.path in taken)),
            gone=gone,
            problems=(*unusable, *(problem for _, lost in tails for problem in lost), *problems),
            read_bytes=sum(taken.values()),
            left_bytes=left,
        )


def query(index: Index, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """The rows of a query; `values` are bound. May be called from any thread."""
    return index.connection.cursor().execute(sql, list(values)).fetchall()


def arrays(index: Index, sql: str, *values: Any) -> dict[str, Any]:
    """The columns of a query as NumPy arrays; `values` are bound."""
    return index.connection.cursor().execute(sql, list(values)).fetchnumpy()


def known(index: Index, names: Sequence[str]) -> dict[int, str]:
    """Number -> name of the runs called so, in the order asked for.

    Raises:  InputError for a name that no scanned run has.
    """
    runs = {name: run for run, name in query(index, "select run, name from runs")}
    unknown = [name for name in names if name not in runs]
    if unknown:
        raise InputError(
            *(f"run: expected the name of a run here, got {name!r}; reload the list of runs" for name in unknown)
        )
    return {runs[name]: name for name in names}


def tags(index: Index) -> dict[str, str]:
    """Tag -> the column of `metrics` that holds it."""
    return {name: f"c{tag}" for tag, name in query(index, "select tag, name from tags order by tag")}


def _prepare(connection: DuckDBPyConnection) -> None:
    """Make the tables, anew when those in the file are of another version."""
    tables = {name for (name,) in connection.execute("select table_name from information_schema.tables").fetchall()}
    if "format" in tables:
        version = connection.execute("select version from format").fetchall()
        if version == [(FORMAT,)]:
            return
    if tables:
        connection.execute("drop view if exists valid")
        for name in tables - {"valid"}:
            connection.execute(f"drop table if exists {quoted(name)}")
        connection.execute("drop sequence if exists run_ids")
    connection.execute(SCHEMA)
    connection.execute("insert into format values (?)", [FORMAT])


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _forget_missing_(index: Index, folders: tuple[Path, ...]) -> tuple[str, ...]:
    """Forget the runs whose folder is gone or is another one now; their names."""
    present = {folder.name: folder.stat().st_ino for folder in folders}
    gone = [
        (run, name)
        for run, name, inode in query(index, "select run, name, inode from runs")
        if present.get(name) != inode
    ]
    for run, _ in gone:
        _forget_(index, run)
    return tuple(name for _, name in gone if name not in present)


def _forget_(index: Index, run: int) -> None:
    """Remove a run."""
    with _transaction(index) as cursor:
        for name in TABLES:
            cursor.execute(f"delete from {name} where run = ?", [run])


def _register_(index: Index, folders: tuple[Path, ...]) -> dict[str, int]:
    """Number the runs that are new; name -> number of all."""
    known = {name: run for run, name in query(index, "select run, name from runs")}
    for folder in folders:
        if folder.name not in known:
            row = query(
                index,
                "insert into runs values (nextval('run_ids'), ?, ?) returning run",
                folder.name,
                folder.stat().st_ino,
            )
            known[folder.name] = row[0][0]
    return known


def _tails_(index: Index, folder: Path, run: int, known: Mapping[str, Known]) -> tuple[list[Tail], tuple[str, ...]]:
    """The files of a run that have grown, and what is wrong with others.

    A run with a file that was cut or replaced is taken in anew.
    """
    stats, problems = _stats(folder)
    if any(
        name not in stats or stats[name].st_ino != file.inode or not _goes_on(folder / name, stats[name].st_size, file)
        for name, file in known.items()
    ):
        with _transaction(index) as cursor:
            for name in TABLES[:-1]:
                cursor.execute(f"delete from {name} where run = ?", [run])
        known = {}
    offsets = {name: known[name].offset if name in known else 0 for name in stats}
    grown = [
        Tail(
            run=run,
            name=folder.name,
            path=folder / name,
            inode=result.st_ino,
            offset=offsets[name],
            size=result.st_size,
        )
        for name, result in stats.items()
        if result.st_size > offsets[name]
    ]
    return grown, problems


def _stats(folder: Path) -> tuple[dict[str, os.stat_result], tuple[str, ...]]:
    """The files of a run by name, and what is wrong with others."""
    stats: dict[str, os.stat_result] = {}
    problems: list[str] = []
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if FILES.fullmatch(entry.name))
    except OSError as error:
        return {}, (f"{folder}: expected a run folder, got {error.strerror}; fix or remove it",)
    for name in names:
        try:
            result = (folder / name).stat()
        except OSError as error:
            problems.append(f"{folder / name}: expected a file to read, got {error.strerror}; fix or remove it")
            continue
        if stat.S_ISREG(result.st_mode):
            stats[name] = result
        else:
            problems.append(f"{folder / name}: expected a regular file, got another; remove it")
    return stats, tuple(problems)


def _goes_on(path: Path, size: int, known: Known) -> bool:
    """Whether a file still begins with what has been read of it, by the end of that; asked when it has grown.

    A file that cannot be read is left as it is: it is reported when its new lines are read.
    """
    if size <= known.offset:
        return size == known.offset
    try:
        return is_same(path, known.offset, known.mark)
    except OSError:
        return True


def _take_(index: Index, waiting: Sequence[Tail], budget_bytes: int) -> tuple[dict[Path, int], tuple[str, ...], int]:
    """Take in whole lines of files, up to `budget_bytes`.

    returns  bytes taken, by file; problems; bytes there was no room for
    """
    taken: dict[Path, int] = {}
    marks: dict[Path, bytes] = {}
    problems: list[str] = []
    left = 0
    kinds: dict[str, list[tuple[Tail, ingest.Piece]]] = {}
    with tempfile.TemporaryDirectory(dir=index.work) as folder:
        for tail in waiting:
            room = budget_bytes - sum(taken.values())
            if room <= 0 or len(taken) >= MAX_FILES:
                left += tail.size - tail.offset
                continue
            limit = max(room, LINE_BYTES)
            content, problem = _whole_lines(tail, limit)
            if content and limit < tail.size - tail.offset:
                left += tail.size - tail.offset - len(content)
            if problem:
                problems.append(problem)
            if content:
                copy = Path(folder) / f"{len(taken)}.jsonl"
                copy.write_bytes(content)
                taken[tail.path], marks[tail.path] = len(content), bytes(content[-MARK_BYTES:])
                kind, _, rank = tail.path.name.removesuffix(".jsonl").partition(".rank")
                piece = ingest.Piece(run=tail.run, rank=int(rank or 0), file=str(copy))
                kinds.setdefault(kind, []).append((tail, piece))
        for kind, pairs in kinds.items():
            with _transaction(index) as cursor:
                result = ingest.take_(cursor, kind, [piece for _, piece in pairs])
                for tail, piece in pairs:
                    _advance_(cursor, tail, marks[tail.path], taken[tail.path], result, piece.file)
            if result.refused:
                shown = ", ".join(result.refused[:5])
                problems.append(f"{kind}: expected tags that the index has room for, got also {shown}; rename them")
    return taken, tuple(problems), left


def _whole_lines(tail: Tail, limit: int) -> tuple[memoryview, str | None]:
    """The whole lines of a file that the index does not know, at most `limit` bytes, and a problem with them."""
    try:
        with open_regular(tail.path) as file:
            file.seek(tail.offset)
            content = file.read(min(limit, tail.size - tail.offset))
    except OSError as error:
        return memoryview(b""), f"{tail.path}: expected a file to read, got {error.strerror}; fix or remove it"
    length = whole(content)
    problem = None
    if not length and len(content) >= LINE_BYTES:
        problem = f"{tail.path}: expected lines of at most {LINE_BYTES} bytes, got a longer one; delete it"
    return memoryview(content)[:length], problem


def _advance_(
    cursor: DuckDBPyConnection, tail: Tail, mark: bytes, length: int, result: ingest.Taken, piece: str
) -> None:
    """Note how far a file has been read. Writes: table files."""
    good, bad = result.good.get(piece, 0), result.bad.get(piece, 0)
    sql = "select lines, bad from files where run = ? and file = ?"
    known = cursor.execute(sql, [tail.run, tail.path.name]).fetchone() or (0, 0)
    cursor.execute("delete from files where run = ? and file = ?", [tail.run, tail.path.name])
    cursor.execute(
        "insert into files values (?, ?, ?, ?, ?, ?, ?)",
        [
            *(tail.run, tail.path.name, tail.inode, tail.offset + length),
            *(known[0] + good + bad, known[1] + bad, mark),
        ],
    )


@contextmanager
def _transaction(index: Index) -> Iterator[DuckDBPyConnection]:
    """A cursor whose changes are all made or none."""
    with index.connection.cursor() as cursor:
        cursor.begin()
        try:
            yield cursor
        except BaseException:
            cursor.rollback()
            raise
        cursor.commit()
