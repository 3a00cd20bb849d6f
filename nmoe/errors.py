"""The errors a person can fix: shown as one line each, exit code 2, no traceback."""

from __future__ import annotations

import shlex
import sys


def printable(text: str) -> str:
    """Text on one line: what is no print, as escapes, controls of direction and lone surrogates, becomes its escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def pip_install(extra: str) -> str:
    """The command that installs an extra into this environment, which has nmoe: elsewhere no index knows the name."""
    return f"{shlex.quote(sys.executable)} -m pip install 'nmoe[{extra}]'"


class InputError(ValueError):
    """Bad input. Every problem reads `<where>: expected <what>, got <value>; <what to do>`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        """How it travels from a worker process: problem by problem."""
        return InputError, self.problems
