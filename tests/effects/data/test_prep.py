"""`nmoe data prep`: what comes out, from every kind of input, whoever does the work and however often it is killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.cli import main
from nmoe.config.data_source import load_source
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.prepare.execute import open_pool
from nmoe.effects.data.prepare.inputs import find
from nmoe.effects.data.prepare.prep import Report, _stage, prepare
from nmoe.effects.data.prepare.survey import cleaned, works_of
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.shards import documents
from nmoe.errors import InputError
from nmoe.pure.data.prep import Item, plan, split_of

REPOSITORY = Path(__file__).resolve().parents[3]


def quiet(line: str) -> None:
    """Nobody listens."""


def sentences(number: int) -> str:
    """A text of its own for each number."""
    draw = random.Random(number)
    words = ["red", "fox", "runs", "over", "hills", "and", "rivers", "while", "snow", "falls", "on", "old", "stones"]
    return "\n".join(" ".join(draw.choices(words, k=9)) for _ in range(draw.randint(2, 30))) + f"\nnumber {number}\n"


@pytest.fixture(scope="module")
def known() -> tokenizers.Tokenizer:
    return tokenizers.train([sentences(number) for number in range(300)], 320, quiet)


@pytest.fixture
def home(tmp_path: Path, known: tokenizers.Tokenizer) -> Path:
    """A folder for one test, with the tokenizer in it."""
    (tmp_path / "known").mkdir()
    tokenizers.save(known, tmp_path / "known")
    return tmp_path


def write_source(home: Path, text: str, name: str = "source.toml") -> Path:
    """A source TOML that names the tokenizer."""
    path = home / name
    path.write_text(f'tokenizer = "known/tokenizer.json"\n{text}')
    return path


def prepared(home: Path, text: str, out: str = "out", workers: int = 1) -> Report:
    """Prepare a source in `home`/`out`."""
    path = write_source(home, text)
    with open_pool(workers=workers, dask=None) as pool:
        report = prepare(load_source(path), tokenizers.load(home / "known"), home, home / out, pool, quiet)
    assert report is not None
    return report


def texts(folder: Path) -> dict[str, list[str]]:
    """The documents of each split."""
    manifest, known = read_manifest(folder), tokenizers.load(folder)
    run = tokenizers.encoding(known)
    return {
        split: [run.decode(each.tolist()) for each in documents(folder, manifest, known, split)]
        for split in manifest.splits
    }


def everything(folder: Path) -> list[str]:
    """The documents of all splits, ordered."""
    return sorted(text for split in texts(folder).values() for text in split)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(count: int) -> list[dict[str, str]]:
    return [{"id": f"d{number}", "text": sentences(number), "other": "x"} for number in range(count)]


def jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in records).encode()


def as_text(folder: Path, records: list[dict[str, str]]) -> str:
    for number, each in enumerate(records):
        path = folder / f"{number % 7}" / f"{number:04d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(each["text"])
    return 'kind = "files"\npaths = ["in"]'


def as_jsonl(folder: Path, records: list[dict[str, str]]) -> str:
    (folder / "a.jsonl").write_bytes(jsonl(records[:50]))
    (folder / "b.jsonl").write_bytes(jsonl(records[50:]).removesuffix(b"\n"))
    return 'kind = "jsonl"\npaths = ["in/*.jsonl"]\nid_field = "id"'


def as_gzip(folder: Path, records: list[dict[str, str]]) -> str:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(records[:9])) + gzip.compress(jsonl(records[9:])))
    return 'kind = "jsonl"\npaths = ["in"]'


def as_zstd(folder: Path, records: list[dict[str, str]]) -> str:
    squeeze = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(squeeze(jsonl(records[:9])) + squeeze(jsonl(records[9:])))
    return 'kind = "jsonl"\npaths = ["in"]'


def as_parquet(folder: Path, records: list[dict[str, str]]) -> str:
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=13)
    return 'kind = "parquet"\npaths = ["in/*.parquet"]\nid_field = "id"'


def as_arrow(folder: Path, records: list[dict[str, str]]) -> str:
    """A stream, as `datasets` keeps one, and a file of random access; both with several batches."""
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as stream:
        stream.write_table(table.slice(0, 90), max_chunksize=70)
    with pa.ipc.new_file(str(folder / "b.arrow"), table.schema) as file:
        file.write_table(table.slice(90), max_chunksize=11)
    return 'kind = "arrow"\npaths = ["in"]\nid_field = "id"'


def as_mixed(folder: Path, records: list[dict[str, str]]) -> str:
    as_arrow(folder, records)
    return 'kind = "files"\npaths = ["in"]'


def as_hub(folder: Path, records: list[dict[str, str]]) -> str:
    (folder / "train-0.jsonl").write_bytes(jsonl(records))
    return f'kind = "hub"\ndataset = "{folder}"'


KINDS: dict[str, Callable[[Path, list[dict[str, str]]], str]] = {
    "text": as_text,
    "jsonl": as_jsonl,
    "gzip": as_gzip,
    "zstd": as_zstd,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "mixed": as_mixed,
    "hub": as_hub,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_its_documents(home: Path, kind: str) -> None:
    (home / "in").mkdir()
    body = KINDS[kind](home / "in", rows(120))
    report = prepared(home, f"task_bytes = 5000\n[input]\n{body}\n")
    assert everything(home / "out") == sorted(each["text"] for each in rows(120))
    assert (report.documents_in, sum(report.documents_out.values()), report.dropped) == (120, 120, ANY_REPETITION)
    assert main(["data", "verify", str(home / "out")]) == 0


ANY_REPETITION = {"duplicate": 0, "near duplicate": 0}


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 60), max_size=12),
    task_bytes=st.integers(1, 100),
    form=st.sampled_from(["lines", "text", "parquet"]),
)
def test_tasks_cover_every_byte_once_in_order(sizes: list[int], task_bytes: int, form: str) -> None:
    if form == "parquet":
        items = [Item(name="p", path="p", form="parquet", sizes=tuple(sizes), modified_ns=0)]
    else:
        items = [Item(name="f", path="f", form=form, sizes=(size,), modified_ns=0) for size in sizes]  # pyright: ignore[reportArgumentType]
    tasks = plan(items, task_bytes)
    found = [(part.file, at) for task in tasks for part in task for at in range(part.start, part.end)]
    wanted = [
        (index, at)
        for index, item in enumerate(items)
        for at in range(len(item.sizes) if form == "parquet" else item.sizes[0])
    ]
    assert found == wanted
    assert all(tasks)
    if form == "lines":
        assert all(sum(part.end - part.start for part in task) <= task_bytes for task in tasks)


@pytest.mark.parametrize("task_bytes", [1, 7, 300, 10**6])
def test_lines_are_read_once_wherever_the_file_is_cut(home: Path, task_bytes: int) -> None:
    records = [{"text": f"{'x' * number} {number}"} for number in range(12)]
    (home / "a.jsonl").write_bytes(b"\n\n" + jsonl(records) + b"\n")
    source = load_source(
        write_source(home, f'task_bytes = {task_bytes}\n[input]\nkind = "jsonl"\npaths = ["*.jsonl"]\n')
    )
    works = works_of(source, find(source.input, home, skip_unreadable=False, say=quiet), home)
    found = [each for work in works for each in cleaned(work)]
    assert [each.text for each in found] == [each["text"] for each in records]
    lines = (home / "a.jsonl").read_bytes()
    assert all(lines[each.document.position :].startswith(b'{"text": "' + each.text.encode()) for each in found)


def test_documents_are_cleaned_filtered_and_counted(home: Path) -> None:
    (home / "in").mkdir()
    records = [
        {"text": "Cafe\u0301 \x00au\x1b lait,\ttwo\r\nlines\n"},
        {"text": ""},
        {"text": " \n\t"},
        {"text": "tiny"},
        {"text": "again and again\n" * 9 + "once\n"},
        {"text": "}{][)(*&^%$#@!}{][)(*&^%$ word"},
        {"text": "a document that is longer than the others are allowed to be " * 5},
        {"text": "an ordinary line of text"},
        {"text": "an ordinary line of text"},
        {"text": "<|endoftext|> is ordinary text here"},
    ]
    (home / "in" / "a.jsonl").write_bytes(jsonl(records))
    report = prepared(
        home,
        "[input]\nkind = 'jsonl'\npaths = ['in']\n[filter]\nmin_chars = 10\nmax_bytes = 250\nmax_repetition = 0.5\n"
        "max_symbols = 0.5\n",
    )
    assert report.dropped == {
        "duplicate": 1,
        "empty": 2,
        "long": 1,
        "near duplicate": 0,
        "repetition": 1,
        "short": 1,
        "symbols": 1,
    }
    assert everything(home / "out") == sorted(
        ["Caf\u00e9 au lait,\ttwo\r\nlines\n", "an ordinary line of text", "<|endoftext|> is ordinary text here"]
    )
    kept = sum(report.documents_out.values())
    assert report.documents_in == kept + sum(report.dropped.values()) == 10


def test_code_comes_back_byte_for_byte(home: Path) -> None:
    (home / "in").mkdir()
    raw = b"x = 'e\xcc\x81' \x0c\x00\x1b\r\n\tif x:\r\r\n"
    (home / "in" / "a.py").write_bytes(raw)
    body = '[input]\nkind = "files"\npaths = ["in"]\n'
    prepared(home, body + '[clean]\nunicode = "keep"\ncontrol = "keep"\n')
    assert [text.encode() for text in everything(home / "out")] == [raw]
    prepared(home, body, out="cleaned")
    assert everything(home / "cleaned") == ["x = '\u00e9' \r\n\tif x:\r\r\n"]


def test_near_duplicates_go_and_the_first_stays(home: Path) -> None:
    (home / "in").mkdir()
    long = [sentences(number) * 3 for number in range(40)]
    near = [text.replace("number", "No.", 1) for text in long[:10]]
    (home / "in" / "a.jsonl").write_bytes(jsonl([{"text": text} for text in long]))
    (home / "in" / "b.jsonl").write_bytes(jsonl([{"text": text} for text in [*near, *long[10:15]]]))
    body = "task_bytes = 3000\n[input]\nkind = 'jsonl'\npaths = ['in']\n[deduplicate]\nnear = 0.7\n"
    report = prepared(home, body)
    assert report.dropped == {"duplicate": 5, "near duplicate": 10}
    assert everything(home / "out") == sorted(long)
    prepared(home, body, out="two", workers=2)
    assert digests(home / "two") == digests(home / "out")


def test_a_document_is_in_one_split_wherever_it_stands(home: Path) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(jsonl(rows(200) + rows(200)))
    body = "[input]\nkind = 'jsonl'\npaths = ['in']\n[deduplicate]\nexact = false\n"
    shares = "[splits]\nvalidation = 0.1\ntest = 0.25\n"
    report = prepared(home, body + shares)
    found = {split: set(each) for split, each in texts(home / "out").items()}
    assert sum(report.documents_out.values()) == 400
    assert (
        not found["train"] & found["validation"] | found["train"] & found["test"] | found["validation"] & found["test"]
    )
    assert 8 <= len(found["validation"]) <= 34 and 30 <= len(found["test"]) <= 72
    for split, each in found.items():
        for text in each:
            digest = hashlib.sha256(text.encode()).digest()
            assert split_of(digest, validation=100_000, test=250_000) == split


def test_shares_are_cut_to_the_millionth_and_nest() -> None:
    """What is held out with a small share is held out with a larger one of the test split."""
    keys = [number.to_bytes(8, "big") for number in range(60_000)]
    small = {key for key in keys if split_of(key, validation=0, test=500) == "test"}
    large = {key for key in keys if split_of(key, validation=0, test=5000) == "test"}
    assert small < large
    assert 10 <= len(small) <= 60 and 220 <= len(large) <= 390
    assert all(split_of(key, validation=0, test=0) == "train" for key in keys[:1000])


def refused(home: Path, text: str, *messages: str, out: str = "out") -> None:
    """Preparing this source says these things, in order, and nothing else."""
    with pytest.raises(InputError) as caught:
        prepared(home, text, out=out)
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem, problem
        assert "; " in problem


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": "caf\xe9"}\n',
        "a.jsonl: expected UTF-8, got byte 0xe9 at 30",
    ),
    "not JSON": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": \n',
        "a.jsonl: expected a line of JSON at byte 17, got Expecting value",
    ),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl: expected a line of JSON at byte 0, got "),
    "no object": ("a.jsonl", b'{"text": "fine"}\n[1]\n', "a.jsonl: expected a JSON object at byte 17, got list; "),
    "no field": ("a.jsonl", b'{"txt": "fine"}\n', "a.jsonl: expected a text in text at byte 0, got nothing; "),
    "number": ("a.jsonl", b'{"text": 3}\n', "a.jsonl: expected a text in text at byte 0, got int; "),
    "surrogate": (
        "a.jsonl",
        b'{"text": "\\ud800"}\n',
        "a.jsonl: expected Unicode in text at byte 0, got the lone surrogate U+D800",
    ),
    "gzip": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "fine"}\n' * 99)[:-9],
        "a.jsonl.gz: expected a file that can be read to its end",
    ),
    "no gzip": (
        "a.jsonl.gz",
        b"plain",
        "a.jsonl.gz: expected a file that can be read to its end, got Not ",
    ),
    "zstd": (
        "a.jsonl.zst",
        zstandard.ZstdCompressor().compress(b'{"text": "fine"}\n' * 99)[:-3],
        "a.jsonl.zst: expected whole zstd frames, got an end inside one at byte ",
    ),
    "no zstd": ("a.jsonl.zst", b"plain text", "a.jsonl.zst: expected zstd data up to byte 10, got "),
    "ending": ("a.json.bz2", b"x", "a.json.bz2: expected an ending of .jsonl.gz, "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_can_not_be_read_is_named_with_its_place(home: Path, name: str) -> None:
    file, content, message = BROKEN[name]
    (home / "in").mkdir()
    (home / "in" / file).write_bytes(content)
    refused(home, "[input]\nkind = 'jsonl'\npaths = ['in']\n", f"in/{message}")


def test_a_broken_line_is_named_by_its_number(home: Path) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "fine"}\n{"text": \n')
    refused(home, "[input]\nkind = 'jsonl'\npaths = ['in']\n", 'clean.unreadable = "skip" (line 4)')


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "ending"])
def test_what_can_not_be_read_is_left_out_and_counted_on_request(home: Path, name: str) -> None:
    file, content, _ = BROKEN[name]
    (home / "in").mkdir()
    (home / "in" / file).write_bytes(content)
    (home / "in" / "z.jsonl").write_bytes(jsonl(rows(3)))
    report = prepared(home, "[input]\nkind = 'jsonl'\npaths = ['in']\n[clean]\nunreadable = 'skip'\n")
    assert report.dropped["unreadable"] == 1
    assert set(everything(home / "out")) >= {each["text"] for each in rows(3)}


def test_bytes_that_are_not_utf8_are_replaced_and_counted_on_request(home: Path) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(b'{"text": "caf\xe9 au lait"}\n{"text": "fine"}\n{"text": "\\udc00 x"}\n')
    report = prepared(home, "[input]\nkind = 'jsonl'\npaths = ['in']\n[clean]\ninvalid_utf8 = 'replace'\n")
    assert report.documents_with_replaced_bytes == 2
    assert everything(home / "out") == sorted(["caf\ufffd au lait", "fine", "? x"])


def test_a_damaged_file_in_the_middle_costs_nothing_that_is_done(home: Path) -> None:
    """The others are surveyed, the fault is named, and after fixing only what is missing is done."""
    (home / "in").mkdir()
    for number in range(5):
        (home / "in" / f"{number}.txt").write_bytes(jsonl(rows(40)[number * 8 : number * 8 + 8]))
    good = (home / "in" / "2.txt").read_bytes()
    (home / "in" / "2.txt").write_bytes(good[:-5] + b"\xff" + good[-4:])
    stamp = os.stat(home / "in" / "2.txt").st_mtime_ns
    body = "task_bytes = 1\n[input]\nkind = 'files'\npaths = ['in']\n"
    refused(home, body, "in/2.txt: expected UTF-8, got byte 0xff at ")
    done = sorted(path.name for path in (home / "out" / ".work" / "survey").iterdir())
    assert done == [f"task-{number:05d}" for number in (0, 1, 3, 4)]
    (home / "in" / "2.txt").write_bytes(good)
    os.utime(home / "in" / "2.txt", ns=(stamp, stamp))
    before = {name: os.stat(home / "out/.work/survey" / name / "survey.json").st_ino for name in done}
    told: list[str] = []
    path = write_source(home, body)
    with open_pool(workers=1, dask=None) as pool:
        prepare(load_source(path), tokenizers.load(home / "known"), home, home / "out", pool, told.append)
    assert told[0].startswith("survey: 1 of 1 task,")
    assert before
    prepared(home, body, out="fresh")
    assert digests(home / "out") == digests(home / "fresh")


def test_ids_that_repeat_are_named_with_both_places(home: Path) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(jsonl(rows(3)))
    (home / "in" / "b.jsonl").write_bytes(jsonl([{"id": "new", "text": "one"}, {"id": "d1", "text": "two"}]))
    second = len(jsonl(rows(1)))
    refused(
        home,
        "task_bytes = 100\n[input]\nkind = 'jsonl'\npaths = ['in']\nid_field = 'id'\n",
        f"in/b.jsonl at 29: expected an id of its own, got that of in/a.jsonl at {second}; ",
    )


def test_what_the_folder_holds_is_never_replaced(home: Path, known: tokenizers.Tokenizer) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(jsonl(rows(30)))
    body = "[input]\nkind = 'jsonl'\npaths = ['in']\n"
    report = prepared(home, body)
    before = digests(home / "out")
    assert prepared(home, body) == report
    assert not (home / "out" / ".work").exists()
    refused(
        home,
        body + "[filter]\nmin_chars = 3\n",
        "out: expected filter.min_chars = 1 of the source, which it was begun with, got 3; ",
    )
    (home / "in" / "b.jsonl").write_bytes(jsonl(rows(1)))
    refused(home, body, "out: expected a folder prepared with input files of sha256 ")
    (home / "in" / "b.jsonl").unlink()
    other = tokenizers.train([sentences(number) for number in range(300)], 310, quiet)
    tokenizers.save(other, home / "known")
    refused(home, body, f"out: expected a folder prepared with tokenizer {other.identity}, got {known.identity}; ")
    assert digests(home / "out") == before
    (home / "mine").mkdir()
    (home / "mine" / "notes").write_text("keep")
    refused(home, body, "mine: expected an empty folder, got notes in it; ", out="mine")
    assert sorted(path.name for path in (home / "mine").iterdir()) == ["notes"]


def test_another_plan_in_a_begun_folder_is_refused(home: Path) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": 1}\n')
    body = "[input]\nkind = 'jsonl'\npaths = ['in']\n"
    refused(home, body, "got int")
    (home / "in" / "a.jsonl").write_bytes(b'{"text": "fine"}\n')
    refused(home, body, "out: expected the input files it was begun with, got 1 others, in/a.jsonl the first; ")
    refused(
        home, body + "[filter]\nmin_chars = 3\n", "out: expected filter.min_chars = 1 ", "out: expected the input files"
    )


def test_links_loops_and_other_things_in_a_folder(home: Path) -> None:
    (home / "in" / "sub").mkdir(parents=True)
    (home / "in" / "sub" / "a.txt").write_text("one text")
    (home / "in" / "empty.txt").write_text("")
    (home / "in" / ".hidden.txt").write_text("not this one")
    (home / "in" / "sub" / "loop").symlink_to(home / "in")
    body = "[input]\nkind = 'files'\npaths = ['in', 'in/sub/*.txt']\n"
    report = prepared(home, body)
    assert everything(home / "out") == ["one text"] and report.dropped["empty"] == 1
    (home / "in" / "self").symlink_to("self")
    refused(home, body, "in/self: expected a file that can be read, got Too many levels of symbolic links; ", out="2")
    (home / "in" / "self").unlink()
    os.mkfifo(home / "in" / "pipe")
    refused(home, body, "in/pipe: expected a regular file, got another kind; ", out="3")
    refused(
        home,
        "[input]\nkind = 'files'\npaths = ['nowhere', 'in']\n",
        "nowhere: expected a file or folder",
        out="4",
    )


def test_a_full_disk_is_told_and_what_is_done_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_bytes(jsonl(rows(60)))
    body = "task_bytes = 5000\n[input]\nkind = 'jsonl'\npaths = ['in']\n"
    prepared(home, body, out="whole")
    save, calls = np.save, iter(range(10**6))

    def full(*args: object) -> None:
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        save(*args)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(np, "save", full)
    refused(home, body, "room and permission to read and write, got No space left on device; ")
    monkeypatch.undo()
    assert list((home / "out" / ".work" / "survey").iterdir())
    prepared(home, body)
    assert digests(home / "out") == digests(home / "whole")


def test_a_source_says_all_that_is_wrong_with_it(home: Path) -> None:
    path = write_source(
        home,
        "task_bytes = 0\n[input]\nkind = 'jsonl'\npath = 'in'\n[filter]\nmin_chars = '3'\n[deduplicate]\nnear = 1.5\n",
    )
    with pytest.raises(InputError) as caught:
        load_source(path)
    told = "\n".join(caught.value.problems)
    assert "source.toml:3: input.paths: expected a value, got nothing" in told or "input.paths" in told
    assert ":5: input.path: expected a known key" in told and "did you mean input.paths?" in told
    assert ":7: filter.min_chars: expected an integer, got" in told
    path = write_source(home, "task_bytes = 0\n[input]\nkind = 'jsonl'\npaths = []\n[deduplicate]\nnear = 1.5\n")
    with pytest.raises(
        InputError, match=r":2: task_bytes: expected at least 1, got 0;[^$]*:7: deduplicate.near: expected at"
    ):
        load_source(path)
    path = write_source(home, "[input]\nkind = 'jsonl'\npaths = 'in'\n")
    with pytest.raises(InputError, match="input.paths: expected an array of strings, got"):
        load_source(path)


@pytest.mark.parametrize("name", ["stdlib", "text", "jsonl"])
def test_the_shipped_sources_are_valid(name: str) -> None:
    load_source(REPOSITORY / "configs" / "sources" / f"{name}.toml")


# Who does the work, and what kills it.

CORPUS = "task_bytes = 30000\n[input]\nkind = 'jsonl'\npaths = ['in']\nid_field = 'id'\n[deduplicate]\nnear = 0.8\n"


@pytest.fixture
def corpus(home: Path) -> Path:
    """A folder with an input of a dozen tasks, its source, and `whole`, prepared without interruption."""
    (home / "in").mkdir()
    records = [*rows(250), *({"id": f"again{number}", "text": sentences(number)} for number in range(0, 250, 5))]
    (home / "in" / "a.jsonl").write_bytes(jsonl(records[:150]))
    (home / "in" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(records[150:]), mtime=0))
    prepared(home, CORPUS, out="whole")
    return home


def started(corpus: Path, out: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that prepares, the leader of a session of its own."""
    command = [sys.executable, "-m", "nmoe", "data", "prep", str(corpus / "source.toml"), str(corpus / out), *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def ended(process: subprocess.Popen[bytes]) -> str:
    """What a process said, which must have ended well."""
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_processes_writes_the_same_bytes(corpus: Path, workers: int) -> None:
    ended(started(corpus, "out", "--workers", str(workers)))
    assert digests(corpus / "out") == digests(corpus / "whole")


def test_workers_that_share_the_tasks_write_the_same_bytes(corpus: Path) -> None:
    others = [started(corpus, "out", "--worker", f"{index}/3") for index in range(3)]
    said = [ended(each) for each in others]
    assert digests(corpus / "out") == digests(corpus / "whole")
    assert "kept " in said[0] and "worker 1 of 3 is done" in said[1]
    again = ended(started(corpus, "out", "--worker", "2/3"))
    assert "prepared already" in again


def members(session: int) -> list[int]:
    """The processes of a session that live."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def killed_and_started_again(corpus: Path, seed: int, workers: int, lasts_s: float) -> None:
    """Kill a preparation at a random moment of the time it takes, start it again, and compare."""
    out = f"out{seed}"
    process = started(corpus, out, "--workers", str(workers))
    deadline = time.monotonic() + 60
    while not (corpus / out / ".work").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, lasts_s))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while members(process.pid):
        assert time.monotonic() < deadline, "worker processes outlive their parent"
        time.sleep(0.01)
    process.communicate()
    ended(started(corpus, out, "--workers", str(workers)))
    assert digests(corpus / out) == digests(corpus / "whole")


def duration(corpus: Path, workers: int) -> float:
    """Seconds an uninterrupted preparation takes from the moment its folder is there."""
    process = started(corpus, f"timed{workers}", "--workers", str(workers))
    while not (corpus / f"timed{workers}" / ".work").exists():
        assert process.poll() is None
        time.sleep(0.002)
    began = time.monotonic()
    ended(process)
    return time.monotonic() - began


def test_a_killed_preparation_goes_on_and_writes_the_same_bytes(corpus: Path) -> None:
    lasts_s = duration(corpus, 2)
    for seed in range(3):
        killed_and_started_again(corpus, seed, 2, lasts_s)


@pytest.mark.long
def test_a_hundred_killed_preparations_go_on_and_write_the_same_bytes(corpus: Path) -> None:
    lasts_s = {workers: duration(corpus, workers) for workers in (1, 2)}
    for seed in range(100):
        workers = 2 if seed % 4 == 0 else 1
        killed_and_started_again(corpus, seed, workers, lasts_s[workers])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers, each a process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    place = tmp_path / "scheduler.json"

    def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    scheduler = start("dask_scheduler", "--port", "0", "--scheduler-file", str(place))
    deadline = time.monotonic() + 60
    while not place.exists() or not place.read_text().endswith("}"):
        assert scheduler.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    address = json.loads(place.read_text())["address"]
    workers = [start("dask_worker", address, "--nthreads", "1", "--no-nanny") for _ in range(2)]
    yield address, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def test_dask_writes_the_same_bytes_with_a_worker_killed(
    corpus: Path, cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, workers = cluster
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    process = started(corpus, "out", "--dask", address)
    deadline = time.monotonic() + 60
    while not list((corpus / "out").glob(".work/survey/task-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    workers[0].kill()
    ended(process)
    assert digests(corpus / "out") == digests(corpus / "whole")


def test_a_cluster_that_is_not_there_is_named(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prep", str(corpus / "source.toml"), str(corpus / "out"), "--worker", "2/2"]) == 2
    assert "--worker: expected I/N with 0 <= I < N, got 2/2; " in capfd.readouterr().err
    assert main(["data", "prep", str(corpus / "source.toml"), str(corpus / "out"), "--workers", "0"]) == 2
    assert "--workers: expected at least 1, got 0; " in capfd.readouterr().err


def test_two_preparations_of_one_folder_do_not_meet(corpus: Path) -> None:
    import fcntl

    (corpus / "out" / ".work").mkdir(parents=True)
    with open(corpus / "out" / ".work" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(corpus, CORPUS, "out: expected no other process preparing it, got one; ")


def test_normal_form_is_the_only_change_to_a_text_without_control_characters(home: Path) -> None:
    (home / "in").mkdir()
    text = "".join(chr(code) for code in range(0xA0, 0x3000, 7)) + "\u1e9b\u0323 \U0001f600"
    (home / "in" / "a.txt").write_text(text)
    prepared(home, "[input]\nkind = 'files'\npaths = ['in']\n")
    assert everything(home / "out") == [unicodedata.normalize("NFC", text)]


def test_a_worker_that_looks_late_does_not_wait_for_what_is_gone(tmp_path: Path) -> None:
    """Worker 0 may finish and clear up between two looks of another worker, which then waited for ever."""
    end, gone = tmp_path / "manifest.json", tmp_path / "gone"
    end.write_text("{}")
    told: list[str] = []
    with open_pool(workers=1, dask=None) as pool:
        works: list[Any] = ["a task"]
        _stage("match", str, works, lambda each: gone, [0], pool, (1, 2), end, told.append)
    assert told == []
