"""What strangers send and what an environment does: each input here once ended in a traceback, or in wrong data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nmoe.cli import main
from nmoe.config.data_source import load_source
from nmoe.effects.data import inspect, stdlib, tokenizer, tokenizers
from nmoe.effects.data.prepare.execute import open_pool
from nmoe.effects.data.prepare.prep import Report, prepare
from nmoe.effects.data.store import shard_writer
from nmoe.effects.data.store.foreign import FORMATS, from_foreign, read_foreign, to_foreign
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.shards import documents
from nmoe.errors import InputError

BYTES = tokenizer.make("bytes", tokenizer.PATTERN, [bytes([b]) for b in range(256)], end_of_text=256, size=257)


def quiet(line: str) -> None:
    """Nobody listens."""


def prepared(folder: Path, body: str, out: str = "out") -> Report:
    """Prepare the source `body` of `folder` in this process."""
    (folder / "source.toml").write_text(f'tokenizer = "./tokenizer.json"\n{body}')
    with open_pool(workers=1, dask=None) as pool:
        report = prepare(load_source(folder / "source.toml"), BYTES, folder, folder / out, pool, quiet)
    assert report is not None
    return report


def texts(folder: Path) -> list[str]:
    """The documents of all splits, ordered."""
    manifest = read_manifest(folder)
    every = (document for split in manifest.splits for document in documents(folder, manifest, BYTES, split))
    return sorted(bytes(document.tolist()).decode() for document in every)


def write_lines(path: Path, *records: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


JSONL = "[input]\nkind = 'jsonl'\npaths = ['in']\n"


# A foreign format is believed where everything in it agrees.


@pytest.mark.parametrize("kind", ["olmo", "nanogpt"])
def test_ids_of_another_width_are_refused_until_it_is_given(tmp_path: Path, kind: str) -> None:
    """105 tokens written as u32 were read as 211 of u16, every other one a NUL."""
    ids = [*range(50), 256, *range(50, 103), 256]
    np.array(ids, "<u4").tofile(tmp_path / "wide")
    np.array(ids, "<u2").tofile(tmp_path / "narrow")
    with pytest.raises(InputError, match="got a 0 in every other place as in u32 ids; give --dtype u32"):
        list(read_foreign(tmp_path / "wide", kind, BYTES))
    from_foreign(tmp_path / "wide", kind, BYTES, tmp_path / "out", "train", quiet, "u32")
    from_foreign(tmp_path / "narrow", kind, BYTES, tmp_path / "same", "train", quiet)
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "same")
    assert read_manifest(tmp_path / "out").splits["train"].tokens == 105
    np.array(ids[1:], "<u2").tofile(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"u32 ids below 257, got \d+; give the tokenizer .* or --dtype u16"):
        list(read_foreign(tmp_path / "narrow", kind, BYTES, "u32"))
    np.array([7, 0], "<u2").tofile(tmp_path / "nul")
    assert [document.tolist() for document in read_foreign(tmp_path / "nul", kind, BYTES, "u16")] == [[7, 0]]
    with pytest.raises(InputError, match="--dtype: expected none for megatron"):
        list(read_foreign(tmp_path / "nul", "megatron", BYTES, "u16"))


def test_the_width_is_an_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.array([1, 2, 256, 3, 256], "<u4").tofile(tmp_path / "wide.npy")
    tokenizer.save(BYTES, tmp_path)
    command = ["data", "convert", str(tmp_path / "wide.npy"), str(tmp_path / "out"), "--from", "olmo"]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    np.array([1, 2, 256, 3], "<u4").tofile(tmp_path / "wide.npy")
    assert main(command) == 2 and "give --dtype u32" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "--dtype", "u32"]) == 0
    assert "4 tokens" not in capsys.readouterr().err
    to = ["data", "convert", str(tmp_path / "out"), str(tmp_path / "x"), "--to", "olmo", "--dtype", "u32"]
    assert main(to) == 2 and "--dtype: expected it with --from only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: np.save(path, np.array([1, 2, 3], "<u2")), "a NumPy header; write the array with .tofile"),
        (lambda path: path.write_bytes(struct.pack("<3i", 20240520, 1, 0).ljust(1024, b"\0")), "give --from llmc"),
        (lambda path: path.write_bytes(b"MMIDIDX\0\0" + bytes(25)), "give --from megatron"),
        (lambda path: path.write_bytes(b"NMOEIDX\0" + bytes(24)), "give --from original"),
    ],
)
def test_the_first_bytes_of_another_format_are_no_tokens(
    tmp_path: Path, write: Callable[[Path], object], what: str
) -> None:
    write(tmp_path / "a.npy")
    with pytest.raises(InputError, match=what):
        list(read_foreign(tmp_path / "a.npy", "olmo", BYTES))


def write_megatron(path: Path, sizes: list[int], bounds: list[int], pointers: list[int] | None = None) -> None:
    """A Megatron pair of u16: the tokens count up."""
    total = sum(sizes)
    np.arange(total, dtype="<u2").tofile(path.with_name(f"{path.name}.bin"))
    starts = np.append(0, np.cumsum(sizes))[:-1] * 2 if pointers is None else pointers
    path.with_name(f"{path.name}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, len(sizes), len(bounds))
        + np.array(sizes, "<i4").tobytes()
        + np.array(starts, "<i8").tobytes()
        + np.array(bounds, "<i8").tobytes()
    )


def test_sentences_of_megatron_are_joined_to_documents(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [2, 3, 1, 4], [0, 2, 2, 4])
    assert [each.tolist() for each in read_foreign(tmp_path / "a", "megatron", BYTES)] == [
        [0, 1, 2, 3, 4],
        [],
        [5, 6, 7, 8, 9],
    ]


@pytest.mark.parametrize(
    ("sizes", "bounds", "pointers"),
    [
        ([2, 3], [0, 1], None),
        ([2, 3], [1, 2], None),
        ([2, 3], [0, 2, 1, 2], None),
        ([2, 3], [], None),
        ([2, 3], [0, 1, 2], [0, 2]),
        ([2, 3], [0, 1, 2], [0, 6]),
        ([6, -1], [0, 1, 2], [0, 12]),
    ],
)
def test_an_index_of_megatron_that_does_not_cover_its_tokens_is_refused(
    tmp_path: Path, sizes: list[int], bounds: list[int], pointers: list[int] | None
) -> None:
    write_megatron(tmp_path / "a", sizes, bounds, pointers)
    with pytest.raises(InputError, match="that cover .*; restore the files"):
        list(read_foreign(tmp_path / "a", "megatron", BYTES))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with the splits train, of three shards, and validation."""
    splits = {"train": [np.arange(number, number + 40) for number in range(6)], "validation": [np.arange(9)]}
    shard_writer.write(tmp_path / "corpus", BYTES, splits, tokens_per_shard=90)
    return tmp_path / "corpus"


