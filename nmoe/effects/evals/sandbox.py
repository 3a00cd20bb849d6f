"""Programs of a model are run apart from the machine, and their results compared here, where no program comes."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects.evals import jail
from nmoe.errors import InputError
from nmoe.pure.evals.problems import PROBLEMS, Problem
from nmoe.pure.evals.score import same

GRACE_S = 20.0
"""More than a program's own time, for starting Python twice on a busy machine."""


@attrs.frozen(kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20  # of address space
    output_bytes: int = 1 << 16


def grade(problem: Problem, program: str, limits: Limits = Limits()) -> str:
    """What became of a program: "passed", or why not: "wrong", "no result", "time", "output".

    It passes when each call gives the result that it has to. A program that ends by itself gives none.

    Raises:  InputError where the machine lets nobody make namespaces.
    """
    nonce = secrets.token_hex(16)  # of no key: a program could compute it
    calls = [list(arguments) for arguments, _ in problem.calls]
    outcome = _run(program, {"nonce": nonce, "entry": problem.entry, "calls": calls}, limits)
    if outcome["status"] != "ended":
        return str(outcome["status"])
    lines = [line for line in str(outcome["output"]).splitlines() if line.startswith(nonce)]
    results = _results(lines[-1].removeprefix(nonce)) if lines else []
    if len(results) != len(calls):
        return "no result"
    expected = json.loads(json.dumps([["value", result] for _, result in problem.calls]))
    return "passed" if all(map(same, results, expected)) else "wrong"


def check() -> None:
    """Run a program that is right.

    Raises:  InputError where it does not pass: no program would.
    """
    problem = PROBLEMS[0]
    if (got := grade(problem, problem.prompt + problem.solution)) != "passed":
        raise InputError(f"sandbox: expected a right program to pass, got {got!r}; leave the suite out on this machine")


def _results(text: str) -> list[Any]:
    try:
        answers = json.loads(text)
    except ValueError:
        return []
    return answers if isinstance(answers, list) else []


def _run(program: str, second: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """How a program ended, and what it printed. Raises: InputError as `grade`."""
    source = Path(jail.__file__).read_text(encoding="utf-8")
    command: Sequence[str] = (sys.executable, "-I", "-S", "-c", f"{source}\nmain()\n")
    with tempfile.TemporaryDirectory(prefix="nmoe-sandbox-") as folder:
        given = {"folder": folder, "first": {"program": program}, "second": second, **attrs.asdict(limits)}
        try:
            done = subprocess.run(
                command,
                input=f"{json.dumps(given)}\n",
                capture_output=True,
                text=True,
                env={},
                timeout=limits.seconds + GRACE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"status": "time", "output": ""}
    try:
        outcome = json.loads(done.stdout)
    except ValueError as error:
        problem = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        raise InputError(
            f"sandbox: expected Linux namespaces, got {problem}; leave the suite `programs` out on this machine"
        ) from error
    if outcome["status"] == "refused":
        raise InputError(
            f"sandbox: expected Linux namespaces, got {outcome['output']}; leave the suite `programs` out on this "
            "machine, or allow user namespaces"
        )
    return outcome
