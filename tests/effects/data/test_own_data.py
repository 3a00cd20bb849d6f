"""`nmoe data prep FOLDER`: mixed files as what they are, and the printed command, which trains when typed."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nmoe.cli import main
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.shards import documents

ROOT = Path(__file__).parents[3]
SYLLABLES = tuple(one + two for one in "bdfgklmnprst" for two in ("a", "e", "in", "o", "ur"))
SMALL = ("--train.steps=2", "--train.batch_size=2", "--train.microbatch_size=2", "--validation.tokens=256")


def sentence(number: int) -> str:
    """A text of its own for each number, with words of its own."""
    draw = random.Random(number)
    words = " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(8))
    return f"The fox number {number} runs over {words}.\n"


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of mixed files, in the current folder; all texts differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NMOE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "texts"
    (folder / "code").mkdir(parents=True)
    (folder / "story.txt").write_text("".join(map(sentence, range(1000))))
    (folder / "notes.md").write_text("# Notes\n" + "".join(map(sentence, range(1000, 1200))))
    (folder / "code" / "fox.py").write_text("def fox(n: int) -> int:\n    return n * 7919 % 1009\n")
    (folder / "code" / "package.json").write_text('{\n  "name": "fox"\n}\n')
    lines = "".join(json.dumps({"text": sentence(number), "id": number}) + "\n" for number in range(2000, 2100))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace("fox", "cat").encode()))
    (folder / "c.JSONL.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.replace("fox", "dog").encode()))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"A packed text.\n"))
    (folder / "e.md.zst").write_bytes(zstandard.ZstdCompressor().compress(b"Another packed text.\n"))
    pq.write_table(
        pa.Table.from_pylist([{"text": sentence(number)} for number in range(3000, 3050)]), folder / "f.parquet"
    )
    return folder


def nmoe(words: list[str], cwd: Path) -> str:
    """Standard output of a command line, which succeeds."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1"


def held(folder: Path) -> set[str]:
    """The documents of all splits."""
    manifest, stored = read_manifest(folder), tokenizers.load(folder)
    run = tokenizers.encoding(stored)
    every = (each for split in manifest.splits for each in documents(folder, manifest, stored, split))
    return {run.decode(tokens.tolist()) for tokens in every}


def test_the_tutorial_trains_on_a_folder_of_mixed_files(texts: Path, tmp_path: Path) -> None:
    """docs/own-data.md as written, but for fewer steps; its second command is the one that the first prints."""
    (block,) = re.findall(r"```\n(nmoe .*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.DOTALL)
    prep, run, generate = (shlex.split(line) for line in block.splitlines())
    said = nmoe(prep, tmp_path)
    assert shlex.split(said.splitlines()[-1]) == run
    nmoe([*run, *SMALL], tmp_path)
    assert "The " in nmoe([*generate, "--tokens", "4"], tmp_path)


def test_each_file_is_read_as_what_it_is(texts: Path, tmp_path: Path) -> None:
    assert main(["data", "prep", "texts", "out", "--vocab", "300", "--workers", "1"]) == 0
    got = held(tmp_path / "out")
    records = [sentence(number) for number in range(2000, 2100)]
    wanted = {
        *records,
        *(text.replace("fox", "cat") for text in records),
        *(text.replace("fox", "dog") for text in records),
        *map(sentence, range(3000, 3050)),
        *("A packed text.\n", "Another packed text.\n"),
        *((texts / name).read_text() for name in ("notes.md", "code/fox.py", "code/package.json")),
    }
    assert wanted <= got
    story = got - wanted
    assert all(len(part) <= 1 << 15 and part.endswith("\n") for part in story)
    assert len(story) == 3 and sum(map(len, story)) == (texts / "story.txt").stat().st_size


def test_a_large_document_is_reported_with_a_command_that_shows_it(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prep", "texts", "out", "--vocab", "300", "--workers", "1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("large "))
    split = "train" if " of train;" in line else "validation"
    share = int(re.search(r"(\d+)%", line)[1]) / 100  # pyright: ignore[reportOptionalSubscript]
    assert main([*shlex.split(line.partition("with: nmoe ")[2]), "--chars", "20"]) == 0
    tokens = int(re.search(r"(\d+) tokens", capsys.readouterr().out)[1])  # pyright: ignore[reportOptionalSubscript]
    whole = read_manifest(tmp_path / "out").splits[split].tokens
    assert share > 0.1 and abs(tokens / whole - share) < 0.01


def test_a_folder_of_small_documents_reports_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(2000)))
    assert (
        main(["data", "prep", str(tmp_path / "a.jsonl"), str(tmp_path / "o"), "--vocab", "300", "--workers", "1"]) == 0
    )
    said = capsys.readouterr().out
    assert "\nlarge " not in said and "\nnext " in said


