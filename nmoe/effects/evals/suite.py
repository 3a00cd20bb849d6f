"""`nmoe eval`: the tasks, what a model scores in each, and the file of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nmoe.config.sections import Eval
from nmoe.effects.data import stdlib
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.effects.evals import human_eval, sandbox
from nmoe.effects.evals.judge import Judged, of_network
from nmoe.effects.record import scores as score_file
from nmoe.effects.terminal import say, say_json, table, warn
from nmoe.effects.train.generate import Network, open_network
from nmoe.effects.train.world import Judge
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.evals import items
from nmoe.pure.evals.items import Choice
from nmoe.pure.evals.problems import PROBLEMS, Problem, of_assertions
from nmoe.pure.evals.score import Score, chosen, mean, ratio, rows

KEY = Key(0).fold("evals")
PASSAGE_CHARS = 2000
"""Of a text that is one item: short enough for the error of bits per byte to be known from a few files."""

LIMIT = 200
"""Items of a task at most, unless the user says how many."""

PROGRAM_TOKENS = 96
"""Tokens of a generated program at most."""

HUMAN_EVAL_TOKENS = 384
"""Tokens of a generated solution at most."""

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
    return {"programs/passed": _passed(judged, PROBLEMS[:limit], PROGRAM_TOKENS)}


def human(judged: Judged, sources: Sequence[str], limit: int) -> Scores:
    """HumanEval: bits per byte of the known solutions; the share of programs that pass, where the tests are literal.

    Raises:  InputError without the package that ships the problems, and where there is no sandbox.
    """
    records = human_eval.records()
    solutions = [(record["prompt"], record["canonical_solution"]) for record in records]
    problems = [of_assertions(*pair, record["test"]) for pair, record in zip(solutions, records, strict=True)]
    literal = [problem for problem in problems if problem is not None]
    solutions = solutions[:limit]
    return {
        "human-eval/bits": ratio(judged.bits(solutions), [float(len(text.encode("utf-8"))) for _, text in solutions]),
        "human-eval/passed": _passed(judged, literal[:limit], HUMAN_EVAL_TOKENS),
    }


def _passed(judged: Judged, problems: Sequence[Problem], num_tokens: int) -> Score:
    sandbox.check()
    added = judged.extend([problem.prompt for problem in problems], num_tokens)
    outcomes: list[str] = []
    for problem, text in zip(problems, added, strict=True):
        outcomes.append(sandbox.grade(problem, problem.prompt + items.function_body(text)))
        judged.between()
    return mean([float(outcome == "passed") for outcome in outcomes])


Suite = Callable[[Judged, Sequence[str], int], Scores]
SUITES: Mapping[str, Suite] = MappingProxyType(
    {"bits": bits, "choices": choices, "probes": probes, "syntax": syntax, "programs": programs, "human-eval": human}
)


def main(folder: Path, suite: str, limit: int, device: str | None, as_json: bool = False) -> int:
    """Judge the model in `folder`, print its scores, and keep them there.

    suite    of `SUITES`, or "all": then one that this machine cannot run is said and left out
    limit    items of a task at most
    Writes:  `folder`/evals.json: earlier scores of the same tasks are replaced.
    """
    if limit < 2:
        raise InputError(f"--limit: expected at least 2, got {limit}; a standard error needs two items")
    score_file.read(folder)  # a damaged file is refused before the work
    judged = of_network(*open_network(folder, device))
    scores: Scores = {}
    for name, scored, seconds in _each(judged, suite, limit):
        (warn if as_json else say)(f"{name:<14} {seconds:.1f} s")
        scores |= scored
    kept = score_file.keep(folder, scores)
    if as_json:
        say_json(kept)
        return 0
    say(table(("task", "score", "std error", "items"), rows(scores), left=1))
    return 0


def judging(c: Eval) -> Judge:
    """What scores a model while it trains.

    Raises:  InputError for a suite that this machine cannot run.
    """
    if c.suite in ("programs", "human-eval"):
        sandbox.check()
    if c.suite == "human-eval":
        human_eval.records()

    def judge(network: Network, tokenizer: Tokenizer, between: Callable[[], None]) -> Scores:
        judged = of_network(network, tokenizer, between)
        return {task: score for _, scored, _ in _each(judged, c.suite, c.limit) for task, score in scored.items()}

    return judge


def _each(judged: Judged, suite: str, limit: int) -> Iterator[tuple[str, Scores, float]]:
    """Name, scores and seconds of each suite that was asked for."""
    sources = stdlib.held_out()
    for name in SUITES if suite == "all" else (suite,):
        began = time.monotonic()
        try:
            scored = SUITES[name](judged, sources, limit)
        except InputError as error:
            if suite != "all" or name not in ("programs", "human-eval"):
                raise
            warn(f"nmoe: {name}: left out: {error}")
            continue
        yield name, scored, time.monotonic() - began
