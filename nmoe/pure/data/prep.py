"""How preparation is cut up: files into tasks, documents into splits. Integers and digests only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import attrs

MILLION = 1_000_000

SPLIT_SALT = b"nmoe stdlib split"
"""Part of what a split is: another salt is another split. It is the embedded corpus's, whose splits must not move."""

Form = Literal["text", "text.gz", "text.zst", "python", "lines", "gzip", "zstd", "parquet", "arrow"]


@attrs.frozen(kw_only=True)
class Item:
    """One file of a source.

    name   what it is called in messages, whatever machine reads it
    sizes  bytes of the parts that can be read alone: the row groups of a Parquet file; of any other the whole
    """

    name: str
    path: str
    form: Form
    sizes: tuple[int, ...]
    modified_ns: int


@attrs.frozen(kw_only=True)
class Range:
    """Part of an item: the lines that begin in bytes `start` to `end`, row groups `start` to `end`, or all of it.

    file   which item
    """

    file: int
    start: int
    end: int


def plan(items: Sequence[Item], task_bytes: int) -> tuple[tuple[Range, ...], ...]:
    """The tasks: consecutive ranges of about `task_bytes` together, covering every item once, in order.

    Plain JSONL is cut anywhere, Parquet between row groups; what can only be read from its beginning is one range.
    """
    tasks: list[list[Range]] = []
    room = 0
    for size, part in chain.from_iterable(_parts(index, item, task_bytes) for index, item in enumerate(items)):
        if not tasks or size > room:
            tasks.append([])
            room = task_bytes
        room -= size
        last = tasks[-1][-1] if tasks[-1] else None
        if last is not None and (last.file, last.end) == (part.file, part.start):
            tasks[-1][-1] = attrs.evolve(last, end=part.end)
        else:
            tasks[-1].append(part)
    return tuple(tuple(task) for task in tasks)


def split_of(digest: bytes, *, validation: int, test: int) -> str:
    """The split of the document with this content digest, the same everywhere.

    Equal texts share a digest and so a split: no held-out text is trained on under another name. The draw has its
    hundredths in front, so that a share of whole percents cuts where it did when percents were all there was.

    validation, test  shares in millionths
    """
    draw = int.from_bytes(hashlib.sha256(SPLIT_SALT + digest).digest(), "big")
    place = draw % 100 * 10_000 + draw // 100 % 10_000
    if place < MILLION - validation - test:
        return "train"
    return "validation" if place < MILLION - test else "test"


def _parts(index: int, item: Item, most: int) -> Iterator[tuple[int, Range]]:
    """The parts of an item that can be a range, with their bytes."""
    total = sum(item.sizes)
    if item.form == "parquet":
        yield from ((size, Range(file=index, start=at, end=at + 1)) for at, size in enumerate(item.sizes))
    elif item.form == "lines":
        count = -(-total // most)
        edges = [total * part // count for part in range(count)] + [total]
        yield from (
            (end - start, Range(file=index, start=start, end=end)) for start, end in zip(edges, edges[1:], strict=False)
        )
    else:
        yield total, Range(file=index, start=0, end=total)
