"""Scores and their errors, and what items are made of."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from nmoe.pure.core.key import Key
from nmoe.pure.evals import items
from nmoe.pure.evals.problems import PROBLEMS, Problem
from nmoe.pure.evals.score import Score, chosen, mean, ratio, rows, same

SOURCE = '''"""A module about pets."""
import os  # of the system


def feed(pet, food):
    """Give the pet its food and say so.

    >>> feed("cat", 1)
    'cat 1'
    >>> 1 / 0
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    """
    text = f"{pet} {food}"
    return text


class Pet:
    """Has a name."""

    def call(self):
        """Return the name of the pet in capitals."""
        return self.name.upper()
'''


def test_a_score_has_four_digits_whatever_it_is() -> None:
    """Perplexities of lm-eval are products: they may have any number of digits."""
    scores = {"bits": Score(value=2.0, error=math.inf, count=1), "perplexity": Score(value=5e54, error=1e6, count=2)}
    assert rows(scores) == [("bits", "2.0000", "inf", "1"), ("perplexity", "5e+54", "1e+06", "2")]


def test_mean_and_its_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    score = mean(values)
    assert score.value == 0.6 and score.count == 5
    assert score.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean([1.0]).error == math.inf
    with pytest.raises(ValueError, match="expected items, got none"):
        mean([])


def test_the_error_of_a_ratio_is_its_spread() -> None:
    """Against the standard deviation over many draws of the same size."""
    generator = Key(0).generator()
    sizes = torch.randint(10, 200, (4000, 50), generator=generator).double()
    bits = sizes * (2 + torch.rand(4000, 50, generator=generator).double())
    spread = (bits.sum(1) / sizes.sum(1)).std().item()
    errors = [ratio(a, b).error for a, b in zip(bits[:200].tolist(), sizes[:200].tolist(), strict=True)]
    assert statistics.mean(errors) == pytest.approx(spread, rel=0.05)
    assert ratio([4.0, 2.0], [2.0, 1.0]).value == 2.0 and ratio([4.0, 2.0], [2.0, 1.0]).error == 0


def test_equal_costs_are_a_guess() -> None:
    assert [chosen([3, 1, 1, 2], place) for place in range(4)] == [0, 0.5, 0.5, 0]
    assert chosen([1, 1, 1, 1], 2) == 0.25


def test_values_are_compared_as_json() -> None:
    assert same([1, {"a": 2, "b": 3}], [1, {"b": 3, "a": 2}])
    assert not any(same(*pair) for pair in ((1, True), (1, 1.0), ([1], [1, 1]), ("1", 1), (None, False)))


def test_kinds_of_text() -> None:
    kinds = items.by_kind(SOURCE)
    assert kinds["comments"] == "# of the system\n"
    assert kinds["doctests"].startswith(">>> feed(\"cat\", 1)\n'cat 1'\n")
    assert "Has a name." in kinds["documentation"] and "about pets" in kinds["documentation"]
    assert "about pets" not in kinds["code"] and "return self.name.upper()" in kinds["code"]
    assert items.by_kind("def f(:\n") == {"code": "def f(:\n"} and items.by_kind("") == {}


def test_a_function_without_its_docstring() -> None:
    (function,) = items.functions(SOURCE)
    assert function.head == "def feed(pet, food):\n"
    assert function.documentation == "Give the pet its food and say so."
    assert function.body == '    text = f"{pet} {food}"\n    return text\n'


def test_too_few_answers_make_no_choice() -> None:
    assert items.body_choices([SOURCE], Key(0)) == [] == items.doctest_choices([SOURCE], Key(0))


@pytest.mark.parametrize("name", ["copy", "induction", "arithmetic"])
def test_probes_have_one_right_answer(name: str) -> None:
    made = items.probes(name, 60, Key(0))
    assert made == items.probes(name, 60, Key(0)) and made[:9] == items.probes(name, 9, Key(0))
    assert {choice.answer for choice in made} == {0, 1, 2, 3}
    for choice in made:
        assert len(set(choice.choices)) == items.NUM_CHOICES
        right = choice.choices[choice.answer].strip()
        lines = choice.prompt.splitlines()
        if name == "arithmetic":
            assert int(right) == eval(choice.prompt.removeprefix(">>> "))
        elif name == "copy":
            words, begun = (line.split() for line in lines)
            assert right == words[len(begun)]
        else:
            assert f"{lines[-1]} {right}" in lines


def test_what_a_generated_program_is() -> None:
    assert items.whole_lines("a = 1\nb = (") == "a = 1\n" and items.whole_lines("a") == ""
    assert items.parses("a = 1\n") and not any(map(items.parses, ("a = (", "", "  \n", "a\0", "(" * 5000)))
    assert items.function_body("    x = 1\n\n    return x\nprint(1)\n    y\n") == "    x = 1\n\n    return x\n"
    assert items.function_body("return 1\n") == "" and items.function_body("") == ""


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.entry)
def test_problems_fit_their_solutions(problem: Problem) -> None:
    scope: dict[str, Any] = {}
    exec(problem.prompt + problem.solution, scope)
    assert all(same(scope[problem.entry](*arguments), result) for arguments, result in problem.calls)
