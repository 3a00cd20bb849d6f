"""`nmoe data verify`, `digest`, `info`, `head`: what a prepared folder holds, and whether it still does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cattrs

from nmoe.effects import files
from nmoe.effects.data import tokenizer
from nmoe.effects.data.prepare.prep import FORMAT, REPORT, Report, report_lines
from nmoe.effects.data.store.blocks import digests
from nmoe.effects.data.store.format import (
    HEADER_BYTES,
    MAX_TOKENS,
    REMEDY,
    Manifest,
    blocks_name,
    dtype_of,
    header,
    header_problems,
    read_manifest,
    shard_problems,
    size_problems,
    stem,
)
from nmoe.effects.data.store.records import read_record
from nmoe.effects.data.store.shards import documents
from nmoe.effects.terminal import Progress, say_json
from nmoe.errors import InputError, printable
from nmoe.pure.units import counted


def verify(folders: Sequence[Path], say: Callable[[str], None], as_json: bool = False) -> int:
    """Read every byte of some folders and compare it with what was written.

    as_json  print the folders that are whole as JSON; progress goes to `say` either way

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
    if as_json:
        say_json([{"folder": str(folder), "whole": True} for folder in folders])
    return 0


def digest(folders: Sequence[Path], say: Callable[[str], None]) -> int:
    """Write the digests of blocks of folders that were prepared before there were any, each shard compared first.

    Writes:  files of digests beside the shards.
    Raises:  InputError for a shard that is not what its receipt says.
    """
    for folder in folders:
        manifest = read_manifest(folder)
        dtype = dtype_of(manifest.tokenizer_size)
        shards = [(split, *each) for split, whole in manifest.splits.items() for each in enumerate(whole.shards)]
        for split, index, receipt in shards:
            path = folder / split / f"{stem(index)}.npy"
            with files.refusing(path, "a readable file of tokens"):
                problems = header_problems(path, header(dtype, receipt.tokens))
                with open(path, "rb") as file:
                    file.seek(HEADER_BYTES)
                    actual, text = digests(file)
            if problems or actual != receipt.sha256:
                wrong = f"{path}: expected content with sha256 {receipt.sha256[:80]}, got {actual}; {REMEDY}"
                raise InputError(*problems or [wrong])
            files.write_text(folder / split / blocks_name(index), text)
        say(f"{folder}: digests of blocks beside {counted(len(shards), 'shard')}")
    return 0


def info(folder: Path, as_json: bool, say: Callable[[str], None]) -> int:
    """Say what a prepared folder holds, and what it was made from where that is known."""
    manifest = read_manifest(folder)
    report = _report(folder)
    if as_json:
        whole: dict[str, Any] = cattrs.Converter().unstructure(manifest)
        say_json({**whole, "report": cattrs.Converter().unstructure(report)})
        return 0
    name = tokenizer.load(folder).name
    say(f"tokenizer  {name}, {manifest.tokenizer_size} ids, fingerprint {manifest.tokenizer_identity}")
    for split, about in manifest.splits.items():
        per_token = f", {about.bytes / about.tokens:.2f} bytes a token" if about.tokens else ""
        say(
            f"{split:<10} {about.tokens} tokens, {about.documents} documents, {about.bytes / 1e6:.1f} MB of text, "
            f"{counted(len(about.shards), 'shard')}{per_token}"
        )
    if report is not None:
        # of the report what the manifest has not said above; --json has the whole source
        said = {*manifest.splits, "tokenizer"}
        say(printable(f"source     {_input(folder, report)}"))
        say("\n".join(printable(line) for line in report_lines(report) if line.split()[0] not in said))
    return 0


def _input(folder: Path, report: Report) -> str:
    """The table `input` of the source that a folder was made from, on one line; without what it does not set.

    Raises:  InputError when the report holds no source.
    """
    try:
        table: Mapping[str, Any] = json.loads(report.source)["input"]
        shown = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = report.source[:80]
        raise InputError(f"{folder / REPORT}: expected a source as JSON, got {what!r}; {REMEDY}") from error
    return "  ".join(f"{key} {value}" for key, value in shown.items() if value not in (None, ""))


