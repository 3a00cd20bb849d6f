"""Every parser of data against files that are almost right, with the digests made right again.

A digest refuses an accident, not a stranger who writes it himself: so the parser behind it has to hold. What is read
in the end has to be what the files say: ids below the tokenizer's size, documents that end at ends of text.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmoe.effects.data import inspect, tokenizer
from nmoe.effects.data.store import shard_writer
from nmoe.effects.data.store.foreign import from_foreign, read_foreign, to_foreign
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.shards import documents
from nmoe.errors import InputError

TOKENS = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
KNOWN = tokenizer.make("known", tokenizer.PATTERN, TOKENS, end_of_text=258, size=259)
HANG_S = 10
MOST_MEMORY = 1 << 30
"""Bytes by which reading a small damaged file may enlarge this process."""


def quiet(line: str) -> None:
    """Nobody listens."""


def write_corpus(folder: Path) -> None:
    draw = random.Random(5)
    texts = [np.array(draw.choices(range(258), k=draw.randint(1, 30))) for _ in range(12)]
    shard_writer.write(folder, KNOWN, {"train": texts[:9], "validation": texts[9:]}, tokens_per_shard=100)


NUMBERS = (0, -1, 1, 2, 255, 256, 2**15, 2**16, 2**31 - 1, 2**32, 2**63 - 1, 2**63, -(2**63), 2**70, 10**400)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "../../etc", "/dev/zero", "\x00", "\ud800", "\x1b[2J", "1", "train", "x" * 10_000),
    *(0.0, -0.5, 1e308, float("inf"), float("nan"), [], {}, [[]], [None], {"a": 1}, {"format": 1}),
)


PATTERNS = (
    *("(", "", ".", "x*", "(a+)+$", r"(?=a)", r"\s+(?!\S)|.", "[", "(?:(?:a*)*)*b(?!c)|.", r"\p{Foo}", "a{99999}"),
    *(r"[\s\S]", "(?s:.)", r"(?:\s*(?!x))*|[\s\S]"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in nested JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*path, key))


def mutated(value: Any, draw: random.Random) -> Any:
    """JSON with one to three faults: a value replaced, moved, doubled, removed, or a text changed by a letter."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        every = [path for path in places(value) if len(path)]
        # most places are tokens and digests: half of the faults go elsewhere
        shallow = [path for path in every if len(path) < 3]
        if not every:
            return value
        path = draw.choice(shallow if draw.random() < 0.5 and shallow else every)
        above = value
        for key in path[:-1]:
            above = above[key]
        last = path[len(path) - 1]
        old = above[last]
        what = draw.randrange(6)
        if what == 0:
            del above[last]
        elif what == 1 and isinstance(above, list):
            above.insert(last, copy.deepcopy(old))
        elif what == 2 and isinstance(above, dict):
            above[draw.choice(("format", "extra", "../x", "test", "\x1b", ""))] = above.pop(last)
        elif what == 3 and isinstance(old, str) and old:
            at = draw.randrange(len(old))
            above[last] = old[:at] + draw.choice(("", "A", "=", "\u00e9", "(", "0")) + old[at + 1 :]
        elif what == 4 and isinstance(old, int):
            above[last] = old + draw.choice((-1, 1, 7))
        else:
            above[last] = draw.choice(NUMBERS) if draw.random() < 0.5 else draw.choice(VALUES)
    return value


def mutated_bytes(raw: bytes, draw: random.Random, width: int) -> bytes:
    """Numbers of `width` bytes with one to three faults: one replaced, removed, doubled, or all cut."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(raw) // width + 1) * width
        number = (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        small = draw.randrange(300).to_bytes(8, "little")[:width].ljust(width, b"\0")
        middle = draw.choice((number, small, b"", raw[at : at + width] * 2, draw.randbytes(width)))
        raw = raw[:at] + middle + (b"" if draw.random() < 0.1 else raw[at + width :])
    return raw


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def shard_files(folder: Path) -> list[tuple[str, int, str]]:
    return [
        (split, int(path.name[6:11]), f"{folder}/{split}/{path.name[:11]}")
        for split in ("train", "validation")
        for path in sorted((folder / split).glob("shard-?????.json"))
    ]


def repaired(folder: Path) -> None:
    """Make digests, receipts and totals agree with what the shards and the tokenizer hold, where there are such."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        stored = json.loads((folder / "tokenizer.json").read_text())
        for split, index, stem in shard_files(folder):
            receipt = manifest["splits"][split]["shards"][index]
            for key, ending in (("sha256", ".npy"), ("ends_sha256", ".ends.npy")):
                receipt[key] = hashlib.sha256(Path(stem + ending).read_bytes()[128:]).hexdigest()
            receipt["tokenizer_identity"] = stored["identity"]
            dump(Path(f"{stem}.json"), receipt)
        for split in manifest["splits"].values():
            for key in ("tokens", "documents", "bytes"):
                split[key] = sum(receipt[key] for receipt in split["shards"])
        manifest |= {"tokenizer_identity": stored["identity"], "tokenizer_size": stored["size"]}
        dump(folder / "manifest.json", manifest)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        return


