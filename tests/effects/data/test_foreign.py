"""Token files of other trainers, tokenizers of this machine, and every reader against damaged files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiktoken_ext import openai_public

from nmoe.cli import main
from nmoe.config.data_source import Arrow, Clean, Files, Jsonl, Parquet, Source, load_source
from nmoe.effects.data import inspect
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data import tokenizers as vocabulary
from nmoe.effects.data.prepare import readers
from nmoe.effects.data.prepare.inputs import find
from nmoe.effects.data.store import foreign as convert
from nmoe.effects.data.store import shard_writer as sink
from nmoe.effects.data.store import shards
from nmoe.effects.data.store.format import read_manifest
from nmoe.errors import InputError
from nmoe.pure.data.order import stretch
from nmoe.pure.data.prep import plan

SIZE = 300
END = SIZE - 1


def quiet(line: str) -> None:
    """Nobody listens."""


def invented(size: int = SIZE) -> tokenizers.Tokenizer:
    """The bytes, then pairs of bytes, then triples."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [index.to_bytes(2, "big") for index in range(min(size - 257, 1 << 16))]
    tokens += [index.to_bytes(3, "big") for index in range(size - 1 - len(tokens))]
    return tokenizers.make("invented", tokenizers.PATTERN, tokens, end_of_text=size - 1, size=size)


def corpus(folder: Path, size: int = SIZE) -> list[list[int]]:
    """A prepared folder of random documents, none of them empty."""
    draw = random.Random(7)
    documents = [draw.choices(range(size - 1), k=draw.randint(1, 40)) for _ in range(60)]
    sink.write(folder, invented(size), {"train": map(np.array, documents)}, tokens_per_shard=300)
    return documents


def whole(folder: Path) -> np.ndarray:
    """Every token of the training split, verified."""
    manifest = read_manifest(folder)
    if problems := shards.split_problems(folder, manifest, "train"):
        raise InputError(*problems)
    return stretch(shards.open_split(folder, manifest, "train").tokens, 0, manifest.splits["train"].tokens)


