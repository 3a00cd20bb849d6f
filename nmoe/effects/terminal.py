"""The terminal: the only place that prints, and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def say(text: str) -> None:
    """One line, or several, for the person at the terminal."""
    print(text, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )
