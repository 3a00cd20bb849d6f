"""The errors a person can fix: shown as one line each, exit code 2, no traceback."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text on one line: what is no print, as escapes, controls of direction and lone surrogates, becomes its escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class InputError(ValueError):
    """Bad input. Every problem reads `<where>: expected <what>, got <value>; <what to do>`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        """How it travels from a worker process: problem by problem."""
        return InputError, self.problems
