"""The errors a person can mend: shown as one line each, exit code 2, no traceback."""


class InputError(ValueError):
    """Bad input. Every problem reads `<where>: <what holds>, got <value>; <what to do>`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
