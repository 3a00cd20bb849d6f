"""The second pass: which documents repeat an earlier one. A task holds one bucket of keys, never all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np

from nmoe.effects import files
from nmoe.effects.data.prepare.survey import FORMAT, RECORD, Survey, Work, reporting
from nmoe.effects.data.store.records import read_record
from nmoe.errors import InputError


@attrs.frozen(kw_only=True)
class Match:
    """One bucket: the documents whose keys fall into it.

    near  similarity from which documents repeat each other; None: only equal ones do
    """

    folder: Path
    index: int
    tasks: int
    near: float | None

    def done(self) -> Path:
        """The folder that is there when the bucket is matched."""
        return self.folder / "match" / f"bucket-{self.index:05d}"


def match(bucket: Match) -> None:
    """Find the repetitions in one bucket, or do nothing when that is done.

    exact.npy, near.npy  [n 2] i64  task and document of what goes

    Writes:  one folder, whole or not at all.
    Raises:  InputError when an id repeats, or something can not be read or written.
    """
    with reporting(bucket.folder):
        if bucket.done().exists():
            return
        with files.new_folder(bucket.done()) as folder:
            for first, again in _pairs(_gathered(bucket, "id")):
                raise InputError(
                    f"{_place(bucket, again)}: expected an id of its own, got that of {_place(bucket, first)}; "
                    "fix the ids, or leave input.id_field out"
                )
            exact = [again for _, again in _pairs(_gathered(bucket, "exact"))]
            np.save(folder / "exact.npy", np.array(exact, dtype="<i8").reshape(-1, 2))
            np.save(folder / "near.npy", np.array(_near(bucket), dtype="<i8").reshape(-1, 2))


def dropped(work: Work) -> dict[str, set[int]]:
    """The documents of one task that repeat earlier ones, by reason."""
    repeated: dict[str, set[int]] = {"exact": set(), "near": set()}
    for folder in (work.folder / "match" / f"bucket-{index:05d}" for index in range(work.buckets)):
        for reason, documents in repeated.items():
            rows = np.load(folder / f"{reason}.npy")
            documents.update(rows[rows[:, 0] == work.index, 1].tolist())
    repeated["near"] -= repeated["exact"]
    return repeated


def _gathered(bucket: Match, kind: str) -> np.ndarray:
    """The keys of one bucket: two words, task, document; [n 4] u64, by task and document within equal keys."""
    rows: list[np.ndarray] = [np.zeros((0, 4), dtype=np.uint64)]
    for task in range(bucket.tasks):
        folder = bucket.folder / "survey" / f"task-{task:05d}"
        ends = np.load(folder / f"{kind}-ends.npy")
        begin = int(ends[bucket.index - 1]) if bucket.index else 0
        keys = np.load(folder / f"{kind}.npy", mmap_mode="r")[begin : int(ends[bucket.index])]
        rows.append(np.insert(keys, 2, task, axis=1))
    whole = np.concatenate(rows)
    return whole[np.lexsort((whole[:, 1], whole[:, 0]))]


def _groups(rows: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """The documents, task and number in it, of every key that occurs more than once."""
    if len(rows) < 2:
        return
    changes = np.flatnonzero((rows[1:, :2] != rows[:-1, :2]).any(axis=1)) + 1
    starts, ends = np.append(0, changes), np.append(changes, len(rows))
    for which in np.flatnonzero(ends - starts > 1):
        yield [(int(task), int(document)) for task, document in rows[starts[which] : ends[which], 2:]]


def _pairs(rows: np.ndarray) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The first document of each key, with every later one."""
    for first, *rest in _groups(rows):
        yield from ((first, again) for again in rest)


def _near(bucket: Match) -> list[tuple[int, int]]:
    """Documents that share a band with an earlier one and are as similar by all of their MinHash."""
    if bucket.near is None:
        return []
    signatures: dict[int, np.ndarray] = {}

    def signature(place: tuple[int, int]) -> np.ndarray:
        task, document = place
        if task not in signatures:
            path = bucket.folder / "survey" / f"task-{task:05d}" / "signatures.npy"
            signatures[task] = np.load(path, mmap_mode="r")
        return signatures[task][document]

    repeated: list[tuple[int, int]] = []
    for places in _groups(_gathered(bucket, "near")):
        stay: list[np.ndarray] = []
        for place in places:
            own = signature(place)
            if any(float(np.mean(own == other)) >= bucket.near for other in stay):
                repeated.append(place)
            else:
                stay.append(own)
    return repeated


def _place(bucket: Match, place: tuple[int, int]) -> str:
    """File and position of a document, for a message."""
    task, document = place
    folder = bucket.folder / "survey" / f"task-{task:05d}"
    item, position = np.load(folder / "places.npy")[document]
    return f"{read_record(folder / RECORD, Survey, version=FORMAT).names[item]} at {position}"