def mutate_manifest(folder: Path, draw: random.Random) -> None:
    path = folder / "manifest.json"
    dump(path, mutated(json.loads(path.read_text()), draw))
    if draw.random() < 0.7:
        repaired(folder)


def mutate_tokenizer(folder: Path, draw: random.Random) -> None:
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    if draw.random() < 0.7:
        stored = mutated(stored, draw)
    else:
        patterns = (
            "(",
            "",
            ".",
            "x*",
            "(a+)+$",
            r"(?=a)",
            r"\s+(?!\S)|.",
            "[",
            "(?:(?:a*)*)*b(?!c)|.",
            "\\p{Foo}",
            "a{99999}",
        )
        stored["pattern"] = draw.choice(patterns)
    try:
        tokens = [base64.b64decode(token, validate=True) for token in stored["tokens"]]
        made = tokenizer.make("x", stored["pattern"], tokens, end_of_text=stored["end_of_text"], size=stored["size"])
        stored["identity"] = made.identity
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    dump(path, stored)
    repaired(folder)


def mutate_shard(folder: Path, draw: random.Random) -> None:
    """The tokens, ends, header or receipt of a shard; its counts follow its length."""
    split, index, stem = draw.choice(shard_files(folder))
    what = draw.randrange(3)
    if what == 2:
        manifest = json.loads((folder / "manifest.json").read_text())
        receipt = mutated(json.loads(Path(f"{stem}.json").read_text()), draw)
        dump(Path(f"{stem}.json"), receipt)
        manifest["splits"][split]["shards"][index] = receipt
        dump(folder / "manifest.json", manifest)
    else:
        path, width, key = ((f"{stem}.npy", 2, "tokens"), (f"{stem}.ends.npy", 8, "documents"))[what]
        raw = Path(path).read_bytes()
        body = mutated_bytes(raw[128:], draw, width)
        count = len(body) // width
        front = raw[:128].replace(f"({(len(raw) - 128) // width},)".encode(), f"({count},)".encode()).ljust(128)[:128]
        if draw.random() < 0.1:
            front = mutated_bytes(front, draw, 1).ljust(128)[:128]
        Path(path).write_bytes(front + body)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["splits"][split]["shards"][index][key] = count
        dump(folder / "manifest.json", manifest)
    repaired(folder)


def read_folder(folder: Path, number: int) -> None:
    """Every reader of a prepared folder; what it gives has to be what a tokenizer could have written."""
    manifest, stored = read_manifest(folder), tokenizer.load(folder)
    if number % 3 == 0:
        inspect.info(folder, False, quiet)
    elif number % 3 == 1:
        inspect.verify([folder], quiet)
    else:
        inspect.head(folder, "train", 0, 5, 50, quiet)
    for split in manifest.splits:
        found = list(documents(folder, manifest, stored, split))
        assert len(found) == manifest.splits[split].documents
        for document in found:
            assert not len(document) or 0 <= document.min() <= document.max() < len(stored.ranks)
    text = "the cat, that sat; 12345 \u00e9\n\n" * 3
    tokens = tokenizer.encode(tokenizer.encoding(stored), text)
    lengths = tokenizer.byte_lengths(stored)
    if lengths[tokens].sum() == len(text.encode()):
        assert tokenizer.encoding(stored).decode(tokens.tolist()) == text


def mutate_numbers(pattern: str, width: int) -> Callable[[Path, random.Random], None]:
    def mutate(folder: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(folder.glob(pattern)))
        path.write_bytes(mutated_bytes(path.read_bytes(), draw, draw.choice((width, 1))))

    return mutate