@pytest.mark.parametrize("size", [SIZE, 70_000])
@pytest.mark.parametrize("kind", convert.FORMATS)
def test_documents_survive_the_way_there_and_back(tmp_path: Path, kind: str, size: int) -> None:
    corpus(tmp_path / "corpus", size)
    tokenizers.save(invented(size), tmp_path)
    assert main(["data", "convert", str(tmp_path / "corpus"), str(tmp_path / "there"), "--to", kind]) == 0
    back = ["data", "convert", str(tmp_path / "there"), str(tmp_path / "back"), "--from", kind]
    assert main([*back, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    left, right = (whole(tmp_path / name) for name in ("corpus", "back"))
    assert left.tolist() == right.tolist()
    assert [read_manifest(tmp_path / name).splits["train"].documents for name in ("corpus", "back")] == [60, 60]


def test_foreign_files_are_what_their_trainers_read(tmp_path: Path) -> None:
    """Read as those trainers' own documentation lays the bytes out, not with our reader."""
    documents = corpus(tmp_path / "corpus")
    stream = [token for each in documents for token in [*each, END]]
    for kind in convert.FORMATS:
        convert.to_foreign(tmp_path / "corpus", "train", kind, tmp_path / kind, quiet)
    assert np.fromfile(tmp_path / "nanogpt", np.uint16).tolist() == stream
    assert np.fromfile(tmp_path / "olmo", np.uint16).tolist() == stream
    head = np.fromfile(tmp_path / "llmc", np.int32, 256)
    assert head[:3].tolist() == [20240520, 1, len(stream)] and not head[3:].any()
    assert np.fromfile(tmp_path / "llmc", np.uint16, offset=1024).tolist() == stream
    raw = (tmp_path / "megatron.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0" and struct.unpack("<QBQQ", raw[9:34]) == (1, 8, 60, 61)
    sizes = np.frombuffer(raw, np.int32, 60, 34)
    assert sizes.tolist() == [len(each) + 1 for each in documents]
    pointers = np.frombuffer(raw, np.int64, 60, 34 + 240)
    tokens = np.fromfile(tmp_path / "megatron.bin", np.uint16)
    assert tokens[pointers[9] // 2 :][: sizes[9]].tolist() == [*documents[9], END]
    assert np.frombuffer(raw, np.int64, 61, 34 + 240 + 480).tolist() == list(range(61))
    about = json.loads((tmp_path / "original" / "manifest.json").read_text())
    shard = about["shards"][0]
    assert np.load(tmp_path / "original" / shard["path"]).tolist() == stream
    index = (tmp_path / "original" / shard["index_path"]).read_bytes()
    assert index[:8] == b"NMOEIDX\0" and struct.unpack("<QQ", index[8:24]) == (1, 60)
    ends = np.cumsum([len(each) + 1 for each in documents])
    assert np.frombuffer(index, np.uint64, offset=32).reshape(-1, 2)[:, 1].tolist() == ends.tolist()


def test_ends_of_text_before_documents_are_understood(tmp_path: Path) -> None:
    """llm.c writes one in front of each document; a scan crosses the borders of its chunks."""
    np.array([END, 1, 2, END, 3, END, END, 4], np.uint16).tofile(tmp_path / "a")
    found = [each.tolist() for each in convert.read_foreign(tmp_path / "a", "nanogpt", invented())]
    assert found == [[1, 2], [3], [], [4]]


def test_other_tokenizers_and_ids_are_refused(tmp_path: Path) -> None:
    np.array([1, END + 1], np.uint16).tofile(tmp_path / "a")
    with pytest.raises(InputError, match="expected u16 ids below 300, got 300; give the tokenizer"):
        convert.from_foreign(tmp_path / "a", "nanogpt", invented(), tmp_path / "out", "train", quiet)
    assert not (tmp_path / "out" / "manifest.json").exists()
    corpus(tmp_path / "corpus")
    convert.to_foreign(tmp_path / "corpus", "train", "original", tmp_path / "original", quiet)
    with pytest.raises(InputError, match=r"\(299, 300\) of invented, got \(310, 311\) of invented; give its tokenizer"):
        list(convert.read_foreign(tmp_path / "original", "original", invented(311)))


def test_published_tokenizers_are_added_from_a_verified_file(tmp_path: Path) -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    raw = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks))
    (tmp_path / "file").write_bytes(raw)
    (tmp_path / "file.gz").write_bytes(gzip.compress(raw))
    digest = hashlib.sha256(raw).hexdigest()
    known = {"made": vocabulary.Known(sha256=digest, pattern=r"\w+|\W", end_of_text=260, size=270)}
    added = vocabulary.add("made", tmp_path / "file", known)
    assert vocabulary.add("made", tmp_path / "file.gz", known) == added
    assert tokenizers.encoding(added).encode_ordinary("the that") == [257, 32, 256, 97, 116]
    assert (added.end_of_text, added.size) == (260, 270)
    folder = vocabulary.install(added, "made", tmp_path / "home")
    assert tokenizers.load(folder) == added == vocabulary.resolve("made", tmp_path / "home", tmp_path)
    told: list[str] = []
    vocabulary.list_tokenizers(tmp_path / "home", told.append)
    assert told == [f"made                         270 tokens  fingerprint {added.identity}"]
    other = invented()
    with pytest.raises(InputError, match=f"of {other.identity[:12]}, got {added.identity[:12]} under it; "):
        vocabulary.install(other, "made", tmp_path / "home")
    (tmp_path / "file").write_bytes(raw[:-1])
    with pytest.raises(InputError, match=f"sha256 {digest}, got (?!{digest})"):
        vocabulary.add("made", tmp_path / "file", known)
    with pytest.raises(InputError, match="tokenizer gpt5: expected one of r50k_base, .*, o200k_harmony, got another, "):
        vocabulary.add("gpt5", tmp_path / "file")
    with pytest.raises(InputError, match="one of those in .*: made, got one that is not there; train"):
        vocabulary.resolve("mode", tmp_path / "home", tmp_path)


def test_a_file_of_any_name_is_a_tokenizer(tmp_path: Path) -> None:
    """By its path or its folder's; of Hugging Face's format the message says how it is taken."""
    made = invented()
    tokenizers.save(made, tmp_path)
    (tmp_path / "mine.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    for said in ("mine.json", "./mine.json", "./tokenizer.json", str(tmp_path)):
        assert vocabulary.resolve(said, tmp_path / "home", tmp_path) == made
    with pytest.raises(
        InputError, match=r"tokenizer ./none.json: expected a file or a folder, got none at .*none.json"
    ):
        vocabulary.resolve("./none.json", tmp_path / "home", tmp_path)
    (tmp_path / "other.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(InputError, match="other.json: .*got one of Hugging Face; add it with `nmoe data tokenizer add"):
        vocabulary.resolve("other.json", tmp_path / "home", tmp_path)


@pytest.mark.parametrize("name", list(vocabulary.KNOWN))
def test_the_published_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tiktoken's own tables, with 256 bytes in place of the ranks, which it would fetch."""
    asked: dict[str, str] = {}

    def ranks(url: str, expected_hash: str) -> dict[bytes, int]:
        asked[url] = expected_hash
        return {bytes([byte]): byte for byte in range(256)}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", ranks)
    theirs: dict[str, Any] = openai_public.ENCODING_CONSTRUCTORS[name]()
    ours = vocabulary.KNOWN[name]
    assert (list(asked.values()), theirs["pat_str"]) == ([ours.sha256], ours.pattern)
    special = theirs["special_tokens"]
    assert (special["<|endoftext|>"], max(special.values()) + 1) == (ours.end_of_text, ours.size)


def test_a_tokenizer_is_trained_on_the_training_split_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NMOE_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"text": f"word{index % 9} and more, {index}\n" * 3}) for index in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "s.toml").write_text('tokenizer = "mine"\n[input]\nkind = "jsonl"\npaths = ["a.jsonl"]\n')
    assert main(["data", "tokenizer", "train", str(tmp_path / "s.toml"), "--size", "270"]) == 0
    capsys.readouterr()
    assert main(["data", "tokenizer", "train", str(tmp_path / "s.toml"), "--size", "260"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "tokenizer mine: expected a name that is free" in told.err, "before anything is read"
    assert main(["data", "tokenizer", "train", str(tmp_path / "s.toml"), "--name", "a/b"]) == 2
    assert "tokenizer a/b: expected up to 64 letters" in capsys.readouterr().err
    assert main(["data", "prep", str(tmp_path / "s.toml"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main(["data", "tokenizer", "list"]) == 0
    identity = tokenizers.load(tmp_path / "out").identity
    assert f"mine                         270 tokens  fingerprint {identity}" in capsys.readouterr().out
    assert main(["data", "info", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokenizer_identity"] == identity and told["report"]["documents_in"] == 60
    assert main(["data", "info", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == (
        ["tokenizer", "train", "validation", "test", "source", "read", "kept"]
    ), "each once"
    assert "kind jsonl" in lines[4] and "paths a.jsonl" in lines[4] and ", 1 shard, " in lines[1]
    assert main(["data", "head", str(tmp_path / "out"), "--documents", "1", "--chars", "11"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("word")


def test_a_truncated_or_flipped_shard_is_found_at_any_byte(tmp_path: Path) -> None:
    documents = [np.array([number, 7, 290]) for number in range(40)]
    sink.write(tmp_path / "corpus", invented(), {"train": documents}, tokens_per_shard=100)
    inspect.verify([tmp_path / "corpus"], quiet)
    for name in ("shard-00001.npy", "shard-00001.ends.npy", "shard-00001.json"):
        path = tmp_path / "corpus" / "train" / name
        whole = path.read_bytes()
        for position in range(0, len(whole), 5):
            for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]):
                path.write_bytes(damaged)
                with pytest.raises(InputError, match=name):
                    inspect.verify([tmp_path / "corpus"], quiet)
        path.write_bytes(whole)
    inspect.verify([tmp_path / "corpus"], quiet)


# Every reader against files that are almost right.


def read_source(folder: Path, source: Source) -> int:
    """Read all documents of a source, as the survey does; how many."""
    items = find(source.input, folder, skip_unreadable=False, say=quiet)
    parts = [part for task in plan(items, 500) for part in task]
    return sum(1 for part in parts for _ in readers.read(items[part.file], part, source))


def source_of(kind: str) -> Source:
    skip = Clean(unreadable="skip", invalid_utf8="replace")
    if kind == "files":
        return Source(tokenizer="x", input=Files(paths=("in",)))
    if kind == "parquet":
        return Source(tokenizer="x", input=Parquet(paths=("in",), id_field="id"))
    if kind == "arrow":
        return Source(tokenizer="x", input=Arrow(paths=("in",), id_field="id"))
    return Source(tokenizer="x", input=Jsonl(paths=("in",), id_field="id"), clean=skip if kind == "skip" else Clean())


def reader(kind: str) -> Callable[[Path], object]:
    return lambda folder: read_source(folder, source_of(kind))


def foreign(kind: str, name: str) -> Callable[[Path], object]:
    return lambda folder: sum(len(each) for each in convert.read_foreign(folder / "in" / name, kind, invented()))


def opened(folder: Path) -> object:
    inspect.head(folder / "in", "train", 0, 100, 50, quiet)
    return whole(folder / "in")


def seeds(folder: Path) -> dict[str, Callable[[Path], object]]:
    """A folder of good files for each reader, and the reader."""
    records = [{"id": f"d{number}", "text": f"caf\u00e9 number {number} " * 5} for number in range(20)]
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records).encode()
    found: dict[str, Callable[[Path], object]] = {}

    def seed(name: str, call: Callable[[Path], object]) -> Path:
        (folder / name / "in").mkdir(parents=True)
        found[name] = call
        return folder / name / "in"

    (seed("text", reader("files")) / "a.txt").write_bytes(lines)
    (seed("jsonl", reader("jsonl")) / "a.jsonl").write_bytes(lines)
    (seed("skipping", reader("skip")) / "a.jsonl").write_bytes(lines)
    (seed("gzip", reader("jsonl")) / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (seed("zstd", reader("jsonl")) / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pq.write_table(pa.Table.from_pylist(records), seed("parquet", reader("parquet")) / "a.parquet", row_group_size=6)
    table = pa.Table.from_pylist(records)
    for name, write in (("arrow", pa.ipc.new_file), ("arrow stream", pa.ipc.new_stream)):
        with write(str(seed(name, reader("arrow")) / "a.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=6)
    corpus(folder / "corpus")
    for kind in convert.FORMATS:
        place = seed(kind, foreign(kind, "a"))
        convert.to_foreign(folder / "corpus", "train", kind, place / "a", quiet)
    shutil.copytree(folder / "corpus", seed("shards", opened), dirs_exist_ok=True)
    tokenizers.save(invented(), seed("tokenizer", lambda each: tokenizers.load(each / "in")))
    source = seed("source", lambda each: load_source(each / "in" / "a.toml"))
    (source / "a.toml").write_text(
        'tokenizer = "x"\ntask_bytes = 7\n[input]\nkind = "jsonl"\npaths = ["a"]\n[filter]\nmin_chars = 3\n'
    )
    return found


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four faults: cut, flipped, overwritten, doubled, removed, or replaced by a number."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        end = at + draw.randint(1, 16)
        number = draw.choice((b"\xff" * 4, b"\0" * 8, b"\x7f", b"\xed\xa0\x80", b"-1"))
        flipped = bytes([content[at] ^ 1 << draw.randrange(8)]) if at < len(content) else b""
        middle = (b"", flipped + content[at + 1 : end], draw.randbytes(end - at), content[at:end] * 2, number)
        content = content[:at] + draw.choice(middle) + (b"" if draw.random() < 0.15 else content[end:])
    return content


def fuzzed(folder: Path, count: int) -> dict[str, int]:
    """Mutate one file of a seed at a time and read; how many were read, refused."""
    found = seeds(folder)
    names, outcomes = sorted(found), {"read": 0, "refused": 0}
    for number in range(count):
        draw = random.Random(number)
        name = names[number % len(names)]
        path = draw.choice(sorted(path for path in (folder / name / "in").rglob("*") if path.is_file()))
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, draw))
        try:
            found[name](folder / name)
            outcomes["read"] += 1
        except InputError as error:
            assert all(": " in problem and "; " in problem for problem in error.problems), (name, number, error)
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"{name}: {path.name}, number {number}")
            raise
        path.write_bytes(whole)
    for name in names:
        found[name](folder / name)
    return outcomes


def test_damaged_files_end_in_clean_errors(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path, 600)
    assert min(outcomes.values()) > 60


@pytest.mark.long
def test_twenty_thousand_damaged_files_end_in_clean_errors(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path, 20_000)
    assert min(outcomes.values()) > 2000
