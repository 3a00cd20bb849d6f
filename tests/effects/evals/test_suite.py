"""Models whose scores are known: an oracle, a unigram, a guesser; and what a network's bits are."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmoe.cli import main
from nmoe.effects.data import stdlib
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.evals import judge, suite
from nmoe.effects.evals.judge import Judged
from nmoe.effects.record.names import EVALS
from nmoe.effects.runs import show
from nmoe.effects.train import generate
from nmoe.errors import InputError
from nmoe.pure.evals import items
from nmoe.pure.evals.problems import PROBLEMS
from nmoe.pure.model.model import forward
from tests import shapes
from tests.effects.checkpoint.hf_models import write

ANIMALS = ("ant", "bee", "cat", "dog", "elk")
SOURCES = [
    f'''def {name}(count):
    """Return how many legs so many of {name} have.

    >>> {name}(1)
    {20 + place}
    """
    legs = {place} + count
    return legs * {place + 4}


def other_{name}(): return 1
'''
    for place, name in enumerate(ANIMALS)
]


def silent(prompts: Sequence[str], tokens: int) -> list[str]:
    return [""] * len(prompts)


def of_items(cost: Callable[[bool], float]) -> Judged:
    """A model that knows of each choice whether it is right."""
    made = [*items.body_choices(SOURCES, suite.KEY), *items.doctest_choices(SOURCES, suite.KEY)]
    made += [item for name in ("copy", "induction", "arithmetic") for item in items.probes(name, 80, suite.KEY)]
    right = {(item.prompt, item.choices[item.answer]) for item in made}
    return Judged(bits=lambda pairs: [cost(pair in right) for pair in pairs], extend=silent)


ORACLE = of_items(lambda right: 0.0 if right else 1.0)
LIAR = of_items(lambda right: 1.0 if right else 0.0)
GUESSER = Judged(bits=lambda pairs: [8.0 * len(text.encode()) for _, text in pairs], extend=silent)


def unigram(texts: Sequence[str]) -> Judged:
    """Bytes by how often they are in some texts, whatever comes before."""
    counts = Counter("".join(texts).encode())
    total = sum(counts.values())

    def bits(text: str) -> float:
        return sum(-math.log2(counts[byte] / total) for byte in text.encode())

    return Judged(bits=lambda pairs: [bits(text) for _, text in pairs], extend=silent)


def test_bits_of_known_models() -> None:
    """A uniform model has 8 bits a byte, a unigram of the text its entropy, one that knows it none."""
    assert {score.value for score in suite.bits(GUESSER, SOURCES, 100).values()} == {8.0}
    code = "".join(items.by_kind(source)["code"] for source in SOURCES)
    scores = suite.bits(unigram([code]), [code], 100)
    shares = [count / len(code.encode()) for count in Counter(code.encode()).values()]
    assert scores["bits/code"].value == pytest.approx(-sum(share * math.log2(share) for share in shares))
    knows = Judged(bits=lambda pairs: [0.0] * len(pairs), extend=silent)
    assert {score.value for score in suite.bits(knows, SOURCES, 100).values()} == {0.0}
    assert set(suite.bits(GUESSER, SOURCES, 100)) == {"bits/code", "bits/documentation", "bits/doctests"}


def test_choices_and_probes_of_known_models() -> None:
    for run, tasks in ((suite.choices, 4), (suite.probes, 6)):
        best, worst = run(ORACLE, SOURCES, 80), run(LIAR, SOURCES, 80)
        assert len(best) == len(worst) == tasks
        assert {(score.value, score.error) for score in best.values()} == {(1.0, 0.0)}
        assert {score.value for score in worst.values()} == {0.0}
    guesses = suite.probes(GUESSER, SOURCES, 80)
    for name in ("probes/copy", "probes/induction", "probes/arithmetic, length-normalised"):
        assert guesses[name].value == 0.25, name
    frequencies = suite.probes(unigram([" ".join(items.WORDS) + "0123456789\n"]), SOURCES, 80)
    for name in ("probes/copy", "probes/induction"):
        assert abs(frequencies[name].value - 0.25) < 4 * frequencies[name].error, name


def test_length_decides_only_where_it_is_not_normalised() -> None:
    """Bits in proportion to bytes: all choices of a task cost the same a byte, and the shortest is the cheapest."""
    scores = suite.choices(GUESSER, SOURCES, 80)
    assert scores["choices/doctests, length-normalised"].value == 0.25


def writing(program: Callable[[str], str]) -> Judged:
    return Judged(bits=lambda pairs: [0.0] * len(pairs), extend=lambda prompts, _: [program(x) for x in prompts])


def test_syntax_of_known_models() -> None:
    def score(text: str) -> float:
        return suite.syntax(writing(lambda _: text), SOURCES, 80)["syntax/functions"].value

    assert score("    return 1\n    x = (") == 1.0, "the last line is unfinished"
    assert [score(text) for text in ("", "    return (\n", "    Returns the legs.\n", "x = 1\n")] == [0.0] * 4


def test_programs_of_known_models() -> None:
    solutions = {problem.prompt: problem.solution for problem in PROBLEMS}
    oracle = writing(lambda prompt: solutions[prompt] + "\nprint('more')\n")
    assert suite.programs(oracle, [], 3)["programs/passed"].value == 1.0
    for text in ("    pass\n", "    import sys\n    sys.exit(0)\n", ""):
        assert suite.programs(writing(lambda _, text=text: text), [], 3)["programs/passed"].value == 0.0


@pytest.fixture(scope="module")
def folder(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of 300, as a run leaves them."""
    made = tmp_path_factory.mktemp("evals") / "run"
    scales = {"embedding_scale": 3.0, "logit_scale": 0.7}
    write(made, shapes.config(vocab_size=300, moe=shapes.mixture(intermediate_size=8), max_positions=32, **scales))
    shutil.copy(sources / tokenizers.FILE, made)
    return made


