"""Small programming problems, their known solutions, and calls whose results a program must give."""

from __future__ import annotations

import ast
import json
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Problem:
    """A function to be written. Arguments and results are values of JSON, tuples for arrays."""

    prompt: str  # head and docstring
    solution: str  # what follows the prompt
    calls: tuple[tuple[tuple[Any, ...], Any], ...]  # arguments, result

    @property
    def entry(self) -> str:
        """Name of the function."""
        return f"\n{self.prompt}".rpartition("\ndef ")[2].partition("(")[0]


def of_assertions(prompt: str, solution: str, test: str) -> Problem | None:
    """A problem of HumanEval, where each of its assertions compares a call of literals with a literal; else none.

    test  source with a function `check(candidate)`
    """
    checks = [x for x in ast.parse(test).body if isinstance(x, ast.FunctionDef) and x.name == "check"]
    calls: list[tuple[tuple[Any, ...], Any]] = []
    for line in (line for check in checks for line in check.body):
        match line:
            case ast.Assert(test=ast.Constant()) | ast.Expr(value=ast.Constant()) | ast.Pass():
                continue
            case ast.Assert(
                test=ast.Compare(
                    left=ast.Call(func=ast.Name(id="candidate"), args=args, keywords=[]),
                    ops=[ast.Eq()],
                    comparators=[result],
                )
            ):
                try:
                    call = (tuple(ast.literal_eval(x) for x in args), ast.literal_eval(result))
                    json.dumps(call)
                except (ValueError, TypeError):
                    return None
                calls.append(call)
            case _:
                return None
    return Problem(prompt=prompt, solution=solution, calls=tuple(calls)) if calls else None


def _problem(head: str, about: str, solution: str, *calls: tuple[tuple[Any, ...], Any]) -> Problem:
    body = "".join(f"    {line}\n" for line in solution.split("\n"))
    return Problem(prompt=f'def {head}:\n    """{about}"""\n', solution=body, calls=calls)


PROBLEMS = (
    _problem("add(a, b)", "Return the sum of a and b.", "return a + b", ((2, 3), 5), ((-7, 7), 0), ((90, 12), 102)),
    _problem("largest(a, b)", "Return the larger of a and b.", "return max(a, b)", ((2, 9), 9), ((4, 1), 4)),
    _problem("square(x)", "Return x times x.", "return x * x", ((7,), 49), ((-3,), 9), ((0,), 0)),
    _problem("is_even(n)", "Return True if n is even.", "return n % 2 == 0", ((4,), True), ((7,), False), ((0,), True)),
    _problem("last(items)", "Return the last of the items.", "return items[-1]", (((3, 8),), 8), (("xyz",), "z")),
    _problem("reverse(text)", "Return the text backwards.", "return text[::-1]", (("abc",), "cba"), (("",), "")),
    _problem(
        "count(items, value)",
        "Return how often the value is in the items.",
        "return sum(item == value for item in items)",
        *((((1, 2, 1), 1), 2), (((), 5), 0), ((("a", "b"), "b"), 1)),
    ),
    _problem(
        "join(words)", "Return the words with a blank between them.", 'return " ".join(words)', ((("a", "bc"),), "a bc")
    ),
    _problem(
        "total(numbers)",
        "Return the sum of the numbers.",
        "result = 0\nfor number in numbers:\n    result += number\nreturn result",
        *((((4, 5, 6),), 15), (((),), 0)),
    ),
    _problem(
        "factorial(n)",
        "Return the product of the numbers from 1 to n.",
        "return 1 if n < 2 else n * factorial(n - 1)",
        *(((0,), 1), ((5,), 120), ((10,), 3628800)),
    ),
    _problem(
        "fibonacci(n)",
        "Return the n-th Fibonacci number; the first two are 0 and 1.",
        "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        *(((0,), 0), ((1,), 1), ((10,), 55)),
    ),
    _problem(
        "unique(items)",
        "Return the items without repetitions, in their order.",
        "return list(dict.fromkeys(items))",
        *((((3, 1, 3, 2, 1),), (3, 1, 2)), (((),), ())),
    ),
)
