"""The files of a source: found, sized and put in an order that is the same on every machine."""

from __future__ import annotations

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nmoe.config.data_source import Arrow, Files, Hub, Input, Library, Parquet, Streamed
from nmoe.effects.data import stdlib
from nmoe.errors import InputError, pip_install
from nmoe.pure.data.prep import Form, Item

ENDINGS: tuple[tuple[str, Form], ...] = (
    (".parquet", "parquet"),
    (".arrow", "arrow"),
    *(((f"{ending}.gz"), "gzip") for ending in (".jsonl", ".json", ".ndjson")),
    *(((f"{ending}.zst"), "zstd") for ending in (".jsonl", ".json", ".ndjson")),
    *((ending, "lines") for ending in (".jsonl", ".json", ".ndjson")),
)

MIXED: tuple[tuple[str, Form], ...] = (
    *(ending for ending in ENDINGS if not ending[0].startswith(".json.") and ending[0] != ".json"),
    (".gz", "text.gz"),
    (".zst", "text.zst"),
)
"""Endings in a folder of files. One that ends in .json is a document, as other code is; one with no ending here too."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".zip")
"""Endings of what holds files with names of their own."""


def find(
    source: Input, base: Path, *, out: Path | None = None, skip_unreadable: bool, say: Callable[[str], None]
) -> tuple[Item, ...]:
    """Every file of a source, ordered by name.

    base             folder that relative paths start from
    out              folder that is written, no file of which is an input; None: nothing is written
    skip_unreadable  leave out what can not be opened, and say so

    Raises:  InputError, one line a problem: nothing found, a file or folder that can not be read, an ending that says
             nothing, Parquet without `pyarrow`, a data set without `datasets`, or a streamed one, which has no files.
    """
    items: list[Item] = []
    problems: list[str] = []
    if isinstance(source, Library):
        root = Path(sysconfig.get_path("stdlib"))
        named = [(path.relative_to(root).as_posix(), str(path)) for path in stdlib.paths(root)]
    elif isinstance(source, Hub):
        named = _fetched(source)
    elif isinstance(source, Streamed):
        raise InputError(
            f"input.dataset {source.dataset}: expected a source of files to train a tokenizer on, got a stream; train "
            "it on another, or add a published one with `nmoe data tokenizer add`"
        )
    else:
        named = _matching(source.paths, source.exclude, base, problems)
    if out is not None:
        within = _lies_within(out)
        named = [(name, path) for name, path in named if not within(path)]
    for name, path in sorted(named):
        try:
            items.append(_item(name, path, _form(source, name)))
        except OSError as error:
            problems.append(f"{name}: expected a file that can be read, got {error.strerror}; restore or exclude it")
        except InputError as error:
            problems += error.problems
    if problems and not skip_unreadable:
        raise InputError(*problems)
    for problem in problems:
        say(f"left out: {problem}")
    if not items:
        raise InputError(f"{base}: expected files for the source, got none; fix input.paths")
    return tuple(items)


def extra(package: str, what: str, name: str) -> InputError:
    """The error of a package that is not installed."""
    return InputError(f"{what}: expected the package {package}, got none; install it with: {pip_install(name)}")


def _matching(
    patterns: Sequence[str], exclude: Sequence[str], base: Path, unreadable: list[str]
) -> list[tuple[str, str]]:
    """Name and path of each file that a pattern matches, once; the name is relative to `base`.

    unreadable  receives a line for each folder that can not be looked into
    """
    paths: dict[str, str] = {}
    problems: list[str] = []
    for pattern in patterns:
        whole = os.path.join(base, os.path.expanduser(pattern))
        before, known = len(paths), len(unreadable)
        if os.path.lexists(whole):
            roots = [whole]
        else:
            roots = glob.glob(whole, recursive=True, include_hidden=False)
            for folder in sorted(_searched(whole)):
                _entries(folder, base, unreadable)
        for root in roots:
            for path in _files(root, base, unreadable) if os.path.isdir(root) else (root,):
                name = Path(os.path.relpath(path, base)).as_posix()
                if not any(fnmatch.fnmatch(name, excluded) for excluded in exclude):
                    paths[name] = path
        if (len(paths), len(unreadable)) == (before, known) and not any(os.path.lexists(root) for root in roots):
            problems.append(f"{whole}: expected a file or folder, got none; fix input.paths")
    if problems:
        raise InputError(*problems)
    return list(paths.items())


def _searched(pattern: str) -> set[str]:
    """The folders that `glob` looks into for a pattern; it passes over those that it can not read without a word."""
    parts = pattern.split(os.sep)
    folders: set[str] = set()
    for place, part in enumerate(parts):
        if glob.has_magic(part):
            above = os.path.join(os.sep.join(parts[:place]), "")
            folders.update(glob.glob(above, recursive=True))
            if part == "**":
                folders.update(glob.glob(os.path.join(above, "**", ""), recursive=True))
    return folders


def _entries(folder: str, base: Path, unreadable: list[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; nothing, and a line in `unreadable`, when it can not be looked into."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        name = Path(os.path.relpath(folder, base)).as_posix()
        line = f"{name}: expected a folder that can be read, got {error.strerror}; restore or exclude it"
        if line not in unreadable:
            unreadable.append(line)
        return []


def _files(root: str, base: Path, unreadable: list[str]) -> Iterator[str]:
    """Every file below a folder that is not hidden. Links to folders are followed once, so that loops end."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in _entries(folder, base, unreadable):
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                waiting.append(entry.path)
            else:
                yield entry.path


