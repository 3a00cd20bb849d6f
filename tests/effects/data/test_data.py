"""From source files to verified token streams: tokenizer, shards, the embedded corpus."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.config.sections import Shards
from nmoe.effects import terminal
from nmoe.effects.data import stdlib, tokenizer
from nmoe.effects.data.mixture import plan_data, read_manifests
from nmoe.effects.data.store import shard_writer, shards
from nmoe.effects.data.store.format import read_manifest
from nmoe.errors import InputError
from nmoe.pure.data.order import stretch
from nmoe.pure.data.prep import split_of
from tests.effects.train.tiny import tiny

SIZE = 400


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library: a real module cut into files of twelve lines, and what a library has beside its sources."""
    root = tmp_path_factory.mktemp("library")
    lines = Path(tarfile.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    for index in range(0, len(lines), 12):
        path = root / f"part{index % 5}" / f"module{index:05d}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines[index : index + 12]), encoding="utf-8")
    for name in ("test", "part1/tests", "idlelib", "site-packages/other", "__pycache__", "config-3"):
        (root / name).mkdir(parents=True)
        (root / name / "left_out.py").write_text("print('not in the corpus')\n")
    (root / "_sysconfigdata_x.py").write_text("print('not in the corpus')\n")
    (root / "notes.txt").write_text("not in the corpus\n")
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'caf\u00e9'\n".encode("latin-1"))
    (root / "literal.py").write_text("stop = '<|endoftext|>'\n")
    for index in range(100):
        (root / f"twin{index}.py").write_text(f"number = {index % 25}  # in four files\n")
    return root


@pytest.fixture(scope="module")
def prepared(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stdlib.prepare_folder(library, tmp_path_factory.mktemp("cache"), SIZE, quiet)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def whole(folder: Path, split: str) -> np.ndarray:
    """Every token of a split, verified as a training verifies them."""
    (manifest,) = read_manifests([folder])
    opened = shards.open_split(folder, manifest, split)
    return stretch(opened.tokens, 0, opened.num_tokens)


def read_whole(folder: Path) -> None:
    """As a training reads the split, and then document by document, as everything else does."""
    whole(folder, "train")
    list(shards.documents(folder, read_manifest(folder), tokenizer.load(folder), "train"))


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, cut at end of text."""
    known = tokenizer.load(folder)
    ids = whole(folder, split)
    ends = np.flatnonzero(ids == known.end_of_text) + 1
    run = tokenizer.encoding(known)
    return [run.decode(part[:-1].tolist()) for part in np.split(ids, ends)[:-1]]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_merges_are_learnt_in_order_of_frequency() -> None:
    """`once` stands once: its pairs teach nothing."""
    text = "zx\n" * 5 + "zxa\n" * 3 + "\u00e9\n" * 9 + "once\n"
    learnt = tokenizer.train([text], 260, quiet)
    assert [learnt.ranks[token] for token in (b"\0", b"a", b"\xff")] == [0, ord("a"), 255]
    merges = {token: rank for token, rank in learnt.ranks.items() if rank >= 256}
    assert merges == {"\u00e9".encode(): 256, b"zx": 257, b"zxa": 258}
    assert (learnt.end_of_text, learnt.size) == (259, 260)
    assert tokenizer.byte_lengths(learnt)[-5:].tolist() == [1, 2, 2, 3, 0]
    with pytest.raises(InputError, match="vocabulary of at most 260 tokens, .*, got 261; "):
        tokenizer.train([text], 261, quiet)
    with pytest.raises(InputError, match="tokenizer_size: expected at least 257 .*, got 256; "):
        tokenizer.train([text], 256, quiet)


def test_letters_of_the_trainer_are_the_bytes_it_means() -> None:
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_of = tokenizer.byte_of_letter()
    assert sorted(byte_of) == sorted(letters.alphabet())
    for code in [*range(0x800), 0x20AC, 0xFFFD, 0x1F600]:
        text = chr(code)
        said = "".join(piece for piece, _ in letters.pre_tokenize_str(text))
        assert bytes(byte_of[letter] for letter in said) == text.encode()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "def f(x):\n\n        return x.name\n",
            ["def", " f", "(x", "):", "\n\n        ", "return", " x", ".name", "\n"],
        ),
        ("a_b = 12345  # why\r\n\tif", ["a", "_b", " =", " ", "123", "45", "  ", "#", " why", "\r\n\t", "if"]),
        ("x\n   \n  y", ["x", "\n   \n  ", "y"]),
    ],
)
def test_pieces_of_source_code(text: str, pieces: list[str]) -> None:
    one_token_a_piece = {piece.encode(): 256 + index for index, piece in enumerate(pieces) if len(piece) > 1}
    known = attrs.evolve(
        tokenizer.train(["ab"], 257, quiet),
        ranks={bytes([byte]): byte for byte in range(256)}
        | dict(zip(one_token_a_piece, range(256, 999), strict=False)),
        end_of_text=256 + len(one_token_a_piece),
        size=257 + len(one_token_a_piece),
    )
    run = tokenizer.encoding(known)
    assert run.decode_tokens_bytes(run.encode_ordinary(text)) == [piece.encode() for piece in pieces]


@settings(deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(), st.sampled_from(["<|endoftext|>", "\r", "\n \n", "\x0c", "    ", "\u2028"])))
)
def test_every_text_comes_back_and_its_bytes_are_counted(prepared: Path, parts: list[str]) -> None:
    known, text = tokenizer.load(prepared), "".join(parts)
    ids = tokenizer.encoding(known).encode_ordinary(text)
    assert tokenizer.encoding(known).decode(ids) == text
    assert known.end_of_text not in ids
    lengths = tokenizer.byte_lengths(known)
    assert lengths.dtype == np.int32 and len(lengths) == SIZE and lengths[known.end_of_text] == 0
    assert lengths[ids].sum() == len(text.encode())


def test_a_tokenizer_is_read_back_equal_and_a_changed_file_is_refused(prepared: Path, tmp_path: Path) -> None:
    known = tokenizer.load(prepared)
    tokenizer.save(known, tmp_path)
    assert tokenizer.load(tmp_path) == known
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["tokens"][300], stored["tokens"][301] = stored["tokens"][301], stored["tokens"][300]
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=f"fingerprint {known.identity}.*, got (?!{known.identity})[0-9a-f]{{64}}; "):
        tokenizer.load(tmp_path)


def test_training_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'nmoe\[data\]'"):
        tokenizer.train(["text"], 300, quiet)


def invented(size: int) -> tokenizer.Tokenizer:
    """A tokenizer of any size: bytes, then pairs of bytes, then triples."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [index.to_bytes(2, "big") for index in range(min(size - 257, 1 << 16))]
    tokens += [index.to_bytes(3, "big") for index in range(size - 1 - len(tokens))]
    return tokenizer.make("invented", tokenizer.PATTERN, tokens, end_of_text=size - 1, size=size)


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.lists(st.integers(0, 298), max_size=12), min_size=1, max_size=12),
    limit=st.integers(1, 30),
    data=st.data(),
)
def test_shards_are_one_stream_of_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], limit: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    known = invented(300)
    shard_writer.write(folder, known, {"train": (np.array(t, np.uint32) for t in texts)}, tokens_per_shard=limit)
    manifest = read_manifest(folder)
    receipt, split = manifest.splits["train"], shards.open_split(folder, manifest, "train")
    stream = [token for text in texts for token in [*text, 299]]
    assert (split.num_tokens, receipt.documents) == (len(stream), len(texts))
    assert receipt.bytes == sum(1 if token < 256 else 2 for text in texts for token in text)
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    assert stretch(split.tokens, start, count).tolist() == stream[start : start + count]
    arrays = [np.load(path) for path in sorted((folder / "train").glob("shard-?????.npy"))]
    assert np.concatenate(arrays).tolist() == stream
    for index, array in enumerate(arrays):
        ends = np.load(folder / "train" / f"shard-{index:05d}.ends.npy")
        assert ends.tolist() == (np.flatnonzero(array == 299) + 1).tolist()
        assert len(array) <= limit or len(ends) == 1
        if index:
            assert len(arrays[index - 1]) + ends[0] > limit


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, size: int, dtype: str) -> None:
    shard_writer.write(tmp_path / "corpus", invented(size), {"train": iter([np.array([size - 2, 5])])})
    path = tmp_path / "corpus" / "train" / "shard-00000.npy"
    np.save(tmp_path / "oracle.npy", np.array([size - 2, 5, size - 1], dtype))
    assert path.read_bytes() == (tmp_path / "oracle.npy").read_bytes()
    split = shards.open_split(tmp_path / "corpus", read_manifest(tmp_path / "corpus"), "train")
    assert stretch(split.tokens, 1, 2).tolist() == [5, size - 1]