@pytest.mark.parametrize(("begin", "end"), [(0, 82), (41, 90), (50, 82)])
def test_documents_of_the_original_that_overlap_or_leave_gaps_are_refused(corpus: Path, begin: int, end: int) -> None:
    out = corpus.parent / "original"
    to_foreign(corpus, "train", "original", out, quiet)
    index = out / "shard_0000" / "nmoe-v1-shard-000000.idx"
    raw = bytearray(index.read_bytes())
    raw[32 + 16 : 32 + 32] = struct.pack("<2Q", begin, end)
    index.write_bytes(raw)
    with pytest.raises(InputError, match="expected documents that cover 246 tokens in order, got others; restore"):
        list(read_foreign(out, "original", BYTES))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "shard_0000/../../secret", "\ud800"])
def test_a_manifest_of_the_original_names_no_file_outside_its_folder(corpus: Path, name: str) -> None:
    out = corpus.parent / "original"
    to_foreign(corpus, "train", "original", out, quiet)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0]["index_path"] = name
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="leads out of the folder|surrogates not allowed"):
        list(read_foreign(out, "original", BYTES))


# Every reader of shards verifies them.


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_converted_from_a_shard_that_is_not_whole(corpus: Path, kind: str) -> None:
    path = corpus / "train" / "shard-00001.npy"
    raw = bytearray(path.read_bytes())
    raw[140] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="shard-00001.npy: expected content with sha256"):
        to_foreign(corpus, "train", kind, corpus.parent / "out", quiet)
    assert not [path for path in corpus.parent.glob("out*") if path.is_file()]
    printed: list[str] = []
    with pytest.raises(InputError, match="shard-00001.npy: expected content with sha256"):
        inspect.head(corpus, "train", 2, 1, 10, printed.append)
    assert printed == []


def rewrite_receipts(folder: Path, split: str, index: int) -> None:
    """Make receipt and manifest right for what a shard holds now."""
    raw = {end: (folder / split / f"shard-{index:05d}{end}").read_bytes()[128:] for end in (".npy", ".ends.npy")}
    manifest = json.loads((folder / "manifest.json").read_text())
    receipt = manifest["splits"][split]["shards"][index]
    receipt["sha256"] = hashlib.sha256(raw[".npy"]).hexdigest()
    receipt["ends_sha256"] = hashlib.sha256(raw[".ends.npy"]).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / split / f"shard-{index:05d}.json").write_text(json.dumps(receipt, indent=1) + "\n")


def test_ends_that_lie_inside_documents_are_refused_by_every_reader(corpus: Path) -> None:
    path = corpus / "train" / "shard-00000.ends.npy"
    path.write_bytes(path.read_bytes()[:128] + np.array([30, 82], "<i8").tobytes())
    rewrite_receipts(corpus, "train", 0)
    message = "shard-00000.ends.npy: expected the position behind each end of text, got others"
    for read in (
        lambda: inspect.head(corpus, "train", 0, 1, 10, quiet),
        lambda: inspect.verify([corpus], quiet),
        lambda: to_foreign(corpus, "train", "megatron", corpus.parent / "out", quiet),
    ):
        with pytest.raises(InputError, match=message):
            read()


def test_a_split_that_was_taken_out_of_the_manifest_is_missed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", *({"text": f"number {index}"} for index in range(60)))
    prepared(tmp_path, JSONL)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["splits"].pop("test")["tokens"]
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(InputError) as caught:
        inspect.verify([tmp_path / "out"], quiet)
    unnamed, report = caught.value.problems
    assert "out/test: expected no shards, the manifest has no split test, got some; " in unnamed
    assert "out/report.json: expected tokens and documents {'train': " in report


@pytest.mark.parametrize("name", ["../../../../etc", "/etc", "..", ".hidden", "", "a/b", "a" * 65, "\x1b[2J"])
def test_a_split_is_named_like_a_folder_or_refused(corpus: Path, name: str) -> None:
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"][name] = manifest["splits"].pop("validation")
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: expected a split named with up to 64 letters") as caught:
        read_manifest(corpus)
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="expected a split named with up to 64 letters"):
        shard_writer.write(corpus.parent / "new", BYTES, {name: []})


@pytest.mark.parametrize("change", [{"documents": 0}, {"tokens": -1}, {"bytes": -1}, {"documents": 10**30}])
def test_numbers_of_a_receipt_that_can_not_be_are_refused(corpus: Path, change: dict[str, int]) -> None:
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text())
    split = manifest["splits"]["validation"]
    split["shards"][0].update(change)
    split.update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected 1 <= documents <= tokens and 0 <= bytes in validation shard 0"):
        read_manifest(corpus)


