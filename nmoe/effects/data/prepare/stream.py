"""Records of a data set that is streamed: written once to files of JSON lines, which preparation reads as others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import attrs
import tiktoken

from nmoe.config.data_source import Source, Streamed, canonical
from nmoe.effects import files
from nmoe.effects.data import tokenizer
from nmoe.effects.data.prepare.inputs import extra, one_line
from nmoe.effects.data.store.records import read_record, write_record
from nmoe.errors import InputError
from nmoe.pure.data.prep import Item

FORMAT = 1
FOLDER = "stream"
LINES, RECORD = "records.jsonl", "part.json"
SAMPLED_BYTES = 1 << 20
"""Text of a part that is tokenized to estimate its tokens; those that are kept are counted when they are built."""
SPARE = 1.1
"""Tokens read for each that is asked for: what deduplication and filters drop is made up for up to here."""


@attrs.frozen(kw_only=True)
class Part:
    """What one file holds, and where the stream stands behind it.

    tokens  estimated
    ended   whether the data set has no more
    state   of the data set, as JSON
    """

    format: int
    documents: int
    tokens: int
    ended: bool
    state: str


def open_set(said: Streamed) -> Any:
    """The data set, of which nothing is read yet.

    Raises:  InputError when `datasets` is not installed or finds no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise extra("datasets", said.dataset, "hub") from error
    with _naming(said, "check its name, its split and the network"):
        return datasets.load_dataset(said.dataset, said.subset, split=said.split, streaming=True)


def fetch(
    opened: Any, said: Streamed, source: Source, known: tokenizer.Tokenizer, work: Path, say: Callable[[str], None]
) -> tuple[Item, ...]:
    """The records of a data set as files of about `task_bytes`; what an earlier call fetched is not fetched again.

    The stream ends once its training split has `max_tokens` by an estimate, with some to spare.

    opened   what `open_set` gave
    work     folder of the preparation

    Writes:  `work`/stream, each file whole or not at all.
    Raises:  InputError when the stream breaks, or a record lacks the text's key or has values that JSON has not.
    """
    train = 1.0 - source.splits.validation - source.splits.test
    wanted = None if source.max_tokens is None else SPARE * source.max_tokens / max(train, 1e-6)
    run = tokenizer.encoding(known)
    # A source that is changed before there is a plan has files of its own; afterwards it is refused.
    folder = work / FOLDER / hashlib.sha256(f"{known.identity} {canonical(source)}".encode()).hexdigest()[:16]
    paths = (folder / f"part-{at:05d}" for at in count())
    parts = [read_record(path / RECORD, Part, version=FORMAT) for path in takewhile(Path.exists, paths)]
    if parts:
        opened.load_state_dict(json.loads(parts[-1].state))
    records: Iterator[Any] = iter(opened)
    while not _is_enough(parts, wanted):
        with _naming(said, "start again, what is fetched is kept"):
            room = None if wanted is None else wanted - sum(part.tokens for part in parts)
            with files.new_folder(folder / f"part-{len(parts):05d}") as place:
                part = _write_part(records, opened, said, source.task_bytes, room, run, place)
                write_record(place / RECORD, part)
        parts.append(part)
        tokens = sum(each.tokens for each in parts)
        say(f"stream: {sum(each.documents for each in parts)} documents fetched, about {tokens / 1e6:.1f} M tokens")
    found = [folder / f"part-{at:05d}" / LINES for at, part in enumerate(parts) if part.documents]
    if not found:
        raise InputError(f"input.dataset {said.dataset}: expected records in {said.split}, got none; choose another")
    return tuple(_item(path, said) for path in found)


def _is_enough(parts: list[Part], wanted: float | None) -> bool:
    """Whether the files hold what is wanted, or all that there is."""
    return bool(parts) and (parts[-1].ended or (wanted is not None and sum(part.tokens for part in parts) >= wanted))


def _write_part(
    records: Iterator[Any],
    opened: Any,
    said: Streamed,
    most_bytes: int,
    room: float | None,
    run: tiktoken.Encoding,
    place: Path,
) -> Part:
    """Write records until the file has `most_bytes` of text, or `room` tokens by an estimate."""
    fields = [said.text_field, *([] if said.id_field is None else [said.id_field])]
    documents = num_bytes = sampled_bytes = sampled_tokens = 0
    ended = True
    with open(place / LINES, "w", encoding="ascii") as file:
        for record in records:
            if absent := [field for field in fields if field not in record]:
                raise InputError(
                    f"input.dataset {said.dataset}: expected a key {', '.join(absent)}, got "
                    f"{', '.join(map(str, record))[:200]}; set input.text_field and input.id_field"
                )
            file.write(json.dumps({field: record[field] for field in fields}) + "\n")
            text = record[said.text_field] if isinstance(record[said.text_field], str) else ""
            size = len(text.encode("utf-8", "replace"))
            if sampled_bytes < SAMPLED_BYTES:
                sampled_bytes += size
                sampled_tokens += len(tokenizer.encode(run, text.encode("utf-8", "replace").decode())) + 1
            documents, num_bytes = documents + 1, num_bytes + size
            tokens = sampled_tokens * num_bytes / max(sampled_bytes, 1)
            if num_bytes >= most_bytes or (room is not None and tokens >= room):
                ended = False
                break
    estimate = int(sampled_tokens * num_bytes / max(sampled_bytes, 1))
    state = json.dumps(opened.state_dict())
    return Part(format=FORMAT, documents=documents, tokens=estimate, ended=ended, state=state)


def _item(path: Path, said: Streamed) -> Item:
    about = path.stat()
    name = f"{said.dataset} {said.split} {path.parent.name}"
    return Item(
        name=name, path=str(path.resolve()), form="lines", sizes=(about.st_size,), modified_ns=about.st_mtime_ns
    )


@contextmanager
def _naming(said: Streamed, remedy: str) -> Iterator[None]:
    """A block whose failures are the data set's."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise InputError(
            f"input.dataset {said.dataset}: expected a data set that can be streamed, got {one_line(error)}; {remedy}"
        ) from error
