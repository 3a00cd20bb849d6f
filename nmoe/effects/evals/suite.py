"""`nmoe eval`: the tasks, what a model scores in each, and the file of results."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.effects import files
from nmoe.effects.data import stdlib
from nmoe.effects.evals import sandbox
from nmoe.effects.evals.judge import Judged, of_network
from nmoe.effects.record.names import EVALS
from nmoe.effects.terminal import say, say_json, table, warn
from nmoe.effects.train.generate import open_network
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.evals import items
from nmoe.pure.evals.items import Choice
from nmoe.pure.evals.problems import PROBLEMS, Problem
from nmoe.pure.evals.score import Score, chosen, mean, ratio

KEY = Key(0).fold("evals")
PASSAGE_CHARS = 2000
"""Of a text that is one item: short enough for the error of bits per byte to be known from a few files."""

PROGRAM_TOKENS = 96
"""Tokens of a generated program at most."""

Scores = dict[str, Score]


def bits(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """Bits per byte of held-out texts, by kind of text."""
    passages: dict[str, list[str]] = {}
    for source in sources:
        for kind, text in items.by_kind(source).items():
            passages.setdefault(kind, []).extend(
                text[start : start + PASSAGE_CHARS] for start in range(0, len(text), PASSAGE_CHARS)
            )
    scores: Scores = {}
    for kind, texts in passages.items():
        kept = texts[:: -(-len(texts) // limit)]
        costs = judged.bits([("", text) for text in kept])
        scores[f"bits/{kind}"] = ratio(costs, [float(len(text.encode("utf-8"))) for text in kept])
    return scores


def choices(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """Choices made from documentation and doctests."""
    made = {
        "bodies": items.body_choices(sources, KEY),
        "doctests": items.doctest_choices(sources, KEY),
    }
    return _chosen(
        judged, "choices", {name: questions[:: -(-len(questions) // limit) or 1] for name, questions in made.items()}
    )


def probes(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """Choices that a circuit solves and no frequency of words does."""
    names = ("copy", "induction", "arithmetic")
    return _chosen(judged, "probes", {name: items.probes(name, limit, KEY) for name in names})


def _chosen(judged: Judged, suite: str, tasks: Mapping[str, Sequence[Choice]]) -> Scores:
    """The share of right choices by bits, and by bits a byte of the choice; tasks without items are left out."""
    scores: Scores = {}
    for name, questions in tasks.items():
        if not questions:
            continue
        costs = iter(judged.bits([(item.prompt, choice) for item in questions for choice in item.choices]))
        plain: list[float] = []
        normalised: list[float] = []
        for item in questions:
            own = [next(costs) for _ in item.choices]
            plain.append(chosen(own, item.answer))
            sizes = (len(choice.encode("utf-8")) for choice in item.choices)
            normalised.append(chosen([cost / size for cost, size in zip(own, sizes, strict=True)], item.answer))
        scores[f"{suite}/{name}"] = mean(plain)
        scores[f"{suite}/{name}, length-normalised"] = mean(normalised)
    return scores


def syntax(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """The share of held-out functions whose head a model continues with Python, its last unfinished line apart."""
    every = [function for source in sources for function in items.functions(source)]
    prompts = [f'{x.head}    """{x.documentation}"""\n' for x in every[:: -(-len(every) // limit) or 1]]
    if not prompts:
        return {}
    added = judged.extend(prompts, PROGRAM_TOKENS)
    good = [
        bool(items.function_body(text).strip()) and items.parses(prompt + items.whole_lines(text))
        for prompt, text in zip(prompts, added, strict=True)
    ]
    return {"syntax/functions": mean([float(x) for x in good])}


def programs(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """The share of small problems whose function a model writes, run in the sandbox.

    Raises:  InputError where there is no sandbox.
    """
    sandbox.check()
    problems: Sequence[Problem] = PROBLEMS[:limit]
    added = judged.extend([problem.prompt for problem in problems], PROGRAM_TOKENS)
    outcomes = [
        sandbox.grade(problem, problem.prompt + items.function_body(text))
        for problem, text in zip(problems, added, strict=True)
    ]
    return {"programs/passed": mean([float(outcome == "passed") for outcome in outcomes])}


Suite = Callable[[Judged, Sequence[str], int], Scores]
SUITES: Mapping[str, Suite] = MappingProxyType(
    {"bits": bits, "choices": choices, "probes": probes, "syntax": syntax, "programs": programs}
)


def main(folder: Path, suite: str, limit: int, device: str | None, as_json: bool = False) -> int:
    """Judge the model in `folder`, print its scores, and keep them there.

    suite    of `SUITES`, or "all": then one that this machine cannot run is said and left out
    limit    items of a task at most
    Writes:  `folder`/evals.json: earlier scores of the same tasks are replaced.
    """
    if limit < 2:
        raise InputError(f"--limit: expected at least 2, got {limit}; a standard error needs two items")
    earlier = _earlier(folder / EVALS)
    judged = of_network(*open_network(folder, device))
    scores: Scores = {}
    for name, scored, seconds in _each(judged, suite, limit):
        (warn if as_json else say)(f"{name:<14} {seconds:.1f} s")
        scores |= scored
    about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()}
    kept = {name: {**attrs.asdict(score), **about} for name, score in scores.items()}
    with files.refusing(folder / EVALS, "to write the scores"):
        files.write_text(folder / EVALS, json.dumps(earlier | kept, indent=2) + "\n")
    if as_json:
        say_json(kept)
        return 0
    rows = [(name, f"{x.value:.4f}", f"{x.error:.4f}", f"{x.count}") for name, x in scores.items()]
    say(table(("task", "score", "std error", "items"), rows, left=1))
    return 0


def _each(judged: Judged, suite: str, limit: int) -> Iterator[tuple[str, Scores, float]]:
    """Name, scores and seconds of each suite that was asked for."""
    sources = stdlib.held_out()
    for name in SUITES if suite == "all" else (suite,):
        began = time.monotonic()
        try:
            scored = SUITES[name](judged, sources, limit)
        except InputError as error:
            if suite != "all" or name != "programs":
                raise
            warn(f"nmoe: programs: left out: {error}")
            continue
        yield name, scored, time.monotonic() - began


def _earlier(path: Path) -> dict[str, Any]:
    """What the file of scores holds; nothing where there is none. Raises: InputError when it is damaged."""
    if not files.is_file(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, got {error}; delete the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; delete the file")
    return content
