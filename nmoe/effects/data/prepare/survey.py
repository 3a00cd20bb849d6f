"""The first pass over a source: clean each document, judge it alone, and note by what its equals can be found."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import numpy as np

from nmoe.config.data_source import Deduplicate, Source
from nmoe.effects import files
from nmoe.effects.data.prepare import readers
from nmoe.effects.data.prepare.inputs import extra, one_line
from nmoe.effects.data.store.records import read_record, write_record
from nmoe.errors import InputError
from nmoe.pure.data.prep import Item, Range, plan
from nmoe.pure.data.text import drop_reason, normalize, shingles

FORMAT = 1
RECORD = "survey.json"
KINDS = ("exact", "id", "near")
"""What documents are compared by: their text, their id, bands of their MinHash."""
BUCKET_BYTES = 1 << 28
MOST_BUCKETS = 4096
SHINGLES = 4096
"""Shingles hashed at once; a giant document has millions."""


@attrs.frozen(kw_only=True)
class Work:
    """One task as it travels to whoever runs it: only what it needs, and everything of that.

    ranges  of `items`, which are those of this task alone
    """

    folder: Path
    index: int
    items: tuple[Item, ...]
    ranges: tuple[Range, ...]
    source: Source
    buckets: int

    def done(self) -> Path:
        """The folder that is there when the survey is done."""
        return self.folder / "survey" / f"task-{self.index:05d}"


@attrs.frozen(kw_only=True)
class Survey:
    """What a task found. `dropped` counts documents by reason, `bytes` the text of those that are left."""

    format: int
    documents: int
    kept: int
    bytes: int
    replaced: int
    dropped: dict[str, int]
    names: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Cleaned:
    """A document after cleaning; `reason` says why it is dropped, None that it stays."""

    text: str
    item: int
    document: readers.Document
    reason: str | None


def works_of(source: Source, items: Sequence[Item], folder: Path) -> tuple[Work, ...]:
    """The tasks as they travel: each with the items it reads, and no others."""
    tasks = plan(items, source.task_bytes)
    rules = source.deduplicate
    compares = rules.exact or rules.near is not None or getattr(source.input, "id_field", None) is not None
    total = sum(sum(item.sizes) for item in items)
    buckets = min(MOST_BUCKETS, 1 + total // BUCKET_BYTES) if compares else 0
    works: list[Work] = []
    for index, ranges in enumerate(tasks):
        used = sorted({part.file for part in ranges})
        works.append(
            Work(
                folder=folder,
                index=index,
                items=tuple(items[file] for file in used),
                ranges=tuple(attrs.evolve(part, file=used.index(part.file)) for part in ranges),
                source=source,
                buckets=buckets,
            )
        )
    if not works:
        raise InputError(f"{items[0].name}: expected files that are not empty, got only empty ones; fix input.paths")
    return tuple(works)


def survey(work: Work) -> Survey:
    """Survey one task, or read its record when that is done already.

    digests.npy     [n 32] u1   SHA-256 of each document that stays, in order
    places.npy      [n 2] i64   its item and position
    <kind>.npy      [m 3] u64   two words of key and the document, by bucket; <kind>-ends.npy [buckets] i64
    signatures.npy  [n p] u32   MinHash of each, when similar documents are removed

    Writes:  one folder, whole or not at all.
    Raises:  InputError when something can not be read or written.
    """
    with reporting(work.folder):
        if not work.done().exists():
            with files.new_folder(work.done()) as folder:
                _write_survey(work, folder)
        return read_record(work.done() / RECORD, Survey, version=FORMAT)


def cleaned(work: Work) -> Iterator[Cleaned]:
    """Every document of a task, in order.

    Raises:  InputError when a file is not what it was when the work was planned.
    """
    clean, rules = work.source.clean, work.source.filter
    for part in work.ranges:
        item = work.items[part.file]
        if os.stat(item.path).st_mtime_ns != item.modified_ns:
            raise InputError(
                f"{item.name}: expected a file that stays as it is, got a change; start again in an empty folder"
            )
        for document in readers.read(item, part, work.source):
            text, reason = document.text or "", document.reason
            if reason is None:
                text = normalize(text, nfc=clean.unicode == "nfc", control=clean.control == "remove")
                reason = drop_reason(
                    text,
                    min_chars=rules.min_chars,
                    max_repetition=rules.max_repetition,
                    max_symbols=rules.max_symbols,
                )
            yield Cleaned(text=text, item=part.file, document=document, reason=reason)


@contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """A block whose failures to read or write become InputErrors."""
    try:
        yield
    except BrokenPipeError:
        # of standard output, and the command line's to handle
        raise
    except OSError as error:
        where = error.filename or folder
        raise InputError(
            f"{where}: expected room and permission to read and write, got {error.strerror or one_line(error)}; "
            "fix that and start again, what is done is kept"
        ) from error


def _write_survey(work: Work, folder: Path) -> None:
    """Write the files of one survey, the record last."""
    rules = work.source.deduplicate
    has_ids = getattr(work.source.input, "id_field", None) is not None
    digests, places = bytearray(), array("q")
    keys = {kind: array("Q") for kind in KINDS}
    signatures = bytearray()
    dropped: Counter[str] = Counter()
    sign = None if rules.near is None else _signer(rules, rules.near)
    documents = kept = num_bytes = replaced = 0
    for entry in cleaned(work):
        documents += 1
        replaced += entry.document.replaced
        if entry.reason is not None:
            dropped[entry.reason] += 1
            continue
        raw = entry.text.encode("utf-8")
        digest = hashlib.sha256(raw).digest()
        digests += digest
        places.extend((entry.item, entry.document.position))
        if rules.exact:
            keys["exact"].extend((*_words(digest), kept))
        if has_ids:
            keys["id"].extend((*_words(hashlib.sha256(str(entry.document.id).encode("utf-8")).digest()), kept))
        if sign is not None:
            signature, bands = sign(entry.text)
            signatures += signature
            for band, key in enumerate(bands):
                keys["near"].extend((key, band, kept))
        num_bytes += len(raw)
        kept += 1
    np.save(folder / "digests.npy", np.frombuffer(digests, dtype="u1").reshape(kept, 32))
    np.save(folder / "places.npy", np.frombuffer(places, dtype="<i8").reshape(kept, 2))
    for kind, rows in keys.items():
        _save_keys(folder, kind, np.frombuffer(rows, dtype="<u8").reshape(-1, 3), work.buckets)
    if sign is not None:
        np.save(folder / "signatures.npy", np.frombuffer(signatures, dtype="<u4").reshape(kept, rules.permutations))
    record = Survey(
        format=FORMAT,
        documents=documents,
        kept=kept,
        bytes=num_bytes,
        replaced=replaced,
        dropped=dict(sorted(dropped.items())),
        names=tuple(item.name for item in work.items),
    )
    write_record(folder / RECORD, record)


def _words(digest: bytes) -> tuple[int, int]:
    """The first 128 bits of a digest: two texts that differ share them with a chance below 1e-15 in 1e11 documents."""
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _save_keys(folder: Path, kind: str, keys: np.ndarray, buckets: int) -> None:
    """Write keys ordered by bucket, and where each bucket ends."""
    bucket = keys[:, 0] % np.uint64(buckets)
    np.save(folder / f"{kind}.npy", keys[np.argsort(bucket, kind="stable")])
    counts = np.bincount(bucket.astype(np.int64), minlength=buckets)
    np.save(folder / f"{kind}-ends.npy", np.cumsum(counts).astype("<i8"))


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number and length of the bands that a MinHash is cut into, so that similar documents share one.

    datasketch balances what is missed against what is compared in vain, and refuses where that gives a single band: two
    find more of the similar ones.
    """
    try:
        import datasketch
    except ImportError as error:
        raise extra("datasketch", "deduplicate.near", "data") from error
    try:
        lsh = datasketch.MinHashLSH(threshold=threshold, num_perm=permutations)
    except ValueError:
        return 2, permutations // 2
    return lsh.b, lsh.r


def _signer(rules: Deduplicate, threshold: float) -> Callable[[str], tuple[bytes, list[int]]]:
    """A function from a text to its MinHash, as bytes, and the key of each band; a text without a word has none."""
    try:
        import datasketch
    except ImportError as error:
        raise extra("datasketch", "deduplicate.near", "data") from error
    count, width = _bands(threshold, rules.permutations)
    empty = datasketch.MinHash(num_perm=rules.permutations, seed=1, scheme="affine32")

    def sign(text: str) -> tuple[bytes, list[int]]:
        minhash, batch = empty.copy(), []
        for shingle in shingles(text, rules.shingle_words):
            batch.append(shingle.encode("utf-8"))
            if len(batch) == SHINGLES:
                minhash.update_batch(batch)
                batch = []
        minhash.update_batch(batch)
        values = np.asarray(minhash.hashvalues, dtype="<u4")
        if minhash.is_empty():
            return values.tobytes(), []
        bands = [values[at * width : (at + 1) * width].tobytes() for at in range(count)]
        return values.tobytes(), [
            int.from_bytes(hashlib.blake2b(band, digest_size=8).digest(), "little") for band in bands
        ]

    return sign
