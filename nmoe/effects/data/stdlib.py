"""The embedded corpus: Python's own standard library, with a tokenizer trained on it; real text on every machine."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import numpy as np

from nmoe.effects import files
from nmoe.effects.data import tokenizer
from nmoe.effects.data.store import shard_writer
from nmoe.effects.data.store.format import read_manifest, size_problems
from nmoe.effects.terminal import Progress
from nmoe.errors import InputError
from nmoe.pure.data.prep import MILLION, split_of

# Raise it when the same files would give other shards.
FORMAT = 3
SPLITS = ("train", "validation", "test")
VALIDATION = TEST = MILLION * 2 // 100
# Tests, other people's packages, and what differs between two builds of the same Python.
SKIPPED_FOLDERS = ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__")
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@attrs.frozen(kw_only=True)
class _Source:
    """One file: its text and what identifies its content."""

    text: str
    num_bytes: int
    digest: bytes


def prepare(home: Path, tokenizer_size: int, say: Callable[[str], None]) -> Path:
    """The folder with the running Python's standard library as shards, made when it is not there yet.

    home            folder for what nmoe makes once; the corpus goes to `home`/stdlib/<id>
    tokenizer_size  vocabulary of the tokenizer trained on the training split
    say             receives lines of progress

    Writes:  `home`/stdlib.
    Raises:  InputError as `prepare_folder`.
    Cost:    about 4 s once on two cores; then the time to read and hash 11 MB.
    """
    return prepare_folder(Path(sysconfig.get_path("stdlib")), home / "stdlib", tokenizer_size, say)


def prepare_folder(root: Path, cache: Path, tokenizer_size: int, say: Callable[[str], None]) -> Path:
    """The folder with the Python files below `root` as shards, made when it is not there yet.

    The folder's name is a hash of what it is made from, so a change of a file makes another one. It appears whole, by a
    rename; one process at a time builds, the others wait for it.

    Writes:  a folder of `cache`.
    Raises:  InputError when a file can not be decoded, a split stays empty, the tokenizer can not be trained, `cache`
             can not be made, or the folder found there is damaged.
    """
    sources = _read_sources(root)
    folder = cache / _identity(sources, tokenizer_size)
    if not folder.exists():
        with _locked(cache, say):
            if not folder.exists():
                _build(sources, folder, tokenizer_size, say)
    _check(folder)
    return folder


def held_out() -> list[str]:
    """Texts of the running Python's standard library that no training on it reads: its splits validation and test.

    Raises:  InputError as `prepare_folder` for files that cannot be read.
    """
    sources = _read_sources(Path(sysconfig.get_path("stdlib")))
    return [x.text for x in sources if split_of(x.digest, validation=VALIDATION, test=TEST) != "train"]


def _read_sources(root: Path) -> list[_Source]:
    """The files of the corpus, by path. Empty ones, of which a library has many, are left out: they teach nothing."""
    sources: list[_Source] = []
    problems: list[str] = []
    for path in paths(root):
        try:
            content = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: expected a readable file, got {error.strerror}; reinstall Python")
            continue
        try:
            text = content.decode(tokenize.detect_encoding(io.BytesIO(content).readline)[0])
        except UnicodeDecodeError as error:
            problems.append(
                f"{path}: expected text in {error.encoding}, got byte {content[error.start]:#04x} at {error.start}; "
                "fix the file or reinstall Python"
            )
        except (SyntaxError, LookupError) as error:
            problems.append(
                f"{path}: expected a known encoding in its first two lines, got {error} "
                f"({_first_beyond_utf8(content)}); fix the file or reinstall Python"
            )
        else:
            if text:
                digest = hashlib.sha256(content).digest()
                sources.append(_Source(text=text, num_bytes=len(text.encode("utf-8")), digest=digest))
    if problems:
        raise InputError(*problems)
    if not sources:
        raise InputError(
            f"{root}: expected Python files with text, got none; run a Python that has its standard library as files"
        )
    return sources


def paths(root: Path) -> list[Path]:
    """The Python files below `root` that belong to the corpus, by relative path.

    Raises:  InputError when a folder can not be looked into.
    """
    matching: list[Path] = []
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: expected a readable folder, got {error.strerror}; reinstall Python")

    for folder, names, file_names in os.walk(root, onerror=unreadable):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        matching += [
            Path(folder, name) for name in file_names if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES)
        ]
    if problems:
        raise InputError(*problems)
    return sorted(matching, key=lambda path: path.relative_to(root).as_posix())


def _first_beyond_utf8(content: bytes) -> str:
    """Where the content stops being UTF-8, in words."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {content[error.start]:#04x} at {error.start} is not UTF-8"
    return "every byte is UTF-8"


