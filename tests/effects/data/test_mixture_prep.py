"""`nmoe data prep MIXTURE`: one command for all sources, and the printed command, which trains when typed."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest

from nmoe.cli import main
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store.format import read_manifest

BYTES = tokenizers.make("bytes", tokenizers.PATTERN, [bytes([byte]) for byte in range(256)], end_of_text=256, size=257)
MIXTURE = """
[sources.poems]
path = "out/poems"
prepare = "poems.toml"
pretrain = 0.3

[sources.facts]
path = "out/facts"
prepare = "facts.toml"
pretrain = 0.7

[flows.dev]
tokens = 50_000
"""
SPLITS = "\n[splits]\nvalidation = 0.2\ntest = 0.0\n"


def text(number: int) -> str:
    draw = random.Random(number)
    return f"{number} " + "".join(draw.choices("abcdefgh ", k=200)) + "\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture of a folder of texts and a data set that is streamed; another folder is the current one."""
    monkeypatch.setenv("NMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    mix = tmp_path / "mix"
    for name in ("poems", "facts", "known"):
        (mix / name).mkdir(parents=True)
    tokenizers.save(BYTES, mix / "known")
    for number in range(60):
        (mix / "poems" / f"{number}.txt").write_text(text(number))
    lines = (json.dumps({"text": text(number)}) + "\n" for number in range(1000, 1200))
    (mix / "facts" / "facts.jsonl").write_text("".join(lines))
    known = 'tokenizer = "known/tokenizer.json"\n'
    (mix / "poems.toml").write_text(f'{known}[input]\nkind = "files"\npaths = ["poems"]\n{SPLITS}')
    facts = f'{known}max_tokens = 20_000\n[input]\nkind = "stream"\ndataset = "{mix / "facts"}"\n{SPLITS}'
    (mix / "facts.toml").write_text(facts)
    (mix / "mixture.toml").write_text(MIXTURE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return mix


def test_one_command_prepares_every_source_and_its_last_line_trains(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "prep", "../mix/mixture.toml", "--workers", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    poems, facts = (read_manifest(home / "out" / name) for name in ("poems", "facts"))
    assert sum(split.documents for split in poems.splits.values()) == 60
    assert 19_000 < facts.splits["train"].tokens <= 20_000
    run = shlex.split(said.splitlines()[-1])
    assert run[:3] == ["nmoe", "run", "quickstart"] and "--train.steps=24" in run
    small = ("--train.batch_size=2", "--train.microbatch_size=2", "--validation.tokens=256")
    assert main([*run[1:], *small, "--train.steps=2"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.count("prepared already") == 2 and again.splitlines()[-1] == said.splitlines()[-1]


def test_a_dry_run_says_what_each_source_reads_and_writes_and_does_neither(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home.rglob("*"))
    assert main(["data", "prep", "../mix/mixture.toml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "60 files, 0.0 MB: 60 text" in said and f"would write {home / 'out' / 'poems'} (new)" in said
    assert f"records of {home / 'facts'}, split train, streamed, until train has 20000 tokens" in said
    assert sorted(home.rglob("*")) == before


def test_what_is_wrong_with_any_source_is_said_before_one_is_prepared(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "other").mkdir()
    other = tokenizers.make("other", ".", [bytes([byte]) for byte in range(256)], end_of_text=256, size=257)
    tokenizers.save(other, home / "other")
    (home / "facts.toml").write_text((home / "facts.toml").read_text().replace("known/", "other/"))
    more = '[sources.more]\npath = "more"\npretrain = 0\n[sources.gone]\npath = "g"\nprepare = "g.toml"\npretrain = 0\n'
    (home / "mixture.toml").write_text(MIXTURE + more)
    assert main(["data", "prep", "../mix/mixture.toml"]) == 2
    said = capsys.readouterr().err
    assert "sources.facts: expected the tokenizer of poems" in said
    assert "sources.more: expected a prepared folder more, or its source, got neither; write prepare = " in said
    assert "sources.gone: ../mix/g.toml: expected" in said
    assert not (home / "out").exists()


def test_a_mixture_takes_no_folder_and_a_source_needs_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prep", "../mix/mixture.toml", "out"]) == 2
    assert "out: expected no folder behind a mixture" in capsys.readouterr().err
    assert main(["data", "prep", "../mix/poems.toml"]) == 2
    assert "expected a folder OUT to write, got none" in capsys.readouterr().err
    assert main(["data", "prep", "../mix/mixture.toml", "--vocab", "300"]) == 2
    assert "--vocab: expected it with a folder, got ../mix/mixture.toml" in capsys.readouterr().err
