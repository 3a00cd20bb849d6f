"""A source: one TOML that says which texts become shards, and what is done to them on the way.

As strict as a training config: no value is coerced, no key ignored, everything wrong is said at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

import attrs

from nmoe.config.check import out_of_bounds
from nmoe.config.convert import structure
from nmoe.config.fields import table
from nmoe.config.setting import setting
from nmoe.config.toml import read_kind
from nmoe.errors import InputError

MOST_BYTES = 2**40
"""More than one file, document or shard has."""


@attrs.frozen(kw_only=True)
class Files:
    """Text or code, a document a file, also as .gz and .zst; of .jsonl and .parquet a document a line or row."""

    kind: ClassVar[str] = "files"

    paths: tuple[str, ...] = setting("folders, files and globs (** crosses folders), relative to this TOML")
    exclude: tuple[str, ...] = setting("globs of what is left out", default=())
    text_field: str = setting("key or column of the text in .jsonl and .parquet", default="text")
    max_chars: int | None = setting(
        "a longer text file is cut behind line breaks into documents of at most this; absent: never",
        unit="characters",
        default=None,
        low=1000,
        high=MOST_BYTES,
    )


@attrs.frozen(kw_only=True)
class Jsonl:
    """A document a line of JSON; .gz and .zst are read as they are."""

    kind: ClassVar[str] = "jsonl"

    paths: tuple[str, ...] = setting("folders, files and globs, relative to this TOML")
    exclude: tuple[str, ...] = setting("globs of what is left out", default=())
    text_field: str = setting("key of the text", default="text")
    id_field: str | None = setting("key of the document's id, which must not repeat; absent: no ids", default=None)


@attrs.frozen(kw_only=True)
class Parquet:
    """A document a row."""

    kind: ClassVar[str] = "parquet"

    paths: tuple[str, ...] = setting("folders, files and globs, relative to this TOML")
    exclude: tuple[str, ...] = setting("globs of what is left out", default=())
    text_field: str = setting("column of the text", default="text")
    id_field: str | None = setting("column of the document's id, which must not repeat; absent: no ids", default=None)


@attrs.frozen(kw_only=True)
class Arrow:
    """A document a row of Arrow files, streams or random access, as `datasets` writes them."""

    kind: ClassVar[str] = "arrow"

    paths: tuple[str, ...] = setting("folders, files and globs, relative to this TOML")
    exclude: tuple[str, ...] = setting("globs of what is left out", default=())
    text_field: str = setting("column of the text", default="text")
    id_field: str | None = setting("column of the document's id, which must not repeat; absent: no ids", default=None)


@attrs.frozen(kw_only=True)
class Hub:
    """A data set that the package `datasets` finds: its JSONL, Parquet or Arrow files are fetched, then read."""

    kind: ClassVar[str] = "hub"

    dataset: str = setting("name or folder of the data set")
    subset: str | None = setting("configuration of the data set; absent: its default", default=None)
    split: str = setting("split of the data set", default="train")
    text_field: str = setting("key of the text", default="text")
    id_field: str | None = setting("key of the document's id, which must not repeat; absent: no ids", default=None)


@attrs.frozen(kw_only=True)
class Streamed:
    """A data set that the package `datasets` finds, its records streamed until `max_tokens` is reached."""

    kind: ClassVar[str] = "stream"

    dataset: str = setting("name or folder of the data set")
    subset: str | None = setting("configuration of the data set; absent: its default", default=None)
    split: str = setting("split of the data set", default="train")
    text_field: str = setting("key of the text", default="text")
    id_field: str | None = setting("key of the document's id, which must not repeat; absent: no ids", default=None)


@attrs.frozen(kw_only=True)
class Library:
    """The running Python's standard library, without its tests."""

    kind: ClassVar[str] = "stdlib"


Input = Files | Jsonl | Parquet | Arrow | Hub | Streamed | Library


@attrs.frozen(kw_only=True)
class Clean:
    """What happens to a text before anything else. For code write unicode = "keep" and control = "keep"."""

    unreadable: Literal["error", "skip"] = setting(
        "files and records that can not be read: stop, or leave out and count", default="error"
    )
    invalid_utf8: Literal["error", "replace"] = setting(
        "bytes that are not UTF-8: stop, or write U+FFFD for each and count", default="error"
    )
    unicode: Literal["nfc", "keep"] = setting("Unicode normal form", default="nfc")
    control: Literal["remove", "keep"] = setting("control characters other than tab and line breaks", default="remove")


@attrs.frozen(kw_only=True)
class Filter:
    """Which documents stay. Empty ones never do."""

    min_chars: int = setting("shortest document", unit="characters", default=1, low=1, high=MOST_BYTES)
    max_bytes: int = setting(
        "longest document; a longer one is passed over unread",
        unit="bytes",
        default=100_000_000,
        low=1,
        high=MOST_BYTES,
    )
    max_repetition: float = setting(
        "largest share of characters in lines that the document had before", default=1.0, low=0, high=1
    )
    max_symbols: float = setting(
        "largest share of characters that are neither word characters nor white space", default=1.0, low=0, high=1
    )


@attrs.frozen(kw_only=True)
class Deduplicate:
    """Of equal or similar documents the first stays: by file name, then by place in the file."""

    exact: bool = setting("remove documents with the text of an earlier one", default=True)
    near: float | None = setting(
        "remove documents this similar (Jaccard of word shingles, by MinHash) to an earlier one; absent: none are",
        default=None,
        low=0.3,
        high=0.99,
    )
    permutations: int = setting("length of a MinHash", default=128, low=16, high=1024)
    shingle_words: int = setting("words in a shingle", default=5, low=1, high=50)


@attrs.frozen(kw_only=True)
class Splits:
    """Shares of the held-out splits. A hash of its text says which split a document is in, here and everywhere."""

    validation: float = setting("share of documents, to the millionth", default=0.02, low=0, high=0.5)
    test: float = setting("share of documents, to the millionth", default=0.02, low=0, high=0.5)


@attrs.frozen(kw_only=True)
class Source:
    """A whole source."""

    tokenizer: str = setting("name of a tokenizer (`nmoe data tokenizer list`), or the path of a tokenizer.json")
    tokens_per_shard: int = setting(
        "tokens a shard holds at most", unit="tokens", default=100_000_000, low=1, high=MOST_BYTES
    )
    task_bytes: int = setting(
        "input that one task reads, the unit of work that a crash can lose",
        unit="bytes",
        default=64 << 20,
        low=1,
        high=MOST_BYTES,
    )
    max_tokens: int | None = setting(
        "tokens of the training split at most, whole documents in the order they are read; absent: all",
        unit="tokens",
        default=None,
        low=1,
        high=MOST_BYTES,
    )
    input: Files | Jsonl | Parquet | Arrow | Hub | Streamed | Library = setting(
        "what is read; `kind` chooses the table's keys"
    )
    clean: Clean = setting("what is done to a text", default=attrs.Factory(Clean))
    filter: Filter = setting("which documents stay", default=attrs.Factory(Filter))
    deduplicate: Deduplicate = setting("which repeated documents go", default=attrs.Factory(Deduplicate))
    splits: Splits = setting("what is held out", default=attrs.Factory(Splits))


def load_source(path: Path) -> Source:
    """The source of a TOML file, checked.

    Raises:  InputError with everything that is wrong, each with file, line and key.
    """
    document = read_kind(path, "input")
    source = structure(document.tables, Source)
    if isinstance(source, tuple):
        raise InputError(*(document.fault(fault.path, fault.text) for fault in source))
    problems = [document.fault(key, text) for key, text in out_of_bounds(source)]
    if not isinstance(source.input, Hub | Streamed | Library) and not source.input.paths:
        problems.append(document.fault(("input", "paths"), "expected at least one path, got none; name one"))
    if problems:
        raise InputError(*problems)
    return source


def canonical(source: Source) -> str:
    """The source as JSON with every key, the same for equal sources."""
    return json.dumps(table(source), sort_keys=True)