def test_documents_are_printed_without_their_control_characters(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_writer.write(corpus.parent / "new", BYTES, {"train": [np.frombuffer(b"a\x1b[2J\tb\nc\x07", "u1")]})
    assert main(["data", "head", str(corpus.parent / "new")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["a\\x1b[2J\tb", "c\\x07"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "files"])
def test_the_longest_document_is_measured_by_its_text_in_every_form(tmp_path: Path, kind: str) -> None:
    """A line of JSON has escapes, other fields and an id, which are no part of the text."""
    kept, long = "\u00e9\u00e9\n\x07\x01" * 10, "\u00e9\u00e9\n\x07\x01" * 10 + "x"
    records = [
        {"text": text, "id": "n" * 500 + str(index), "other": "y" * 900} for index, text in enumerate((kept, long))
    ]
    (tmp_path / "in").mkdir()
    if kind == "jsonl":
        write_lines(tmp_path / "in" / "a.jsonl", *records)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "in" / "a.parquet")
    else:
        for index, text in enumerate((kept, long)):
            (tmp_path / "in" / f"{index}.txt").write_bytes(text.encode())
    ids = "" if kind == "files" else "id_field = 'id'\n"
    report = prepared(
        tmp_path,
        f"[input]\nkind = '{kind}'\npaths = ['in']\n{ids}[filter]\nmax_bytes = {len(kept.encode())}\n"
        "[clean]\ncontrol = 'keep'\n",
    )
    assert report.dropped["long"] == 1
    assert texts(tmp_path / "out") == [kept]


# An empty feature equals nothing.


def test_documents_of_signs_alone_are_no_near_duplicates(tmp_path: Path) -> None:
    signs = ["!!! ??? ...", "\U0001f600 \U0001f680", "\u2192 \u2190 \u2191", "--- *** ---"]
    write_lines(tmp_path / "in" / "a.jsonl", *({"text": text} for text in signs))
    report = prepared(tmp_path, f"{JSONL}[deduplicate]\nnear = 0.5\n")
    assert report.dropped["near duplicate"] == 0
    assert texts(tmp_path / "out") == sorted(signs)


@pytest.mark.parametrize("permutations", [16, 17, 128, 256])
def test_every_similarity_within_the_bounds_finds_what_is_equal(tmp_path: Path, permutations: int) -> None:
    """datasketch refuses a single band, which 0.99 asks for up to 256 permutations."""
    words = " ".join(f"word{index}" for index in range(300))
    write_lines(tmp_path / "in" / "a.jsonl", {"text": words}, {"text": words.upper()}, {"text": words[1500:]})
    report = prepared(tmp_path, f"{JSONL}[deduplicate]\nnear = 0.99\npermutations = {permutations}\n")
    assert report.dropped["near duplicate"] == 1


# What a library raises becomes a line with the place.


def refused(folder: Path, body: str, message: str, out: str = "out") -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepared(folder, body, out)
    assert all("expected " in problem and "; " in problem for problem in caught.value.problems)


def test_a_lone_surrogate_in_an_id_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", {"text": "one", "id": "\ud800"}, {"text": "two", "id": "\ud801"})
    body = f"{JSONL}id_field = 'id'\n"
    refused(tmp_path, body, r"a.jsonl: expected Unicode in id at byte 0, got the lone surrogate U\+D800; ")
    refused(tmp_path, f"{body}[clean]\ninvalid_utf8 = 'replace'\n", "expected Unicode in id at byte 0", "again")
    write_lines(tmp_path / "in" / "b.jsonl", {"text": "three", "id": "c"})
    report = prepared(tmp_path, f"{body}[clean]\nunreadable = 'skip'\n", "skipped")
    assert report.dropped["unreadable"] == 2 and texts(tmp_path / "skipped") == ["three"]


def test_a_million_blanks_are_tokenized(tmp_path: Path) -> None:
    """On them the pattern of o200k runs out of stack."""
    wide = tokenizer.make(
        "o200k", tokenizers.KNOWN["o200k_harmony"].pattern, list(BYTES.ranks), end_of_text=256, size=257
    )
    text = "a" + " " * 1_000_000 + "b"
    assert bytes(tokenizer.encode(tokenizer.encoding(wide), text).tolist()) == text.encode()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "expected a regular expression as pattern"), ("[a-m]+", "expected tokens of all 8 bytes, got 4")],
)
def test_a_pattern_that_is_none_or_loses_characters_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", {"text": "abcdwxyz"})
    (tmp_path / "source.toml").write_text(f'tokenizer = "./tokenizer.json"\n{JSONL}')
    bad = tokenizer.make("bad", pattern, list(BYTES.ranks), end_of_text=256, size=257)
    with pytest.raises(InputError, match=message), open_pool(workers=1, dask=None) as pool:
        prepare(load_source(tmp_path / "source.toml"), bad, tmp_path, tmp_path / "out", pool, quiet)


