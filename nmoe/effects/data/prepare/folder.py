"""`nmoe data prep FOLDER`: a source without a TOML, what it will read and write, and the command that trains on it."""

from __future__ import annotations

import glob
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import attrs
import numpy as np

from nmoe.config import load, preset
from nmoe.config.data_source import Files, Hub, Source, Splits, Streamed
from nmoe.config.run_name import label
from nmoe.effects.data.prepare import stream
from nmoe.effects.data.prepare.inputs import find, hub_files
from nmoe.effects.data.prepare.prep import begun
from nmoe.effects.data.store.format import MANIFEST, Manifest, read_manifest, stem
from nmoe.errors import InputError
from nmoe.pure.units import counted

PRESET = "quickstart"
MAX_CHARS = 1 << 15
"""Characters of a document: 8,000 tokens or so, more than a window of any preset, and a book gives fifty of them."""
SNIFFED = 8192
"""Bytes at the begin of a file that say whether it is text; as many as git reads for that."""
RECORD_BYTES = 1 << 12
"""Bytes of a record, assumed before it is read."""
HELD_OUT = 20
"""Documents expected in the validation split. A hash draws each document: with 20, one folder in 5e8 has none there."""
FORMS = MappingProxyType({"lines": "jsonl", "gzip": "jsonl.gz", "zstd": "jsonl.zst"})
LARGE = 0.1
"""Share of its split from which a document is reported: a file of records that was read as one text, for example."""


def folder_source(
    path: Path, exclude: Sequence[str], text_field: str, name: str, out: Path, say: Callable[[str], None]
) -> Source:
    """The source of a folder of files, or of one file, relative to the folder.

    Binary files are passed over, and named. A folder of few documents has a larger share of them held out for
    validation; none are held out for a test.

    text_field  key or column of the text in files of records
    name        of the tokenizer

    Raises:  InputError as `find`, or when there is nothing at `path`.
    """
    if not path.exists():
        raise InputError(f"{path}: expected a folder, a file or a source TOML, got nothing there; check the path")
    paths = (".",) if path.is_dir() else (path.name,)
    read = Files(paths=paths, exclude=tuple(exclude), text_field=text_field, max_chars=MAX_CHARS)
    items = find(read, base_of(path), out=out, skip_unreadable=False, say=say)
    binary = [item.name for item in items if item.form == "text" and _is_binary(item.path)]
    if binary:
        named = ", ".join(binary[:5]) + (", ..." if len(binary) > 5 else "")
        if len(binary) == len(items):
            raise InputError(f"{path}: expected files of text or records, got binary ones alone: {named}; name others")
        say(f"passed over {counted(len(binary), 'binary file')}: {named}")
        read = attrs.evolve(read, exclude=(*read.exclude, *map(glob.escape, binary)))
        items = [item for item in items if item.name not in set(binary)]
    sizes = [
        (size, MAX_CHARS if item.form.startswith("text") else RECORD_BYTES) for item in items for size in item.sizes
    ]
    documents = sum(-(-size // most) for size, most in sizes)
    share = min(0.2, max(0.02, round(HELD_OUT / max(documents, 1), 2)))
    return Source(tokenizer=name, input=read, splits=Splits(validation=share, test=0.0))


def _is_binary(path: str) -> bool:
    """Whether a file has a byte 0 near its begin: no text in UTF-8 has."""
    with open(path, "rb") as file:
        return b"\0" in file.read(SNIFFED)


def base_of(path: Path) -> Path:
    """The folder that the paths of a source start from: the given one, or that of the given file."""
    return path.resolve() if path.is_dir() else path.resolve().parent


def dry_run_lines(source: Source, base: Path, out: Path, tokenizer: str, say: Callable[[str], None]) -> list[str]:
    """What preparation would read and write.

    tokenizer  which one, or that it would be trained

    Raises:  InputError as `find`, or when `out` holds something else.
    """
    state = "prepared already" if (out / MANIFEST).exists() else "begun, is continued" if begun(out) else "new"
    shares = f"validation {source.splits.validation:.0%}, test {source.splits.test:.0%}"
    limit = "" if source.max_tokens is None else f", until train has {source.max_tokens} tokens"
    return [
        f"would read  {_inputs(source, base, out, say)}{limit}",
        f"tokenizer   {tokenizer}",
        f"would write {out} ({state}): shards of train, {shares} of the documents",
    ]


def _inputs(source: Source, base: Path, out: Path, say: Callable[[str], None]) -> str:
    """What a source reads, with its size where it is on this machine; nothing is fetched to find out."""
    said = source.input
    if isinstance(said, Streamed):
        stream.open_set(said)
        return f"records of {said.dataset}, split {said.split}, streamed"
    if isinstance(said, Hub):
        return f"{len(hub_files(said)[1])} files of {said.dataset}, split {said.split}"
    items = find(said, base, out=out, skip_unreadable=source.clean.unreadable == "skip", say=say)
    forms = Counter(FORMS.get(item.form, item.form) for item in items)
    return f"{counted(len(items), 'file')}, {sum(sum(item.sizes) for item in items) / 1e6:.1f} MB: " + ", ".join(
        f"{count} {form}" for form, count in sorted(forms.items())
    )


def next_lines(out: Path, said: str) -> list[str]:
    """What to do next with a prepared folder: documents to look at, then the command that trains on it.

    said  the folder as the user wrote it
    """
    manifest = read_manifest(out)
    return [*large_documents(out, said, manifest), *_command(said, out.name, manifest)]


def large_documents(out: Path, said: str, manifest: Manifest) -> Iterator[str]:
    """A line for each split of which one document is more than a tenth."""
    for split, receipt in manifest.splits.items():
        largest = where = before = 0
        for index in range(len(receipt.shards)):
            tokens = np.diff(np.load(out / split / f"{stem(index)}.ends.npy", mmap_mode="r"), prepend=0)
            if int(tokens.max()) > largest:
                largest, where = int(tokens.max()), before + int(tokens.argmax())
            before += len(tokens)
        if largest > LARGE * receipt.tokens:
            look = f"nmoe data head {shlex.quote(said)} --split {split} --skip {where} --documents 1"
            yield f"large      one document is {largest / receipt.tokens:.0%} of {split}; look at it with: {look}"


def _command(said: str, name: str, manifest: Manifest) -> list[str]:
    """The commands to type next; instead of them, why the preset can not train on the folder."""
    length = load(preset.path_of(PRESET), {}, ()).config.train.sequence_length
    for split in ("train", "validation"):
        if (tokens := manifest.splits[split].tokens) <= length:
            remedy = "add text, or write a source TOML with a larger splits.validation"
            return [f"next       {PRESET} needs more than {length} tokens of {split}, there are {tokens}; {remedy}"]
    words = (
        *("nmoe", "run", PRESET, "--data.source.kind=shards", f"--data.source.path={said}"),
        *(f"--model.vocab_size={manifest.tokenizer_size}", f"--run.name={label(name)}"),
    )
    return ["next       train on it with:", shlex.join(words)]