def test_the_text_may_have_another_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"content": sentence(number)}) for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = ["data", "prep", str(tmp_path), str(tmp_path / "out"), "--vocab", "300", "--workers", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "a.jsonl: expected a text in text at byte 0, got nothing; its keys are content; name that of " in error
    assert "by --text-field, or" in error and error.endswith(" (line 1)\n")
    assert main([*command, "--text-field", "content"]) == 0
    assert held(tmp_path / "out") == set(map(sentence, range(100)))


def test_binary_files_are_passed_over_and_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "prep", "texts", "out", "--vocab", "300", "--workers", "1"]
    assert main(command) == 0
    without = held(tmp_path / "out")
    (texts / "code" / "logo[1].png").write_bytes(PNG)
    (texts / "data.bin").write_bytes(bytes(100))
    assert main([*command[:3], "other", *command[4:]]) == 0
    assert "passed over 2 binary files: code/logo[1].png, data.bin" in capsys.readouterr().out
    assert held(tmp_path / "other") == without


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "prep", "texts", "out", "--exclude", "code/*", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8 files" in said and "1 jsonl, 1 jsonl.gz, 1 jsonl.zst, 1 parquet, 2 text, 1 text.gz, 1 text.zst" in said
    assert "8192 tokens, trained on these files" in said and f"{tmp_path / 'out'} (new)" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_command_again_has_nothing_to_do_and_another_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "prep", "texts", "texts/out", "--workers", "1"]
    assert main([*command, "--vocab", "300"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--vocab", "300"]) == 0
    again = capsys.readouterr().out
    assert "prepared already" in again and "learnt" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert main([*command, "--vocab", "301"]) == 2
    assert (
        'expected tokenizer = "bpe-300" of the source, which it was begun with, got "bpe-301"'
        in capsys.readouterr().err
    )
    other = ["data", "prep", "texts/story.txt", "other", "--workers", "1", "--tokenizer", "texts/out/tokenizer.json"]
    assert main(other) == 0
    assert tokenizers.load(tmp_path / "other") == tokenizers.load(texts / "out")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nothing",), "nothing: expected a folder, a file or a source TOML, got nothing there"),
        (
            ("texts", "--tokenizer", "absent"),
            "tokenizer absent: expected one of those in .*: none, got one that is not",
        ),
        (("texts", "--vocab", "256"), "--vocab: expected at least 257"),
        (("texts", "--vocab", "300", "--tokenizer", "x"), "--vocab: expected it without --tokenizer, got both"),
        (("texts", "--vocab", "9999"), r"tokenizer: expected a vocabulary of at most \d+ tokens, .* got 9999"),
        (("x.toml", "--vocab", "300"), "--vocab: expected it with a folder, got x.toml"),
        (("archives",), r"a.tar.gz: expected a file of text or records, got an archive; unpack or exclude it"),
        (("pictures",), "pictures: expected files of text or records, got binary ones alone: a.png; name others"),
    ],
)
def test_what_can_not_be_prepared_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], expected: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    assert main(["data", "prep", arguments[0], "out", *arguments[1:], "--workers", "1"]) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert main(["data", "prep", "texts", "out", "--vocab", "300", "--workers", "1"]) == 2
    said = capsys.readouterr()
    assert "expected an empty folder, got mine in it" in said.err and "tokenizer:" not in said.out


def test_too_little_text_for_the_preset_is_said_in_the_place_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("".join(map(sentence, range(20))))
    assert (
        main(["data", "prep", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--vocab", "270", "--workers", "1"]) == 0
    )
    said = capsys.readouterr().out
    assert re.search(r"next +quickstart needs more than 128 tokens of \w+, there are 0; add text", said)
    assert "nmoe run" not in said