def _identity(sources: Sequence[_Source], tokenizer_size: int) -> str:
    """Name of the folder made from these files: equal for equal bytes in it."""
    made_from = [
        FORMAT,
        [VALIDATION, TEST],
        tokenizer.PATTERN,
        tokenizer_size,
        [source.digest.hex() for source in sources],
    ]
    return hashlib.sha256(json.dumps(made_from).encode("utf-8")).hexdigest()[:16]


def _build(sources: Sequence[_Source], folder: Path, tokenizer_size: int, say: Callable[[str], None]) -> None:
    """Train the tokenizer, encode, write. The caller is alone in the cache: what other builds left there is dead.

    Writes:  `folder`, whole or not at all.
    """
    began = time.monotonic()
    for dead in folder.parent.glob(".*.building"):
        shutil.rmtree(dead)
    parts: dict[str, list[_Source]] = {split: [] for split in SPLITS}
    for source in sources:
        parts[split_of(source.digest, validation=VALIDATION, test=TEST)].append(source)
    if empty := [split for split, part in parts.items() if not part]:
        raise InputError(
            f"{folder.parent}: expected a file for each split, got none of {len(sources)} for {', '.join(empty)}; "
            "give more files"
        )
    trained = tokenizer.train(_with_progress(parts["train"], "tokenizer", say), tokenizer_size, say)
    encoding = tokenizer.encoding(trained)

    def documents(split: str) -> Iterator[np.ndarray]:
        for text in _with_progress(parts[split], split, say):
            yield tokenizer.encode(encoding, text)

    temporary = folder.with_name(f".{folder.name}.building")
    try:
        manifest = shard_writer.write(temporary, trained, {split: documents(split) for split in parts})
        os.rename(temporary, folder)
        files.sync_folder(folder.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    totals = ", ".join(f"{receipt.tokens} {split}" for split, receipt in manifest.splits.items())
    say(f"{folder}: {totals} tokens, prepared in {time.monotonic() - began:.1f} s")


def _with_progress(sources: Sequence[_Source], what: str, say: Callable[[str], None]) -> Iterator[str]:
    """The texts, with a line of progress every few seconds."""
    total, done = sum(source.num_bytes for source in sources), 0
    progress = Progress(say, total)
    for num, source in enumerate(sources, 1):
        yield source.text
        done += source.num_bytes
        progress.at(done, f"{what}: {num} of {len(sources)} files, {done / 1e6:.1f} of {total / 1e6:.1f} MB")


@contextmanager
def _locked(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the cache's lock, which the system lets go when its process ends, however it ends.

    Writes:  `cache` and the lock file in it, which stay.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / ".lock", "a")
    except OSError as error:
        raise InputError(
            f"{cache}: expected a folder to write to, got {error.strerror}; set NMOE_HOME to another"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{cache}: another process prepares data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check(folder: Path) -> None:
    """Refuse a folder that lost something since it was made: names, sizes and the tokenizer; `open_split` hashes."""
    try:
        manifest = read_manifest(folder)
        if problems := [line for split in manifest.splits for line in size_problems(folder, manifest, split)]:
            raise InputError(*problems)
    except InputError as error:
        remedy = f"{folder}: expected a whole folder, got the damage above; delete it to have it made again"
        raise InputError(*error.problems, remedy) from error
