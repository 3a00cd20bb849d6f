"""The third pass: tokenize what stays and write it as shards, a folder a task."""

from __future__ import annotations

import hashlib
import shutil
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import attrs
import numpy as np
import tiktoken

from nmoe.effects import files
from nmoe.effects.data import tokenizer
from nmoe.effects.data.prepare.match import dropped
from nmoe.effects.data.prepare.survey import FORMAT, Work, cleaned, reporting
from nmoe.effects.data.store.format import Receipt
from nmoe.effects.data.store.records import read_record, write_record
from nmoe.effects.data.store.shard_writer import Sink
from nmoe.effects.data.store.shards import documents_of
from nmoe.errors import InputError
from nmoe.pure.data.prep import MILLION, split_of

RECORD = "built.json"
TRAIN = "train"
SPLITS = (TRAIN, "validation", "test")
NAMES = MappingProxyType({"exact": "duplicate", "near": "near duplicate"})


@attrs.frozen(kw_only=True)
class Built:
    """What one task wrote: its shards by split, and how many documents repeated earlier ones."""

    format: int
    shards: dict[str, tuple[Receipt, ...]]
    dropped: dict[str, int]


def built_folder(work: Work) -> Path:
    """The folder that is there when the shards of a task are written."""
    return work.folder / "build" / f"task-{work.index:05d}"


def build(work: Work) -> Built:
    """Write the shards of one task, or read what was written when that is done already.

    Writes:  one folder, whole or not at all.
    Raises:  InputError when a file is not what it was in the survey, or something can not be read or written.
    """
    done = built_folder(work)
    with reporting(work.folder):
        if not done.exists():
            with files.new_folder(done) as folder:
                _write_shards(work, folder)
        return read_record(done / RECORD, Built, version=FORMAT)


def cut_folder(work: Work) -> Path:
    """The folder that is there when the shards of a task are cut."""
    return work.folder / "cut" / f"task-{work.index:05d}"


def cut(work: Work, room: int) -> Built:
    """The shards of a task that was built, with the first documents of its training split alone.

    room  tokens that the training split may have

    Writes:  one folder, whole or not at all; what was built stays.
    """
    built, done = build(work), cut_folder(work)
    with reporting(work.folder):
        if not done.exists():
            stored, _ = _tokenizer(work.folder)
            with files.new_folder(done) as folder:
                for split in SPLITS[1:]:
                    shutil.copytree(built_folder(work) / split, folder / split)
                sink = Sink(folder / TRAIN, stored, work.source.tokens_per_shard)
                for document in documents_of(built_folder(work) / TRAIN, built.shards[TRAIN], stored):
                    room -= len(document) + 1
                    if room < 0:
                        break
                    sink.add(document)
                write_record(folder / RECORD, attrs.evolve(built, shards={**built.shards, TRAIN: sink.close()}))
        return read_record(done / RECORD, Built, version=FORMAT)


def _write_shards(work: Work, folder: Path) -> None:
    """Write the files of one task, the record last."""
    stored, encoding = _tokenizer(work.folder)
    lengths = tokenizer.byte_lengths(stored)
    repeated = dropped(work) if work.buckets else {}
    shares = work.source.splits
    validation, test = round(shares.validation * MILLION), round(shares.test * MILLION)
    digests = np.load(work.done() / "digests.npy", mmap_mode="r")
    sinks = {split: Sink(folder / split, stored, work.source.tokens_per_shard) for split in SPLITS}
    number = 0
    for entry in cleaned(work):
        if entry.reason is not None:
            continue
        raw = entry.text.encode("utf-8")
        digest = hashlib.sha256(raw).digest()
        where = f"{work.items[entry.item].name} at {entry.document.position}"
        if number >= len(digests) or digests[number].tobytes() != digest:
            raise InputError(
                f"{where}: expected the text of the survey, got another; start again in an empty folder, and leave the "
                "files alone until it ends"
            )
        if not any(number in numbers for numbers in repeated.values()):
            tokens = tokenizer.encode(encoding, entry.text)
            if (covered := int(lengths[tokens].sum())) != len(raw):
                raise InputError(
                    f"{where}: expected tokens of all {len(raw)} bytes, got {covered}, the pattern of tokenizer "
                    f"{stored.name} leaves characters out; choose another tokenizer"
                )
            sinks[split_of(digest, validation=validation, test=test)].add(tokens)
        number += 1
    record = Built(
        format=FORMAT,
        shards={split: sink.close() for split, sink in sinks.items()},
        dropped={NAMES[reason]: len(numbers) for reason, numbers in repeated.items()},
    )
    write_record(folder / RECORD, record)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> tuple[tokenizer.Tokenizer, tiktoken.Encoding]:
    """The tokenizer beside the plan, which does not change while a folder is prepared; a second to load when large."""
    stored = tokenizer.load(folder)
    return stored, tokenizer.encoding(stored)
