"""`nmoe data verify`, `info`, `head`: what a prepared folder holds, and whether it still does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cattrs
import numpy as np

from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.prepare.prep import REPORT, Report, report_lines
from nmoe.effects.data.store.format import (
    REMEDY,
    Manifest,
    content_problems,
    dtype_of,
    mapped,
    read_manifest,
    size_problems,
    stem,
)
from nmoe.effects.data.store.records import read_record
from nmoe.errors import InputError

PROGRESS_EVERY_S = 2.0


def verify(folders: Sequence[Path], say: Callable[[str], None]) -> int:
    """Read every byte of some folders and compare it with what was written.

    Raises:  InputError with everything that is wrong, in all of them.
    """
    problems: list[str] = []
    for folder in folders:
        try:
            problems += _verify(folder, say)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return 0


def info(folder: Path, as_json: bool, say: Callable[[str], None]) -> int:
    """Say what a prepared folder holds, and what it was made from where that is known."""
    manifest = read_manifest(folder)
    report = read_record(folder / REPORT, Report, version=1) if (folder / REPORT).exists() else None
    if as_json:
        whole: dict[str, Any] = cattrs.Converter().unstructure(manifest)
        say(json.dumps({**whole, "report": cattrs.Converter().unstructure(report)}, indent=1))
        return 0
    name = tokenizers.load(folder).name
    say(f"tokenizer  {name}, {manifest.tokenizer_size} ids, identity {manifest.tokenizer_identity}")
    for split, about in manifest.splits.items():
        per_token = f", {about.bytes / about.tokens:.2f} bytes a token" if about.tokens else ""
        say(
            f"{split:<10} {about.tokens} tokens, {about.documents} documents, {about.bytes / 1e6:.1f} MB of text, "
            f"{len(about.shards)} shards{per_token}"
        )
    if report is not None:
        say(f"source     {report.source}")
        say("\n".join(report_lines(report)))
    return 0


def head(folder: Path, split: str, skip: int, count: int, chars: int, say: Callable[[str], None]) -> int:
    """Print the beginnings of some documents."""
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise InputError(f"{folder}: one of the splits {', '.join(manifest.splits)}, got {split}; choose one of them")
    if problems := size_problems(folder, manifest, split):
        raise InputError(*problems)
    if min(skip, count, chars) < 0:
        raise InputError(f"--skip, --documents, --chars: at least 0, got {skip}, {count}, {chars}; raise them")
    tokenizer = tokenizers.load(folder)
    encoding = tokenizers.encoding(tokenizer)
    for number, tokens in enumerate(documents(folder, manifest, split)):
        if number < skip:
            continue
        if number >= skip + count:
            break
        if len(tokens) and (highest := int(tokens.max())) >= len(tokenizer.ranks):
            raise InputError(
                f"{folder / split}: ids below {len(tokenizer.ranks)} in document {number}, got {highest}; {REMEDY}"
            )
        # A token is a byte at least, and a character four at most.
        text = encoding.decode(tokens[: 4 * chars].tolist())[:chars]
        say(f"--- {split} document {number}, {len(tokens)} tokens\n{text}")
    return 0


def documents(folder: Path, manifest: Manifest, split: str) -> Iterator[np.ndarray]:
    """The documents of a split in order, without end of text: [n] u2 or u4, views of the files."""
    for index, receipt in enumerate(manifest.splits[split].shards):
        tokens = mapped(folder / split / f"{stem(index)}.npy", dtype_of(manifest.tokenizer_size), receipt.tokens)
        ends = mapped(folder / split / f"{stem(index)}.ends.npy", np.dtype("<i8"), receipt.documents)
        begin = 0
        for end in ends.tolist():
            if not begin < end <= len(tokens):
                raise InputError(f"{folder / split / stem(index)}.ends.npy: rising ends, got {begin}, {end}; {REMEDY}")
            yield tokens[begin : end - 1]
            begin = end


def _verify(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Everything that is wrong with one folder."""
    manifest = read_manifest(folder)
    end_of_text = tokenizers.load(folder).end_of_text
    problems = [line for split in manifest.splits for line in size_problems(folder, manifest, split)]
    if problems:
        return problems
    total = sum(about.tokens for about in manifest.splits.values())
    began = spoken = time.monotonic()
    through = 0
    for split, about in manifest.splits.items():
        for index, receipt in enumerate(about.shards):
            problems += content_problems(folder / split, index, receipt, manifest.tokenizer_size)
            tokens = mapped(folder / split / f"{stem(index)}.npy", dtype_of(manifest.tokenizer_size), receipt.tokens)
            ends = mapped(folder / split / f"{stem(index)}.ends.npy", np.dtype("<i8"), receipt.documents)
            marks = np.flatnonzero(tokens == end_of_text) + 1
            if not np.array_equal(marks, ends):
                problems.append(
                    f"{folder / split / stem(index)}.ends.npy: the place behind each end of text, got others; {REMEDY}"
                )
            through += receipt.tokens
            now = time.monotonic()
            if now - spoken >= PROGRESS_EVERY_S:
                spoken = now
                took = now - began
                say(
                    f"{folder}: {through / 1e6:.1f} of {total / 1e6:.1f} M tokens, {through / took / 1e6:.1f} M/s, "
                    f"about {took * (total - through) / through:.0f} s left"
                )
    if not problems:
        say(f"{folder}: whole, {total} tokens in {sum(len(s.shards) for s in manifest.splits.values())} shards")
    return problems