@pytest.mark.parametrize(
    "tokens",
    [list(BYTES.ranks)[1:], [*BYTES.ranks, b"a"], [*BYTES.ranks, b""]],
    ids=["a byte is missing", "a token twice", "an empty token"],
)
def test_a_tokenizer_that_can_not_write_every_text_is_refused(tmp_path: Path, tokens: list[bytes]) -> None:
    """A missing byte ended in a panic inside tiktoken."""
    bad = tokenizer.make("bad", tokenizer.PATTERN, tokens, end_of_text=300, size=301)
    tokenizer.save(bad, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["tokens"] = [base64.b64encode(token).decode() for token in tokens]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored, indent=1) + "\n")
    with pytest.raises(InputError, match="expected tokens that differ, none empty, the 256 bytes among them"):
        tokenizer.load(tmp_path)


def test_a_tokenizer_of_a_trillion_ids_is_refused(tmp_path: Path) -> None:
    tokenizer.save(tokenizer.make("x", "x", list(BYTES.ranks), end_of_text=256, size=1 << 40), tmp_path)
    with pytest.raises(InputError, match="end_of_text < size <= 16777216, got 256 and 1099511627776; "):
        tokenizer.load(tmp_path)


def unreadable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A folder that nobody may look into, root included."""
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if not isinstance(path, int) and os.path.abspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("paths", ["in", "in/**", "in/**/*.txt", "in/*/*.txt", "*/sub/*.txt"])
def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str) -> None:
    """`glob` passes over it without a word."""
    for name in ("a", "sub"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.txt").write_text(f"text of {name}")
    unreadable(monkeypatch, tmp_path / "in" / "sub")
    body = f"[input]\nkind = 'files'\npaths = ['{paths}']\n"
    refused(tmp_path, body, "in/sub: expected a folder that can be read, got Permission denied; ")
    if not paths.startswith("*"):
        prepared(tmp_path, f"{body}[clean]\nunreadable = 'skip'\n", "skipped")
        assert texts(tmp_path / "skipped") == ["text of a"]


def test_a_split_or_library_without_permission_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library" / "sub").mkdir(parents=True)
    (tmp_path / "library" / "a.py").write_text("one = 1\n")
    unreadable(monkeypatch, corpus / "train")
    with pytest.raises(InputError, match="corpus/train: expected a readable folder of files, got Permission denied; "):
        inspect.verify([corpus], quiet)
    unreadable(monkeypatch, tmp_path / "library" / "sub")
    with pytest.raises(InputError, match="library/sub: expected a readable folder, got Permission denied; "):
        stdlib.prepare_folder(tmp_path / "library", tmp_path / "cache", 300, quiet)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "report.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"format":' * 100_000, '{"format": 1, "splits": {"a": ' + "[" * 900]
)
def test_deeply_nested_json_is_refused(tmp_path: Path, name: str, content: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", *({"text": f"number {index}"} for index in range(40)))
    prepared(tmp_path, JSONL)
    (tmp_path / "out" / name).write_text(content)
    for command in ("verify", "info"):
        assert main(["data", command, str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_what_is_no_file_is_not_read_for_ever(corpus: Path, name: str) -> None:
    (corpus / name).unlink()
    os.mkfifo(corpus / name)
    with pytest.raises(InputError, match=f"{name}: expected a readable file, got no regular file; "):
        read_manifest(corpus)
    (corpus / name).unlink()
    (corpus / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name}: expected a readable file, got no regular file; "):
        read_manifest(corpus)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pipe_is_no_foreign_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    path = {"megatron": "a.idx", "original": "folder/manifest.json"}.get(kind, "a")
    os.mkfifo(tmp_path / path)
    with pytest.raises(InputError, match="no regular file"):
        list(read_foreign(tmp_path / ("folder" if kind == "original" else "a"), kind, BYTES))


def test_a_column_of_times_is_refused_whatever_their_year(tmp_path: Path) -> None:
    """One beyond the year 9999 has no Python object."""
    (tmp_path / "in").mkdir()
    times = pa.array([10**15 * 400, 1], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["one", "two"], "id": times}), tmp_path / "in" / "a.parquet")
    body = "[input]\nkind = 'parquet'\npaths = ['in']\nid_field = 'id'\n"
    refused(tmp_path, body, r"a.parquet: expected texts or integers in column id, got timestamp\[ms\]; ")


@pytest.mark.parametrize("name", ["plan.json", "tokenizer.json", "report.json", "manifest.json"])
def test_a_disk_that_is_full_is_named_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", *({"text": f"number {index}"} for index in range(9)))
    write = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name.startswith(f".{name}."):
            raise OSError(28, "No space left on device", str(path))
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    refused(tmp_path, JSONL, "expected room and permission to read and write, got No space left on device; ")
    monkeypatch.undo()
    prepared(tmp_path, JSONL)
    assert inspect.verify([tmp_path / "out"], quiet) == 0


def test_one_damaged_tokenizer_does_not_take_down_the_list(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tokenizers.install(BYTES, name, tmp_path)
    (tmp_path / "tokenizers" / "b" / "tokenizer.json").write_text("{")
    printed: list[str] = []
    with pytest.raises(InputError, match=r"b/tokenizer.json: expected JSON"):
        tokenizers.list_tokenizers(tmp_path, printed.append)
    assert [line.split()[0] for line in printed] == ["a", "c"]


# What is written is no input.


@pytest.mark.parametrize("out", ["in/out", "in/deep/er"])
@pytest.mark.parametrize("paths", ["in", "in/**/*.json*", "link"])
def test_a_folder_written_inside_its_input_takes_the_same_command_twice(tmp_path: Path, out: str, paths: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", *({"text": f"number {index}"} for index in range(40)))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    body = f"[input]\nkind = 'jsonl'\npaths = ['{paths}']\n"
    first = prepared(tmp_path, body, out)
    assert prepared(tmp_path, body, out) == first and first.documents_in == 40


# Memory.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preparation_holds_one_document_however_many_there_are(tmp_path: Path, kind: str) -> None:
    """Of every other document it keeps its hashes: 300 bytes of the 20,000 of each."""

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        (folder / "in").mkdir(parents=True)
        if kind == "jsonl":
            write_lines(folder / "in" / "a.jsonl", *({"text": f"{index} " * 4000} for index in range(count)))
        else:
            columns = {"text": [f"{index} " * 4000 for index in range(count)]}
            pq.write_table(pa.table(columns), folder / "in" / "a.parquet", row_group_size=8)
        # what Arrow allocates Python does not see
        before, arrow = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(arrow)
        tracemalloc.start()
        prepared(folder, f"task_bytes = 1_000_000_000\n[input]\nkind = '{kind}'\npaths = ['in']\n")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        pa.set_memory_pool(before)
        return most + arrow.max_memory()

    peak(30)
    few, many = peak(150), peak(600)  # a batch has 64 rows
    assert many - few < 450 * 2000


def test_a_shard_is_not_read_back_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a shard is mapped while it is written")

    source = tmp_path / "corpus"
    document = np.full(500_000, 65)
    monkeypatch.setattr(np, "memmap", forbidden)
    before = read_bytes()
    shard_writer.write(source, BYTES, {"train": [document] * 8}, tokens_per_shard=1_000_000)
    assert read_bytes() - before < 500_000
    monkeypatch.undo()
    before = read_bytes()
    to_foreign(source, "train", "original", tmp_path / "original", quiet)
    # its own shards, once, to verify them
    assert read_bytes() - before < 8_000_000 + 1_000_000
