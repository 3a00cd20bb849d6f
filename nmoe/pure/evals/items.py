"""What a model is asked: texts, choices, prompts; made from source texts and from keys, the same on every machine."""

from __future__ import annotations

import ast
import doctest
import inspect
import tokenize
from collections.abc import Iterator, Sequence
from types import MappingProxyType

import attrs
import torch

from nmoe.pure.core.key import Key

NUM_CHOICES = 4
CHARS = (20, 600)
"""Shortest and longest docstring or body of a choice: a shorter one says nothing, a longer one no small model sees."""


@attrs.frozen(kw_only=True)
class Choice:
    """A prompt and continuations of which one is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@attrs.frozen(kw_only=True)
class Function:
    """A function of a source text, its docstring taken out."""

    head: str  # up to the colon
    documentation: str
    body: str  # lines, indented


def by_kind(source: str) -> dict[str, str]:
    """A Python source by kind of text: code, comments, documentation (docstrings), doctests. Empty kinds are left out.

    A source that this Python cannot parse is code.
    """
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return {"code": source}
    lines = source.splitlines(keepends=True)
    documentation: list[str] = []
    for node in _documented(tree):
        documentation.append(f"{ast.get_docstring(node)}\n")
        string = node.body[0]
        for place in range(string.lineno - 1, string.end_lineno or string.lineno):
            lines[place] = ""
    doctests = [f">>> {example.source}{example.want}" for text in documentation for example in _examples(text)]
    comments = [f"{token.string}\n" for token in tokens if token.type == tokenize.COMMENT]
    parts = {"code": lines, "comments": comments, "documentation": documentation, "doctests": doctests}
    return {kind: "".join(texts) for kind, texts in parts.items() if "".join(texts).strip()}


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            yield node


def _examples(text: str) -> list[doctest.Example]:
    try:
        return doctest.DocTestParser().get_examples(text)
    except ValueError:
        return []


def functions(source: str) -> list[Function]:
    """Functions at the outermost level with a docstring and something to do."""
    parsed: list[Function] = []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return parsed
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        documentation = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not isinstance(node, ast.FunctionDef) or not documentation or len(node.body) < 2:
            continue
        head = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        body = "".join(lines[(node.body[0].end_lineno or 0) : node.end_lineno])
        short = inspect.cleandoc(documentation).partition("\n\n")[0]
        if all(CHARS[0] <= len(text) <= CHARS[1] for text in (short, body)) and head.endswith(":\n"):
            parsed.append(Function(head=head, documentation=short, body=body))
    return parsed


def body_choices(sources: Sequence[str], key: Key) -> list[Choice]:
    """Which body a function's head and docstring have: its own, or that of another function."""
    every = [function for source in sources for function in functions(source)]
    prompts = [f'{x.head}    """{x.documentation}"""\n' for x in every]
    return _choices(prompts, [x.body for x in every], key.fold("bodies"))


def doctest_choices(sources: Sequence[str], key: Key) -> list[Choice]:
    """What an interactive session of a docstring prints: what its documentation says, or what another one does."""
    texts = [by_kind(source).get("documentation", "") for source in sources]
    every = [example for text in texts for example in _examples(text) if example.want and not example.exc_msg]
    kept = [x for x in every if "<BLANKLINE>" not in x.want and len(x.want) <= CHARS[1]]
    return _choices([f">>> {x.source}" for x in kept], [x.want for x in kept], key.fold("doctests"))


def _choices(prompts: Sequence[str], answers: Sequence[str], key: Key) -> list[Choice]:
    """A choice for each prompt among its answer and others' that differ; none where there are too few."""
    made: list[Choice] = []
    for place, (prompt, right) in enumerate(zip(prompts, answers, strict=True)):
        others = list(dict.fromkeys(answer for answer in answers if answer != right))
        if len(others) >= NUM_CHOICES - 1:
            drawn = torch.randperm(len(others), generator=key.fold(place).generator())[: NUM_CHOICES - 1]
            made.append(_placed(prompt, right, [others[index] for index in _numbers(drawn)], key.fold(place, "answer")))
    return made


def _placed(prompt: str, right: str, wrong: Sequence[str], key: Key) -> Choice:
    """The right answer at a random place among the wrong ones."""
    (answer,) = _draws(key, len(wrong) + 1, 1)
    return Choice(prompt=prompt, choices=(*wrong[:answer], right, *wrong[answer:]), answer=answer)


def _draws(key: Key, below: int, count: int) -> list[int]:
    return _numbers(torch.randint(below, (count,), generator=key.generator()))


def _numbers(drawn: torch.Tensor) -> list[int]:
    return [int(number) for number in drawn]


WORDS = ("ant", "bee", "cat", "cow", "dog", "eel", "elk", "emu", "fox", "gnu", "hen", "jay", "owl", "pig", "rat", "yak")
"""Short words that name nothing of Python's."""


def probes(name: str, count: int, key: Key) -> list[Choice]:
    """Choices that a circuit solves and no frequency of words does.

    name   copy: the next word of a list that is read a second time; induction: what followed the same word before;
           arithmetic: the sum of two numbers below 100
    """
    return [_PROBES[name](key.fold(name, place)) for place in range(count)]


def _copy(key: Key) -> Choice:
    words = [WORDS[index] for index in _numbers(torch.randperm(len(WORDS), generator=key.fold("words").generator()))]
    (at,) = _draws(key.fold("at"), 6, 1)
    wrong = [word for word in words[:8] if word != words[at + 1]][: NUM_CHOICES - 1]
    prompt = f"{' '.join(words[:8])}\n{' '.join(words[: at + 1])}"
    return _placed(prompt, f" {words[at + 1]}", [f" {word}" for word in wrong], key.fold("answer"))


def _induction(key: Key) -> Choice:
    words = [WORDS[index] for index in _numbers(torch.randperm(len(WORDS), generator=key.fold("words").generator()))]
    pairs = list(zip(words[:5], words[5:10], strict=True))
    (at,) = _draws(key.fold("at"), len(pairs), 1)
    prompt = "".join(f"{left} {right}\n" for left, right in pairs) + pairs[at][0]
    wrong = [f" {right}" for _, right in pairs if right != pairs[at][1]][: NUM_CHOICES - 1]
    return _placed(prompt, f" {pairs[at][1]}", wrong, key.fold("answer"))


def _arithmetic(key: Key) -> Choice:
    a, b, *shifts = _draws(key.fold("numbers"), 100, 8)
    wrong = dict.fromkeys(a + b + shift % 20 - 10 for shift in (*shifts, 11, 12, 13))
    others = [f"{number}\n" for number in wrong if number not in (a + b,) and number >= 0]
    return _placed(f">>> {a} + {b}\n", f"{a + b}\n", others[: NUM_CHOICES - 1], key.fold("answer"))


_PROBES = MappingProxyType({"copy": _copy, "induction": _induction, "arithmetic": _arithmetic})


def whole_lines(text: str) -> str:
    """A program that was cut anywhere, without its last, unfinished line."""
    return text[: text.rfind("\n") + 1]


def parses(program: str) -> bool:
    """Whether a text is Python; an empty one is not."""
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(program.strip())


def function_body(text: str) -> str:
    """The lines of a continuation that belong to the function it continues: up to one that is not indented."""
    lines = text.splitlines(keepends=True)
    ends = (place for place, line in enumerate(lines) if line.strip() and not line[0].isspace())
    return "".join(lines[: next(ends, len(lines))])