def head(
    folder: Path, split: str, skip: int, count: int, chars: int, say: Callable[[str], None], as_json: bool = False
) -> int:
    """Print the beginnings of some documents, control characters as escapes; each shard is verified before."""
    if min(skip, count, chars) < 0:
        raise InputError(f"--skip, --documents, --chars: expected at least 0, got {skip}, {count}, {chars}; raise them")
    manifest, stored = read_manifest(folder), tokenizer.load(folder)
    encoding = tokenizer.encoding(stored)
    first, last = min(skip, MAX_TOKENS), min(skip + count, MAX_TOKENS)
    read: list[dict[str, Any]] = []
    for number, tokens in islice(enumerate(documents(folder, manifest, stored, split)), first, last):
        # A token is a byte at least, and a character four at most.
        text = encoding.decode(tokens[: 4 * chars].tolist())[:chars]
        if as_json:
            read.append({"split": split, "document": number, "tokens": len(tokens), "text": text})
            continue
        lines = "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
        say(f"--- {split} document {number}, {len(tokens)} tokens\n{lines}")
    if as_json:
        say_json(read)
    return 0


def _verify(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Everything that is wrong with one folder."""
    manifest, stored = read_manifest(folder), tokenizer.load(folder)
    problems = [
        *_unnamed_problems(folder, manifest),
        *_report_problems(folder, manifest),
        *(line for split in manifest.splits for line in size_problems(folder, manifest, split)),
    ]
    if problems:
        return problems
    total = sum(receipt.tokens for receipt in manifest.splits.values())
    progress, done = Progress(say, total), 0
    shards = [
        (folder / split, index, receipt)
        for split, whole in manifest.splits.items()
        for index, receipt in enumerate(whole.shards)
    ]
    for where, index, receipt in shards:
        problems += shard_problems(where, index, receipt, stored)
        done += receipt.tokens
        progress.at(done, f"{folder}: {done / 1e6:.1f} of {total / 1e6:.1f} M tokens")
    if not problems:
        say(f"{folder}: whole, {total} tokens in {counted(len(shards), 'shard')}")
    return problems


def _unnamed_problems(folder: Path, manifest: Manifest) -> list[str]:
    """A line for each folder of shards that the manifest does not name."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("shard-*")))
    except OSError as error:
        return [f"{folder}: expected a readable folder, got {error.strerror}; {REMEDY}"]
    return [
        f"{folder / name}: expected no shards, the manifest has no split {name}, got some; {REMEDY}"
        for name in names
        if name not in manifest.splits
    ]


def _report_problems(folder: Path, manifest: Manifest) -> list[str]:
    """A line when the report, where there is one, and the manifest disagree about what was written."""
    report = _report(folder)
    if report is None:
        return []
    written = {split: (tokens, report.documents_out.get(split)) for split, tokens in report.tokens_out.items()}
    held = {split: (receipt.tokens, receipt.documents) for split, receipt in manifest.splits.items()}
    if written == held:
        return []
    return [f"{folder / REPORT}: expected tokens and documents {held} of the manifest, got {written}; {REMEDY}"]


def _report(folder: Path) -> Report | None:
    """What preparation reported; None of a folder that was made otherwise."""
    if not (folder / REPORT).exists():
        return None
    report = read_record(folder / REPORT, Report, version=FORMAT)
    counts = (
        *(report.files, report.bytes_read, report.documents_in, report.documents_with_replaced_bytes),
        *(count for table in (report.tokens_out, report.documents_out, report.bytes_out) for count in table.values()),
    )
    if not all(0 <= count <= MAX_TOKENS for count in counts):
        raise InputError(f"{folder / REPORT}: expected counts in 0..{MAX_TOKENS}, got others; {REMEDY}")
    return report