def mutate_megatron(folder: Path, draw: random.Random) -> None:
    """Its index holds numbers of four and of eight bytes, and is as long as its counts say after most faults."""
    path = folder / ("a.bin" if draw.random() < 0.2 else "a.idx")
    if path.suffix == ".bin":
        path.write_bytes(mutated_bytes(path.read_bytes(), draw, 2))
        return
    raw = path.read_bytes()
    _, _, count, num_bounds = struct.unpack("<QBQQ", raw[9:34])
    sizes, pointers = raw[34 : 34 + 4 * count], raw[34 + 4 * count : 34 + 12 * count]
    bounds, code = raw[34 + 12 * count :], raw[17]
    what = draw.randrange(5)
    if what == 0:
        sizes = mutated_bytes(sizes, draw, 4)
    elif what == 1:
        pointers = mutated_bytes(pointers, draw, 8)
    elif what == 2:
        bounds = mutated_bytes(bounds, draw, 8)
    elif what == 3:
        code = draw.randrange(12)
    counts = (draw.choice((count, len(sizes) // 4)), draw.choice((num_bounds, len(bounds) // 8)))
    raw = raw[:9] + struct.pack("<QBQQ", 1, code, *counts) + sizes + pointers + bounds
    path.write_bytes(mutated_bytes(raw, draw, 1) if what == 4 else raw)


def mutate_original(folder: Path, draw: random.Random) -> None:
    """Manifest, index or shard of the original; the checksum is that of the shard."""
    place = folder / "a" / "shard_0000"
    manifest = json.loads((folder / "a" / "manifest.json").read_text())
    what = draw.randrange(4)
    if what == 0:
        manifest = mutated(manifest, draw)
    elif what == 1:
        path = next(place.glob("*.idx"))
        path.write_bytes(mutated_bytes(path.read_bytes(), draw, draw.choice((8, 8, 1))))
    else:
        path = next(place.glob("*.npy"))
        raw = path.read_bytes()
        if what == 2:
            path.write_bytes(mutated_bytes(raw[:128], draw, 1) + raw[128:])
        else:
            path.write_bytes(raw[:128] + mutated_bytes(raw[128:], draw, 4))
        manifest["shards"][0]["checksum"] = hashlib.sha256(path.read_bytes()).hexdigest()
    dump(folder / "a" / "manifest.json", manifest)


def read_as(kind: str) -> Callable[[Path, int], None]:
    """Convert from a foreign format; what was written holds what was read."""

    def read(folder: Path, number: int) -> None:
        found = [document.tolist() for document in read_foreign(folder / "a", kind, KNOWN)]
        out = folder / "converted"
        from_foreign(folder / "a", kind, KNOWN, out, "train", quiet)
        assert [each.tolist() for each in documents(out, read_manifest(out), KNOWN, "train")] == found
        assert all(0 <= token < len(TOKENS) for document in found for token in document)

    return read


Parser = tuple[Callable[[Path, random.Random], None], Callable[[Path, int], None]]
PARSERS: dict[str, Parser] = {
    "manifest": (mutate_manifest, read_folder),
    "tokenizer": (mutate_tokenizer, read_folder),
    "receipts": (mutate_shard, read_folder),
    "megatron": (mutate_megatron, read_as("megatron")),
    "llmc": (mutate_numbers("a", 4), read_as("llmc")),
    "olmo": (mutate_numbers("a", 2), read_as("olmo")),
    "original": (mutate_original, read_as("original")),
}


@contextmanager
def limited(name: str, number: int) -> Iterator[None]:
    """A block that fails when it takes longer than `HANG_S`."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"{name}, number {number}: still reading after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzzed(folder: Path, patch: pytest.MonkeyPatch, name: str, count: int) -> dict[str, int]:
    """Read `count` mutations of one parser's files; how many were read, and how many refused."""
    mutate, read = PARSERS[name]
    (folder / "seed").mkdir()
    write_corpus(folder / "corpus")
    if read is read_folder:
        shutil.copytree(folder / "corpus", folder / "seed", dirs_exist_ok=True)
    else:
        to_foreign(folder / "corpus", "train", name, folder / "seed" / "a", quiet)
    outcomes = {"read": 0, "refused": 0}
    # durability is another test's; on a disk it takes most of the time
    patch.setattr(os, "fsync", lambda descriptor: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "seed", work)
        mutate(work, random.Random(number))
        try:
            with limited(name, number):
                read(work, number)
            outcomes["read"] += 1
        except InputError as error:
            assert all("expected " in line and "; " in line for line in error.problems), (name, number, error)
            assert all(len(line) < 2000 for line in error.problems), (name, number)
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"{name}, number {number}")
            raise
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
    return outcomes


@pytest.mark.parametrize("name", PARSERS)
def test_damage_with_right_digests_ends_in_clean_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    outcomes = fuzzed(tmp_path, monkeypatch, name, 120)
    assert outcomes["refused"] > 30 and outcomes["read"] > 1, outcomes


@pytest.mark.long
@pytest.mark.parametrize("name", PARSERS)
def test_twenty_thousand_damaged_files_with_right_digests_end_in_clean_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    outcomes = fuzzed(tmp_path, monkeypatch, name, 20_000)
    assert outcomes["refused"] > 5000 and outcomes["read"] > 200, outcomes