@torch.no_grad()
def test_bits_of_a_network(folder: Path) -> None:
    """Each token once: alone, after a prompt, in rows where a text is longer than the model, in any order of texts."""
    network, tokenizer = generate.open_network(folder, "cpu")
    encoder = tokenizers.encoding(tokenizer)
    judged = judge.of_network(network, tokenizer)
    first, second, long = "def main(x):", "\n    return x", "import os\n" * 30

    def expected(ids: list[int], counted: int) -> float:
        hidden, _ = forward(network.params, torch.tensor([ids[:-1]]), network.router_bias, network.env, network.config)
        shares = (0.7 * hidden[0] @ network.params.head).log_softmax(-1)
        cost = -shares.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] / math.log(2)
        return cost[len(cost) - counted :].sum().item()

    def ids(text: str) -> list[int]:
        return encoder.encode_ordinary(text)

    end = [tokenizer.end_of_text]
    got = judged.bits([("", long), (first, second), ("", first), ("", first + second)])
    assert ids(first) + ids(second) == ids(first + second)
    assert got[2] == pytest.approx(expected(end + ids(first), len(ids(first))), rel=1e-5)
    assert got[1] == pytest.approx(expected(end + ids(first + second), len(ids(second))), rel=1e-5)
    assert got[1] + got[2] == pytest.approx(got[3], rel=1e-5)
    whole = end + ids(long)
    rows = [whole[start : start + 33] for start in range(0, len(whole) - 1, 32)]
    assert len(rows) > 2
    assert got[0] == pytest.approx(sum(expected(row, len(row) - 1) for row in rows), rel=1e-5)
    (after,) = judged.bits([(long, second)])
    kept = (end + ids(long))[-(32 - len(ids(second))) - 1 :] + ids(second)
    assert after == pytest.approx(expected(kept, len(ids(second))), rel=1e-5)


class Seen(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(each.shape) for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        return out


def test_logits_are_made_in_chunks_of_what_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never of all tokens by all words, and of a prompt's tokens none."""
    network, tokenizer = generate.open_network(folder, "cpu")
    monkeypatch.setattr(judge, "LOSS_CHUNK", 4)
    with Seen() as seen:
        judge.of_network(network, tokenizer).bits([("import os", "\n    return x"), ("", "def main(x):")])
    counted = sum(
        len(tokenizers.encoding(tokenizer).encode_ordinary(text)) for text in ("\n    return x", "def main(x):")
    )
    words = network.params.head.shape[1]
    logits = [shape[0] for shape in seen.shapes if shape[1:] == (words,) and shape != network.params.head.shape]
    assert 0 < max(logits) <= 4 < counted
    assert all(words not in shape or len(shape) < 3 for shape in seen.shapes)


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are kept in the run folder, those of other suites stay, and `runs show` has them."""
    monkeypatch.setattr(stdlib, "held_out", lambda: SOURCES)

    def run(*arguments: str) -> int:
        return main(["eval", str(folder), "--device=cpu", *arguments])

    assert run("--suite=probes", "--limit=3") == 0
    first = json.loads((folder / EVALS).read_text())
    assert set(first["probes/copy"]) == {"value", "error", "count", "step", "at", "python"}
    assert run("--suite=bits", "--limit=3") == 0
    both = json.loads((folder / EVALS).read_text())
    assert {name: both[name] for name in first} == first and "bits/code" in both
    rows = show.read_scores(folder / EVALS)
    assert rows[0][0] == "probes/copy" and rows[0][3] == "3" and len(rows) == len(both)
    assert "bits/code" in capsys.readouterr().out
    assert run("--limit=1") == 2 and "--limit: expected at least 2, got 1" in capsys.readouterr().err
    assert run("--suite=none") == 2


def test_no_sandbox_leaves_programs_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise InputError("sandbox: expected Linux namespaces, got none; leave it out")

    monkeypatch.setattr(stdlib, "held_out", lambda: SOURCES)
    monkeypatch.setattr(suite.sandbox, "check", refuse)
    assert main(["eval", str(folder), "--device=cpu", "--limit=2"]) == 0
    assert "programs: left out: sandbox: expected Linux namespaces" in capsys.readouterr().err
    assert main(["eval", str(folder), "--device=cpu", "--suite=programs"]) == 2


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a": 1}', '{"a": {"value": "x", "error": 0, "count": 1, "at": ""}}']
)
def test_damaged_scores_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / EVALS).write_text(text)
    with pytest.raises(InputError, match=r"evals.json: expected the scores that `nmoe eval` writes"):
        show.read_scores(tmp_path / EVALS)
