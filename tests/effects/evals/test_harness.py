"""Our model class for lm-eval, by tasks of its own kinds whose data lies beside them: nothing is downloaded."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nmoe.cli import main
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.tokenizer import encoding
from nmoe.effects.evals import harness
from nmoe.effects.evals.judge import Row
from nmoe.effects.record.names import EVALS
from nmoe.effects.train import generate
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.model import forward
from tests import shapes
from tests.effects.checkpoint.hf_models import write

KINDS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
    "last": {"output_type": "loglikelihood", "doc_to_target": "{{choices[answer]}}"},
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}"},
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    },
}
METRICS = {
    "choice": ["acc", "acc_norm"],
    "last": ["perplexity", "acc"],
    "texts": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "written": ["exact_match"],
}
DOCUMENTS: list[dict[str, Any]] = [
    {"prompt": f"def f{n}():\n    return", "choices": [f" {n}", " None", " self.x"], "answer": n % 3} for n in range(6)
]


@pytest.fixture(scope="module")
def folder(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("harness") / "run"
    scales = {"embedding_scale": 3.0, "logit_scale": 0.7}
    write(made, shapes.config(vocab_size=300, moe=shapes.mixture(intermediate_size=8), max_positions=32, **scales))
    shutil.copy(sources / tokenizers.FILE, made)
    return made


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, one a kind of request, over documents beside them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tasks"
    made.mkdir()
    data = made / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, kind in KINDS.items():
        task: dict[str, Any] = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in METRICS[name]],
        }
        (made / f"{name}.yaml").write_text(json.dumps({**task, **kind}))  # JSON is YAML
    total = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["own_choice", "own_last"], "aggregate_metric_list": total}
    (made / "both.yaml").write_text(json.dumps(group))
    return made


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def test_the_requests_of_lm_eval(folder: Path) -> None:
    """A pair is tokenized as one text and costs the tokens after the prompt's; a rolling text each token once."""
    network, tokenizer = generate.open_network(folder, "cpu")
    model = harness.model_of(network, tokenizer)
    encoder, end = encoding(tokenizer), tokenizer.end_of_text

    def shares(ids: Sequence[int]) -> torch.Tensor:
        hidden, _ = forward(network.params, torch.tensor([ids]), network.router_bias, network.env, network.config)
        return (0.7 * hidden[0] @ network.params.head).log_softmax(-1)

    def expected(before: list[int], text: list[int]) -> float:
        logs = shares([end, *before, *text][:-1])[len(before) :]
        return logs.gather(-1, torch.tensor(text)[:, None]).sum().item()

    whole = encoder.encode_ordinary("def main(x):")
    before = encoder.encode_ordinary("def main")
    (first, _), (alone, _) = model.loglikelihood([request("def main", "(x):"), request("", "import os")])
    assert first == pytest.approx(expected(before, whole[len(before) :]), rel=1e-5)
    assert alone == pytest.approx(expected([], encoder.encode_ordinary("import os")), rel=1e-5)

    likeliest = int(shares([end, *before])[-1].argmax())
    other = (likeliest + 1) % 290
    asked = [(("", ""), before, [token]) for token in (likeliest, other)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(asked)] == [True, False]

    long = "import os\n" * 30
    ids = encoder.encode_ordinary(long)
    rows = [[end, *ids][start : start + 33] for start in range(0, len(ids), 32)]
    cost = sum(shares(row[:-1]).gather(-1, torch.tensor(row[1:])[:, None]).sum().item() for row in rows if len(row) > 1)
    assert model.loglikelihood_rolling([request(long)]) == [pytest.approx(cost, rel=1e-5)]

    settings: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 6}
    prompts = ["def ", "class ", ""]
    got = model.generate_until([request(prompt, settings) for prompt in prompts])
    greedy: dict[str, Any] = {"num_tokens": 6, "sampling": Sampling(), "key": Key(0)}
    assert got == generate.texts(network, tokenizer, prompts, stops=["\n"], **greedy)
    cut = model.generate_until([request(long, {"max_gen_toks": 5}), request("def ", settings)])
    kept = [encoder.encode_ordinary(long)[-28:]]
    (long_added,) = generate.continued(network, tokenizer, kept, num_tokens=5, sampling=Sampling(), key=Key(0))
    assert cut == [long_added, got[0]]