def _lies_within(folder: Path) -> Callable[[str], bool]:
    """Whether a file lies in a folder or below, links followed."""
    root = os.path.realpath(folder)
    known: dict[str, bool] = {}

    def within(path: str) -> bool:
        parent = os.path.dirname(path)
        if parent not in known:
            known[parent] = Path(os.path.realpath(parent)).is_relative_to(root)
        return known[parent]

    return within


def _form(source: Input, name: str) -> Form:
    """How the file is read."""
    if isinstance(source, Library):
        return "python"
    if isinstance(source, Files):
        if name.lower().endswith(ARCHIVES):
            raise InputError(f"{name}: expected a file of text or records, got an archive; unpack or exclude it")
        for ending, form in MIXED:
            if name.lower().endswith(ending):
                return form
        return "text"
    for ending, form in ENDINGS:
        if name.lower().endswith(ending) and form in _forms(source):
            return form
    raise InputError(f"{name}: expected an ending of {_endings(source)}, got another; rename or exclude it")


def _forms(source: Input) -> frozenset[Form]:
    """The forms of the files that a source of records reads."""
    columns: frozenset[Form] = frozenset({"parquet", "arrow"})
    if isinstance(source, Parquet):
        return columns - {"arrow"}
    if isinstance(source, Arrow):
        return columns - {"parquet"}
    every: frozenset[Form] = frozenset(form for _, form in ENDINGS)
    return every if isinstance(source, Hub) else every - columns


def _endings(source: Input) -> str:
    return ", ".join(ending for ending, form in ENDINGS if form in _forms(source))


def _item(name: str, path: str, form: Form) -> Item:
    """A file with its sizes. What is no regular file is refused: a pipe would wait for ever."""
    about = os.stat(path)
    if not os.path.isfile(path):
        raise InputError(f"{name}: expected a regular file, got another kind; exclude it")
    with open(path, "rb"):
        sizes = _row_group_bytes(name, path) if form == "parquet" else (about.st_size,)
    return Item(name=name, path=os.path.abspath(path), form=form, sizes=sizes, modified_ns=about.st_mtime_ns)


def _row_group_bytes(name: str, path: str) -> tuple[int, ...]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise extra("pyarrow", name, "data") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            return tuple(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: expected a Parquet file, got {one_line(error)}; restore or exclude it") from error


def one_line(error: Exception) -> str:
    """The first line of what an exception says, shortened."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def hub_files(source: Hub) -> tuple[Any, list[str]]:
    """The module `datasets`, and the address of each file of a data set's split; nothing is fetched.

    Raises:  InputError when `datasets` is not installed, or finds no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise extra("datasets", source.dataset, "hub") from error
    where = f"input.dataset {source.dataset}"
    try:
        builder = datasets.load_dataset_builder(source.dataset, source.subset)
        files = dict(builder.config.data_files or {})
    except (OSError, ValueError) as error:
        raise InputError(
            f"{where}: expected a data set that can be found, got {one_line(error)}; check its name"
        ) from error
    if source.split not in files:
        raise InputError(
            f"{where}: expected one of the splits {', '.join(files) or 'none'}, got {source.split}; choose another"
        )
    return datasets, [str(file) for file in files[source.split]]


def _fetched(source: Hub) -> list[tuple[str, str]]:
    """Name and local path of each file of a data set's split, fetched by `datasets` where it is not local."""
    datasets, remote = hub_files(source)
    try:
        local = datasets.DownloadManager(dataset_name=source.dataset).download(remote)
    except (OSError, ValueError) as error:
        where = f"input.dataset {source.dataset}"
        raise InputError(f"{where}: expected files that can be fetched, got {one_line(error)}; try again") from error
    return list(zip(remote, map(str, local), strict=True))
