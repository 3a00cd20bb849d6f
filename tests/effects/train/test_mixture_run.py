"""A mixture as a person meets it: real folders of text, `nmoe data plan`, `nmoe run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from nmoe.config import dump
from nmoe.config.sections import Mixture, Shards
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store import shard_writer
from nmoe.effects.runs.viz import mixture
from nmoe.effects.runs.viz.index import open_index, poll
from nmoe.pure.data.order import source_at, turns
from tests.effects.train.tiny import tiny

ROOT = Path(__file__).parents[3]
LIBRARY = Path(os.__file__).parent
SOURCES = {"code": "email/*.py", "tests": "unittest/*.py", "docs": "asyncio/*.py"}
MIXTURE = "".join(
    f'[sources.{name}]\npath = "{name}"\npretrain = {part}\n' for name, part in zip(SOURCES, (3, 2, 1), strict=True)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packages of the standard library as shards, which no commit changes, and a config that mixes them."""
    root = tmp_path_factory.mktemp("mixture")
    texts = {name: [path.read_text() for path in sorted(LIBRARY.glob(glob))] for name, glob in SOURCES.items()}
    tokenizer = tokenizers.train([text for each in texts.values() for text in each], 300, lambda line: None)
    encoding = tokenizers.encoding(tokenizer)
    for name, each in texts.items():
        documents = [np.asarray(encoding.encode_ordinary(text), dtype=np.int64) for text in each]
        shard_writer.write(root / name, tokenizer, {"train": documents[1:], "validation": documents[:1]})
    (root / "mix.toml").write_text(MIXTURE + "[flows.dev]\ntokens = 6_400\n")
    config = tiny(vocab_size=304, batch_size=4, microbatch_size=2, steps=40, sequence_length=32, lr=3e-3)
    train = attrs.evolve(config.train, document_mask=True)
    data = attrs.evolve(config.data, source=Mixture(path="mix.toml"))
    (root / "tiny.toml").write_text(dump(attrs.evolve(config, train=train, data=data)))
    return root


def nmoe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nmoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_three_sources_train(folder: Path) -> None:
    """The same losses with and without reading ahead; the plan's fingerprint is in the record of the run."""
    planned = nmoe("data", "plan", "tiny.toml", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert {row["source"]: row["tokens"] for row in plan["reads"]} == {"code": 3200, "tests": 2144, "docs": 1056}

    losses: list[list[float]] = []
    for name, depth in (("ahead", 3), ("alone", 0)):
        done = nmoe("run", "tiny.toml", f"--run.name={name}", f"--data.prefetch={depth}", "--log.every=1", cwd=folder)
        assert done.returncode == 0, done.stderr
        run = folder / "runs" / name
        lines = [json.loads(line) for line in (run / "metrics.rank0.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert plan["fingerprint"] in (run / "provenance.toml").read_text()
        with open_index(folder / "runs", None) as index:
            poll(index)
            read = {each.name: each.read for each in mixture.mixture(index, name).sources}
        assert read == windows_of(plan, 40 * 4), "the dashboard knows what was read"
    assert losses[0] == losses[1] and len(losses[0]) >= 40
    assert losses[0][-1] < losses[0][0] - 0.5


def windows_of(plan: dict[str, Any], windows: int) -> dict[str, int]:
    """Tokens of each source in the first windows of 32 tokens of a plan of one stage, one turn after another."""
    names = [row["source"] for row in plan["reads"]]
    order = turns([row["tokens"] // 32 for row in plan["reads"]])
    counts = Counter(names[source_at(order, position)[0]] for position in range(windows))
    return {name: 32 * counts[name] for name in names}


def test_more_steps_than_the_flow_has_tokens_for(folder: Path) -> None:
    for verb in (("run",), ("data", "plan")):
        done = nmoe(*verb, "tiny.toml", "--train.steps=51", cwd=folder)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(
            "nmoe: train.steps: expected at most 50, which flow dev of mix.toml has tokens for, got 51; "
        )


def test_a_plan_reads_as_a_table(folder: Path) -> None:
    done = nmoe("data", "plan", "tiny.toml", cwd=folder)
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["stage", "source", "tokens", "share", "passes"]
    assert [row.split()[:2] for row in rows[:3]] == [["pretrain", name] for name in SOURCES]
    assert "40 steps of 4 x 32 tokens, 80.0 % of 6.4 k planned; 50 steps read them" in done.stdout


def test_one_folder_is_planned_and_read_as_a_mixture_of_one(folder: Path) -> None:
    config = tiny(vocab_size=304, batch_size=4, steps=3, sequence_length=32, source=Shards(path="code"))
    (folder / "one.toml").write_text(dump(config))
    planned = nmoe("data", "plan", "one.toml", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert [(row["source"], row["tokens"], row["share"]) for row in plan["reads"]] == [("shards", 3 * 4 * 32, 1.0)]
    done = nmoe("run", "one.toml", "--run.name=one", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert plan["fingerprint"] in (folder / "runs" / "one" / "provenance.toml").read_text()


def test_the_loader_is_timed_with_and_without_reading_ahead(folder: Path) -> None:
    done = nmoe("bench", "loader", "tiny.toml", "--steps=3", "--pause=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    opened, *handed = done.stdout.splitlines()
    assert opened.startswith("opened ")
    assert [line.partition(" ahead")[0] for line in handed] == [
        "handed     4 x 32 tokens, 0 batches",
        "handed     4 x 32 tokens, 2 batches",
    ]
    assert nmoe("bench", "loader", "tiny.toml", "--steps=0", cwd=folder).returncode == 2