def test_every_kind_of_task_is_scored_and_kept(folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--device=cpu", f"--tasks={tasks}", "--lm-eval", "own_*"]) == 0
    kept = json.loads((folder / EVALS).read_text())
    shown = capsys.readouterr().out
    for name, metrics in METRICS.items():
        for metric in metrics:
            score = kept[f"lm-eval/own_{name}/{metric}"]
            assert score["count"] == len(DOCUMENTS) and math.isfinite(score["value"]), (name, metric)
            assert f"lm-eval/own_{name}/{metric} " in shown
    assert 0 < kept["lm-eval/own_texts/bits_per_byte"]["value"] < 20


def test_scores_of_an_oracle_and_of_a_liar(folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that know of each choice whether it is right."""
    encoder = encoding(tokenizers.load(folder))
    right = {document["prompt"] + document["choices"][document["answer"]] for document in DOCUMENTS}

    def knows(sign: float) -> Any:
        def scored(network: Any, read: Sequence[Row], count: int) -> list[tuple[float, bool]]:
            known = [encoder.decode(row.tokens[1:]) in right for row in read]
            return [(-sign if good else sign, good) for good in known]

        return scored

    for sign, value in ((1.0, 1.0), (-1.0, 0.0)):
        monkeypatch.setattr(harness, "scored", knows(sign))
        assert main(["eval", str(folder), "--device=cpu", f"--tasks={tasks}", "--lm-eval", "own_choice"]) == 0
        score = json.loads((folder / EVALS).read_text())["lm-eval/own_choice/acc"]
        assert (score["value"], score["error"], score["count"]) == (value, 0.0, 6)


def test_a_group_has_the_items_of_its_tasks(folder: Path, tasks: Path) -> None:
    assert main(["eval", str(folder), "--device=cpu", f"--tasks={tasks}", "--lm-eval", "both", "--limit=4"]) == 0
    kept = json.loads((folder / EVALS).read_text())
    counts = {name: kept[f"lm-eval/{name}/acc"]["count"] for name in ("own_choice", "own_last", "both")}
    assert counts == {"own_choice": 4, "own_last": 4, "both": 8}
    one, two, total = (kept[f"lm-eval/{name}/acc"]["value"] for name in counts)
    assert total == pytest.approx((one + two) / 2)


def test_what_cannot_be_asked_is_one_line(
    folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["eval", str(folder), "--device=cpu", f"--tasks={tasks}", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nmoe: ")]
        return line

    assert "--lm-eval: expected tasks of lm-eval, got no_such_task; " in refused("--lm-eval", "no_such_task")
    assert "--lm-eval: expected no --suite beside it" in refused("--suite=bits", "--lm-eval", "own_choice")
    assert "--tasks: expected --lm-eval beside it" in refused("--suite=bits")
    assert "--limit: expected at least 2, got 1" in refused("--limit=1", "--lm-eval", "own_choice")
    twice = refused("--lm-eval", "own_choice", "both")
    assert "--lm-eval: expected each task once, got Duplicate task 'own_choice': found in both " in twice
    (tasks / "data.py").write_text("def made(**about):\n    assert 'tokenizer' in about, 'no tokenizer'\n")
    synthetic = "task: synthetic\ncustom_dataset: !function data.made\ntest_split: test\noutput_type: generate_until\n"
    (tasks / "synthetic.yaml").write_text(synthetic)
    problem = "expected a task with its data, got AssertionError for synthetic: no tokenizer"
    assert problem in refused("--lm-eval", "synthetic")
    missing = (tasks / "choice.yaml").read_text().replace("documents.jsonl", "absent.jsonl")
    (tasks / "choice.yaml").write_text(missing)
    assert "expected a task with its data, got FileNotFoundError for own_choice" in refused("--lm-eval", "own_choice")
    odd = (tasks / "written.yaml").read_text().replace('"do_sample": false', '"num_beams": 4')
    (tasks / "written.yaml").write_text(odd)
    assert "expected generation_kwargs of until, " in refused("--lm-eval", "own_written")
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "expected the extra `eval`, got " in refused("--lm-eval", "own_choice")


def test_scores_without_a_standard_error_are_infinite_in_it() -> None:
    found: dict[str, Any] = {
        "results": {
            "t": {"alias": "t", "acc,strict": 0.5, "acc_stderr,strict": 0.1, "f,none": 1, "f_stderr,none": "N/A"}
        },
        "n-samples": {"t": {"original": 9, "effective": 4}},
    }
    scores = harness.scores_of(found)
    assert {name: (x.value, x.error, x.count) for name, x in scores.items()} == {
        "lm-eval/t/acc, strict": (0.5, 0.1, 4),
        "lm-eval/t/f": (1.0, math.inf, 4),
    }
