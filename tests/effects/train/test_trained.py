"""`nmoe.load` and `nmoe.metrics`: a run as a script reads it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

import nmoe
from nmoe.config import Config
from nmoe.effects.checkpoint import verbs
from nmoe.effects.record.names import METRICS, WEIGHTS
from nmoe.effects.train import generate
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from tests.effects.train import trainings
from tests.effects.train.trainings import folder, train

TEXT = "def f(x):\n    return x"


@pytest.fixture(scope="module")
def run(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = trainings.config(tmp_path_factory.mktemp("trained"), "one", sources, 3)
    assert train(config)[0] == 0
    return config


def test_a_run_by_name_and_by_path_is_the_model_that_generates(run: Config, tmp_path: Path) -> None:
    """The likeliest next token is that of `nmoe generate --temperature 0`."""
    by_name, by_path = nmoe.load("one", root=run.run.root, device="cpu"), nmoe.load(folder(run), device="cpu")
    ids = by_name.encode(TEXT)
    assert by_name.decode(ids) == TEXT and by_name.config == run.model and by_name.checkpoint is None
    logits = by_name.forward(torch.tensor([ids]))
    assert logits.shape == (1, len(ids), by_name.tokenizer.size) and logits.dtype == torch.float32
    assert torch.equal(by_path.forward(torch.tensor([ids])), logits)
    network, tokenizer = generate.open_network(folder(run), "cpu")
    (text,) = generate.texts(
        network, tokenizer, [TEXT], num_tokens=1, sampling=Sampling(temperature=0.0), key=Key(0), cached=False
    )
    assert text == by_name.decode([int(logits[0, -1].argmax())])


def test_a_checkpoint_is_read_by_its_path_and_where_there_are_no_weights(run: Config, tmp_path: Path) -> None:
    first, *_, last = sorted((folder(run) / "checkpoints").glob("step-*"))
    assert verbs.export_weights(first, tmp_path / "first") == 0
    of_first, final = nmoe.load(first, device="cpu"), nmoe.load(folder(run), device="cpu")
    assert of_first.checkpoint == first and not torch.equal(of_first.params.head, final.params.head)
    for name in ("config.toml", "tokenizer.json"):
        (tmp_path / "first" / name).write_bytes((folder(run) / name).read_bytes())
    read = nmoe.load(tmp_path / "first", device="cpu")
    pairs = zip(nmoe.tree.leaves(read.params), nmoe.tree.leaves(of_first.params), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    hidden = folder(run) / "hidden"
    os.replace(folder(run) / WEIGHTS, hidden)
    try:
        newest = nmoe.load(folder(run), device="cpu")
    finally:
        os.replace(hidden, folder(run) / WEIGHTS)
    assert newest.checkpoint == last and torch.equal(newest.params.head, final.params.head)


def test_metrics_are_records_with_a_name_a_layer(run: Config) -> None:
    records = nmoe.metrics("one", root=run.run.root)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    assert records == nmoe.metrics(folder(run))
    assert all(isinstance(record["experts/cv/layer_01"], float) for record in records if "loss" in record)
    assert sum("validation/loss" in record for record in records) == 1


def test_a_number_that_is_not_finite_is_a_float(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / METRICS).write_text('{"step": 1, "loss": "nan", "grad_norm": "-inf"}\n{"step": 2, "lo')
    (record,) = nmoe.metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == -math.inf


def test_what_is_no_run_is_refused(run: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^run: expected the name of a run in .*, got 'one'; see `nmoe runs list"):
        nmoe.load("one", root=tmp_path)
    with pytest.raises(InputError, match=r"got 'onne'; did you mean one\?$"):
        nmoe.metrics("onne", root=run.run.root)
    for call in (nmoe.load, nmoe.metrics):
        with pytest.raises(InputError, match="expected config.toml of a run, got none"):
            call(tmp_path)