def test_bad_documents_leave_nothing_that_could_be_read(tmp_path: Path) -> None:
    for index, (bad, limit) in enumerate([([3, 299], 100), ([3, 300], 100), ([-1], 100), ([3], 0)]):
        folder = tmp_path / str(index)
        with pytest.raises(InputError, match="ids in 0..298, got .* in document 1 of shard 0|at least 1, got 0"):
            texts = iter([np.array([1, 2]), np.array(bad)])
            shard_writer.write(folder, invented(300), {"train": texts}, tokens_per_shard=limit)
        assert not list(folder.rglob("*shard*")) and not list(folder.rglob("manifest*"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("keep")
    with pytest.raises(InputError, match="used: expected an empty folder to write to"):
        shard_writer.write(tmp_path / "used", invented(300), {})


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A damage: `change` applied to a JSON file."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")

    return damage


def patched(name: str, position: int) -> Callable[[Path], None]:
    """A damage: one bit flipped."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


def id_too_high(folder: Path) -> None:
    """A shard that agrees with its receipts and holds an id that the tokenizer has not."""
    path = folder / "train/shard-00000.npy"
    content = path.read_bytes()[:128] + b"\x90\x01" + path.read_bytes()[130:]
    path.write_bytes(content)
    digest = hashlib.sha256(content[128:]).hexdigest()
    path.with_suffix(".blocks").write_text(digest + "\n")
    edited("train/shard-00000.json", lambda v: v.update(sha256=digest))(folder)
    edited("manifest.json", lambda v: v["splits"]["train"]["shards"][0].update(sha256=digest))(folder)


SHARD = "train/shard-00000.npy"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / SHARD, 1000), rf"{SHARD}: expected \d+ bytes, got 1000; restore"),
    "longer": (lambda f: os.truncate(f / SHARD, 10**6), rf"{SHARD}: expected (\d+) bytes, got (?!\1)\d+; restore"),
    "bit": (
        patched(SHARD, 200),
        rf"{SHARD}: expected block 0, bytes 0 to \d+ of .*, with sha256 (\w{{64}}), got (?!\1)\w{{64}}; restore",
    ),
    "last bit": (patched(SHARD, -1), f"{SHARD}: expected block 0, bytes 0 to "),
    "blocks": (patched("train/shard-00000.blocks", 3), f"{SHARD}: expected block 0, bytes 0 to "),
    "no blocks": (
        lambda f: (f / "train/shard-00000.blocks").unlink(),
        r"train: expected digests of blocks \(shard-00000.blocks and .*\), got none, .*: nmoe data digest .*/copy$",
    ),
    "header": (patched(SHARD, 20), f"{SHARD}: expected header"),
    "ends": (patched("train/shard-00000.ends.npy", 130), "shard-00000.ends.npy: expected content with sha256"),
    "receipt": (
        patched("train/shard-00000.json", 15),
        "shard-00000.json: expected the receipt in the manifest",
    ),
    "id": (id_too_high, f"{SHARD}: expected ids below the tokenizer's 400, got 400; "),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD}: expected a file, got none; restore"),
    "extra": (
        lambda f: shutil.copy(f / SHARD, f / "train/shard-00001.npy"),
        "00001.npy: expected no file, .*; remove it",
    ),
    "no split folder": (lambda f: shutil.rmtree(f / "train"), f"{SHARD}: expected a file, got none; restore"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "manifest.json: expected a readable file, got No such",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "tokenizer.json: expected a readable file, got No such",
    ),
    "other tokenizer": (
        lambda f: tokenizer.save(invented(400), f),
        "tokenizer.json: expected fingerprint and size ",
    ),
    "no folder": (shutil.rmtree, "manifest.json: expected a readable file, got No such"),
    "half JSON": (lambda f: os.truncate(f / "manifest.json", 99), "manifest.json: expected JSON, got "),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json: expected a JSON object, got list; "),
    "version": (edited("manifest.json", lambda v: v.update(format=2)), "manifest.json: expected format 1, got 2; "),
    "no field": (
        edited("manifest.json", lambda v: v.pop("tokenizer_size")),
        "manifest.json: .*missing.*tokenizer_size",
    ),
    "new field": (edited("manifest.json", lambda v: v.update(color=1)), "manifest.json: .*color"),
    "type": (edited("manifest.json", lambda v: v.update(tokenizer_size="400")), "manifest.json: .*another type"),
    "no table": (
        edited("manifest.json", lambda v: v.update(splits=[])),
        "manifest.json: expected the fields of format 1, got",
    ),
    "shard type": (
        edited("manifest.json", lambda v: v["splits"]["train"].update(shards=[7])),
        "manifest.json: expected the fields of format 1, got",
    ),
    "totals": (
        edited("manifest.json", lambda v: v["splits"]["test"].update(tokens=1)),
        "in the shards of test, got ",
    ),
    "shard's tokenizer": (
        edited("manifest.json", lambda v: v["splits"]["test"]["shards"][0].update(tokenizer_identity="x")),
        r"manifest.json: expected tokenizer \w+ for test shard 0, got x; ",
    ),
    "split gone": (
        edited("manifest.json", lambda v: v["splits"].pop("train")),
        "expected documents in the split train, got them in validation, test; ",
    ),
    "split empty": (
        edited("manifest.json", lambda v: v["splits"].update(train=dict(tokens=0, documents=0, bytes=0, shards=[]))),
        "expected documents in the split train, got them in validation, test; ",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_with_its_damage(copy: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    read_whole(copy)
    damage(copy)
    with pytest.raises(InputError, match=message):
        read_whole(copy)


def test_several_problems_are_named_at_once(copy: Path) -> None:
    os.truncate(copy / SHARD, 1000)
    (copy / "train/shard-00000.json").unlink()
    with pytest.raises(InputError) as caught:
        whole(copy, "train")
    heads = [problem.split(": ")[0].removeprefix(f"{copy}/train/") for problem in caught.value.problems]
    assert heads == ["shard-00000.json", "shard-00000.npy"]


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(copy: Path) -> None:
    config = tiny(vocab_size=SIZE - 1)
    config = attrs.evolve(config, data=attrs.evolve(config.data, source=Shards(path=str(copy))))
    with pytest.raises(InputError, match=f"model.vocab_size: expected at least the tokenizer's {SIZE}, got {SIZE - 1}"):
        plan_data(config, copy)


def test_a_training_on_one_folder_is_planned_as_long_as_it_is(copy: Path) -> None:
    """The identity is the manifest's, whatever the steps: a run that goes on for longer resumes."""
    config = tiny(vocab_size=SIZE, batch_size=8, steps=70_000)
    config = attrs.evolve(config, data=attrs.evolve(config.data, source=Shards(path=str(copy))))
    data = plan_data(config, copy)
    assert data.stream.windows() == 8 * 70_000
    assert data.identity == hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()


def test_every_file_is_in_one_split_and_nothing_else_is(library: Path, prepared: Path) -> None:
    texts = {split: documents(prepared, split) for split in ("train", "validation", "test")}
    expected = [path.read_text(encoding="utf-8") for path in library.glob("part?/*.py")]
    expected += [path.read_text() for path in library.glob("twin*.py")]
    expected += ["stop = '<|endoftext|>'\n", "# -*- coding: latin-1 -*-\nname = 'caf\u00e9'\n"]
    assert Counter(text for split in texts.values() for text in split) == Counter(expected)
    assert all(texts.values()) and len(texts["train"]) > 0.9 * len(expected)
    for text in set(expected):
        assert sum(text in split for split in texts.values()) == 1
    receipt = read_manifest(prepared).splits["validation"]
    assert receipt.documents == len(texts["validation"])
    assert receipt.bytes == sum(len(text.encode()) for text in texts["validation"])


def test_files_fall_into_splits_by_content_the_same_everywhere() -> None:
    contents = [hashlib.sha256(str(index).encode()).digest() for index in range(20_000)]
    shares = Counter(split_of(content, validation=20_000, test=20_000) for content in contents)
    assert abs(shares["validation"] - 400) < 80 and abs(shares["test"] - 400) < 80
    assert shares.total() == 20_000
    splits = [split_of(content, validation=20_000, test=20_000) for content in contents[:200]]
    assert [index for index, split in enumerate(splits) if split == "validation"] == [6, 127]
    assert [index for index, split in enumerate(splits) if split == "test"] == [44, 177, 190]


def test_the_same_files_give_the_same_bytes_and_other_files_another_folder(
    library: Path, prepared: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(library, tmp_path / "moved"))
    again = stdlib.prepare_folder(moved, tmp_path / "cache", SIZE, quiet)
    assert again.name == prepared.name and digests(again) == digests(prepared)
    assert stdlib.prepare_folder(moved, tmp_path / "cache", SIZE + 1, quiet) != again
    (moved / "twin0.py").write_text("changed = 1\n")
    assert stdlib.prepare_folder(moved, tmp_path / "cache", SIZE, quiet) != again


def test_a_second_call_makes_nothing_and_tells_damage(
    library: Path, copy: Path, prepared: Path, tmp_path: Path
) -> None:
    folder = copy.rename(tmp_path / prepared.name)
    lines: list[str] = []
    assert stdlib.prepare_folder(library, tmp_path, SIZE, lines.append) == folder
    assert lines == [] and os.listdir(tmp_path) == [folder.name]
    for name in ("test/shard-00000.npy", "manifest.json"):
        os.truncate(folder / name, 10)
        with pytest.raises(InputError) as caught:
            stdlib.prepare_folder(library, tmp_path, SIZE, quiet)
        assert f"{folder / name}: " in caught.value.problems[0]
        assert f"{folder}: " in caught.value.problems[1] and "delete it" in caught.value.problems[1]


BUILD = """
import os, sys
from pathlib import Path
from nmoe.effects import terminal
from nmoe.effects.data import stdlib
terminal.PROGRESS_EVERY_S = 0.0
def say(line):
    print(line, flush=True)
    if line.startswith("train: 200 of"):
        if "--kill" in sys.argv:
            os.kill(os.getpid(), 9)
        if "--pause" in sys.argv:
            input()
print(stdlib.prepare_folder(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), say))
"""


def build(library: Path, cache: Path, *options: str) -> subprocess.Popen[str]:
    """Another process that prepares the folder; in the middle of writing it dies or waits for a line, if told to."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(library), str(cache), str(SIZE), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(library: Path, prepared: Path, tmp_path: Path) -> None:
    killed = build(library, tmp_path, "--kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [f".{prepared.name}.building", ".lock"]
    assert list(tmp_path.rglob("*shard*"))
    # The leftovers of another library's build go too.
    (tmp_path / ".0123456789abcdef.building").mkdir()
    folder = stdlib.prepare_folder(library, tmp_path, SIZE, quiet)
    assert digests(folder) == digests(prepared)
    assert sorted(os.listdir(tmp_path)) == [".lock", folder.name]


def test_processes_at_the_same_time_end_with_one_whole_folder(library: Path, prepared: Path, tmp_path: Path) -> None:
    first = build(library, tmp_path, "--pause")
    assert first.stdout is not None
    assert any(line.startswith("train: 200 of") for line in first.stdout)
    second = build(library, tmp_path)
    assert second.stdout is not None
    assert next(second.stdout) == f"{tmp_path}: another process prepares data; waiting for it\n"
    assert first.communicate("go on\n")[0].splitlines()[-1] == str(tmp_path / prepared.name)
    assert second.communicate()[0].splitlines() == [str(tmp_path / prepared.name)]
    assert digests(tmp_path / prepared.name) == digests(prepared)
    assert sorted(os.listdir(tmp_path)) == [".lock", prepared.name]


def test_a_failed_build_leaves_the_cache_as_it_was(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_record", full)
    with pytest.raises(OSError, match="No space left"):
        stdlib.prepare_folder(library, tmp_path, SIZE, quiet)
    assert os.listdir(tmp_path) == [".lock"]


def test_files_that_can_not_be_decoded_are_all_named(tmp_path: Path) -> None:
    root = tmp_path / "library"
    root.mkdir()
    (root / "a.py").write_bytes(b"x = 1\ny = 2\nz = '\xe9'\n")
    (root / "b.py").write_bytes(b"'\xff'\n")
    (root / "c.py").write_bytes(b"# coding: latin-99\n")
    (root / "d.py").write_bytes(b"fine = 1\n")
    with pytest.raises(InputError) as caught:
        stdlib.prepare_folder(root, tmp_path / "cache", SIZE, quiet)
    first, second, third = caught.value.problems
    assert first.startswith(f"{root}/a.py: expected text in utf-8, got byte 0xe9 at 17; ")
    assert second.startswith(f"{root}/b.py: ") and "byte 0xff at 1 " in second
    assert third.startswith(f"{root}/c.py: ") and "unknown encoding: latin-99" in third
    assert not (tmp_path / "cache").exists()


def test_too_little_text_and_a_cache_that_can_not_be_made_are_named(library: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "empty.py").write_text("")
    with pytest.raises(InputError, match="few: expected Python files with text, got none; "):
        stdlib.prepare_folder(tmp_path / "few", tmp_path / "cache", SIZE, quiet)
    (tmp_path / "few" / "one.py").write_text("one = 1\n")
    with pytest.raises(InputError, match="cache: expected a file for each split, got none of 1 for .*; "):
        stdlib.prepare_folder(tmp_path / "few", tmp_path / "cache", SIZE, quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: expected a folder to write to, got .*; set NMOE_HOME to another"):
        stdlib.prepare_folder(library, tmp_path / "file", SIZE, quiet)


def test_progress_says_files_size_time_and_what_is_left(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by one second whenever it is looked at, once a file: a line for every other file."""
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    lines: list[str] = []
    folder = stdlib.prepare_folder(library, tmp_path, SIZE, lines.append)
    sizes = [len(text.encode()) for text in documents(folder, "train")]
    total = sum(sizes)
    for what in ("tokenizer", "train"):
        printed = [line for line in lines if line.startswith(f"{what}: ") and " files, " in line]
        numbers = list(range(2, len(sizes), 2)) + [len(sizes)]  # the last is always said
        for line, num in zip(printed, numbers, strict=True):
            done = sum(sizes[:num])
            assert line == (
                f"{what}: {num} of {len(sizes)} files, {done / 1e6:.1f} of {total / 1e6:.1f} MB, {num} s, "
                f"about {num * (total - done) / done:.0f} s left"
            )


def test_the_standard_library_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    folder = stdlib.prepare(tmp_path, 512, quiet)
    assert folder.parent == tmp_path / "stdlib"
    splits = read_manifest(folder).splits
    assert sum(receipt.bytes for receipt in splits.values()) > 5_000_000
    assert splits["validation"].tokens > 10_000
    by_split = {split: set(documents(folder, split)) for split in splits}
    assert set(stdlib.held_out()) == by_split["validation"] | by_split["test"], (
        "what `nmoe eval` asks is not trained on"
    )
    assert not by_split["train"] & set(stdlib.held_out())
    texts = set.union(*by_split.values())
    assert Path(tarfile.__file__).read_text(encoding="utf-8") in texts
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in texts
