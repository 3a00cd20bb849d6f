"""`nmoe run` as a person meets it: real processes, real files, real signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import tomli

from nmoe.config import dump, load
from nmoe.config.sections import Config, Shards
from nmoe.effects import files
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store import shard_writer
from nmoe.effects.record import log
from nmoe.errors import InputError
from nmoe.pure.watch import metrics as schema
from tests.effects.train.tiny import tiny

ROOT = Path(__file__).parents[3]
VOCAB = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's own sources as shards, with a tokenizer of 300 trained on them."""
    texts = [path.read_text() for path in sorted((ROOT / "nmoe").rglob("*.py"))]
    tokenizer = tokenizers.train(texts, VOCAB, lambda line: None)
    encoding = tokenizers.encoding(tokenizer)
    documents = [np.asarray(encoding.encode_ordinary(text), dtype=np.int64) for text in texts]
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    splits = {"train": documents[4:], "validation": documents[:2], "test": documents[2:4]}
    shard_writer.write(folder, tokenizer, splits, tokens_per_shard=20_000)
    return folder


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def write(folder: Path, config: Config) -> Path:
    path = folder / "tiny.toml"
    path.write_text(dump(config))
    return path


def environment() -> Mapping[str, str]:
    """One thread, so that tests beside each other do not wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def nmoe(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nmoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        check=False,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_for(corpus: Path, **change: Any) -> Config:
    return tiny(vocab_size=VOCAB + 4, source=Shards(path=str(corpus)), **change)


def test_a_dense_model_trains_plans_and_is_continued(corpus: Path, workplace: Path) -> None:
    config = config_for(corpus, steps=4)
    path = write(workplace, attrs.evolve(config, model=attrs.evolve(config.model, num_dense_layers=3)))
    done = nmoe("run", path, "--run.name=dense", "--log.every=1", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "max/mean" not in done.stdout and "Warning" not in done.stderr
    done = nmoe("run", path, "--run.name=dense", "--train.steps=6", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert len(lines(workplace / "runs" / "dense" / "metrics.rank0.jsonl")) >= 5
    planned = nmoe("plan", path, cwd=workplace)
    assert planned.returncode == 0 and "(3 dense, 0 MoE)" in planned.stdout


def test_a_run_leaves_what_the_documents_say(corpus: Path, workplace: Path) -> None:
    config = config_for(corpus, steps=12, batch_size=4, microbatch_size=2, lr=3e-3)
    path = write(workplace, config)
    # Alerts are not this test's: whether an expert of the tiny model gets no token depends on the corpus, which is this
    # package's own text, and whether a step waits for data or is slower than the last on the machine.
    quiet = ("--log.alert_dead=1.0", "--log.alert_wait=1.0", "--log.alert_drop=1.0")
    done = nmoe("run", path, "--run.name=first", "--log.every=3", "--validation.every=5", *quiet, cwd=workplace)
    assert done.returncode == 0, done.stderr
    folder = workplace / "runs" / "first"
    assert {each.name for each in folder.iterdir()} == {
        "config.toml",
        "sources.toml",
        "provenance.toml",
        "code.diff",
        "tokenizer.json",
        "metrics.rank0.jsonl",
        "arrays.rank0.jsonl",
        "telemetry.rank0.jsonl",
        "run.json",
        "console.log",
        "events.jsonl",
        "checkpoints",
        "weights.safetensors",
    }
    resolved = load(folder / "config.toml", {}, ()).config
    assert resolved.log.every == 3 and resolved.model == config.model
    assert tomli.loads((folder / "sources.toml").read_text())["log.every"] == "command line --log.every=3"
    provenance = tomli.loads((folder / "provenance.toml").read_text())
    assert provenance["command"].startswith("nmoe run ") and provenance["versions"]["torch"].startswith("2.")
    assert provenance["tokenizer"] == tokenizers.load(corpus).identity

    metrics = lines(folder / "metrics.rank0.jsonl")
    logged = {schema.metric(name) for line in metrics for name in schema.names(line)}
    unlogged = {entry.name for entry in schema.METRICS if entry not in logged}
    evaluations = {"evaluation/bits/*", "evaluation/*", "evaluation_error/*"}
    absent = {"exchange/bytes", "exchange/bandwidth", "mtp/loss_*", *evaluations}
    assert None not in logged and unlogged == absent, "one rank, no MTP, no evaluation"
    steps = [line["step"] for line in metrics if "loss" in line]
    assert steps == [1, 3, 6, 9, 12]
    assert [line["step"] for line in metrics if "validation/loss" in line] == [5, 10, 12]
    last = [line for line in metrics if "loss" in line][-1]
    assert last["tokens_global"] == last["tokens_local"] == 12 * 4 * 16
    assert last["lr/expert"] == pytest.approx(2 * last["lr/dense"])
    assert last["experts"]["layer"] == [1, 2] and all(value >= 1 for value in last["experts"]["max_over_mean"])
    parts = sum(value for name, value in last.items() if name.startswith("time/"))
    assert parts == pytest.approx(last["step_s"], rel=1e-6), "the split adds up to the step"
    for name in ("auxiliary_loss", "grad_norm", "update_norm", "tokens_per_s", "mfu", "memory_bytes"):
        assert last[name] > 0, name
    assert min(last["experts"]["bias_min"]) < 0 < max(last["experts"]["bias_max"])

    events = lines(folder / "events.jsonl")
    names = ["start", "validation", "validation", "validation", "checkpoint", "sample", "end"]
    assert [event["event"] for event in events] == names
    assert events[-1]["status"] == "finished" and events[-1]["exit_code"] == 0
    assert last["loss"] < metrics[0]["loss"]
    assert "sample" in done.stdout and "bigram" in done.stdout and "eta" in done.stdout
    assert "checkpoint     of step 12 saved, " in done.stdout
    assert (folder / "console.log").read_text() == done.stdout, "all of the screen"

    told = nmoe("generate", folder, "--prompt", "def ", "--tokens", "8", "--seed", "3", cwd=workplace)
    again = nmoe("generate", folder, "--prompt", "def ", "--tokens", "8", "--seed", "3", cwd=workplace)
    assert told.returncode == 0 and told.stdout == again.stdout and told.stdout.startswith("def ")
    # logits / 1e-40 is infinite in fp32
    cold = nmoe("generate", folder, "--prompt", "x", "--temperature", "1e-40", cwd=workplace)
    refused(cold, "--temperature: expected")
    other = nmoe("generate", folder, "--prompt", "def ", "--tokens", "8", "--seed", "4", cwd=workplace)
    assert other.stdout != told.stdout

    taken = nmoe("run", path, "--run.name=first", "--train.resume=never", cwd=workplace)
    assert taken.returncode == 2 and "which exists" in taken.stderr and taken.stderr.count("\n") == 1
    assert lines(folder / "events.jsonl") == events, "a refused run leaves the old one alone"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_the_run_cleanly(corpus: Path, workplace: Path, number: signal.Signals, code: int) -> None:
    path = write(workplace, config_for(corpus, steps=100_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "nmoe", "run", str(path), "--run.name=long", "--log.every=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workplace,
        env=environment(),
    )
    metrics = workplace / "runs" / "long" / "metrics.rank0.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors == ""
    end = lines(workplace / "runs" / "long" / "events.jsonl")[-1]
    assert end["event"] == "end" and end["status"] == "interrupted"
    assert end["exit_code"] == code and end["signal"] == number.name
    assert lines(metrics)[-1]["step"] == end["step"]
    (kept,) = (workplace / "runs" / "long" / "checkpoints").glob("step-*")
    assert kept.name.startswith(f"step-{end['step']:08d}.")
    assert (workplace / "runs" / "long" / "weights.safetensors").exists() == (number == signal.SIGINT)
    more = ("--run.name=long", f"--train.steps={end['step'] + 2}")
    before = (workplace / "runs" / "long" / "console.log").read_text()
    done = nmoe("run", path, *more, cwd=workplace)
    assert (workplace / "runs" / "long" / "console.log").read_text() == before + done.stdout
    assert done.returncode == 0 and f"resume         at step {end['step']} from " in done.stdout, done.stderr


def test_nonfinite_steps_stop_the_run(corpus: Path, workplace: Path) -> None:
    """A learning rate that throws the weights to where the loss overflows."""
    path = write(workplace, config_for(corpus, steps=60, lr=4e29, max_nonfinite_steps=2))
    done = nmoe("run", path, "--run.name=burst", "--log.every=5", cwd=workplace)
    assert done.returncode == 5, done.stdout + done.stderr
    assert (
        "expected a finite loss and gradient norm, got 2 steps in a row" in done.stderr and done.stderr.count("\n") == 1
    )
    folder = workplace / "runs" / "burst"
    events = lines(folder / "events.jsonl")
    assert events[-1]["status"] == "failed" and events[-1]["exit_code"] == 5
    assert any(event["event"] == "nonfinite" for event in events)
    assert lines(folder / "metrics.rank0.jsonl")[-1]["loss"] in ("nan", "inf")


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for each in says:
        assert each in done.stderr, done.stderr


def test_bad_input_is_one_line_and_leaves_nothing(corpus: Path, workplace: Path) -> None:
    good = write(workplace, config_for(corpus))
    broken = workplace / "broken"
    shutil.copytree(corpus, broken)
    shard = next((broken / "train").glob("*.npy"))
    content = shard.read_bytes()
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (
            ("--run.device=cuda", "--precision.compute=bf16", "--model.attention.qk_rope_head_dim=8"),
            ("run.device", "expected a GPU"),
        ),
        ((f"--model.vocab_size={VOCAB - 1}",), (str(VOCAB - 1), str(VOCAB))),
        (("--gpus", "2"), ("batch_size: expected a multiple of ranks", "2 * 2")),
        ((f"--data.source.path={workplace / 'nowhere'}",), ("nowhere",)),
        (("--train.sequence_length=60000", "--model.max_positions=60000"), ("sequence_length",)),
    ]
    for arguments, says in cases:
        done = nmoe("run", good, *arguments, cwd=workplace)
        refused(done, *says)
        assert done.stderr.count("\n") == 1, done.stderr
    shard.write_bytes(content[:-1])
    refused(nmoe("run", good, f"--data.source.path={broken}", cwd=workplace), shard.name)
    flipped = bytearray(content)
    flipped[500] ^= 1
    shard.write_bytes(flipped)
    refused(nmoe("run", good, f"--data.source.path={broken}", cwd=workplace), shard.name)
    assert not (workplace / "runs").exists()


def test_a_batch_is_fitted_to_the_processes_that_share_it(corpus: Path, workplace: Path) -> None:
    path = write(workplace, config_for(corpus, steps=1, batch_size=2, microbatch_size=2))
    done = nmoe("run", path, "--gpus", "2", "--fit", "--run.name=fitted", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fitted         train.microbatch_size: 2 -> 1\n") == 1
    folder = workplace / "runs" / "fitted"
    assert tomli.loads((folder / "sources.toml").read_text())["train.microbatch_size"] == "--fit"
    assert load(folder / "config.toml", {}, ()).config.train.microbatch_size == 1


def test_an_unwritable_run_folder_is_refused(corpus: Path, workplace: Path) -> None:
    path = write(workplace, config_for(corpus))
    (workplace / "file").write_text("in the way")
    done = nmoe("run", path, f"--run.root={workplace / 'file' / 'runs'}", cwd=workplace)
    refused(done, "run.root", "choose another run.root")
    assert done.stderr.count("\n") == 1


def test_weights_of_another_model_are_refused(corpus: Path, workplace: Path) -> None:
    path = write(workplace, config_for(corpus, steps=1))
    assert nmoe("run", path, "--run.name=a", cwd=workplace).returncode == 0
    folder = workplace / "runs" / "a"
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("num_experts = 8", "num_experts = 16"))
    refused(nmoe("generate", folder, "--prompt", "x", cwd=workplace), "blocks.1.ffn.up", "F32 [16, 32, 2, 16]")
    (folder / "config.toml").write_text(text)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(nmoe("generate", folder, "--prompt", "x", cwd=workplace), "weights.safetensors")


def test_a_run_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second file."""
    write_text = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(
        InputError, match="^run.root: expected a folder with room for run folders, got No space left on device"
    ):
        log.create_folder(tmp_path, "x", {"a": "1", "b": "2"})
    assert list(tmp_path.iterdir()) == []
