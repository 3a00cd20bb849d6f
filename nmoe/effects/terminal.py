"""The terminal: the only place that prints, which makes text from files printable; tables and sparklines as text."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from typing import TextIO

from nmoe.errors import printable

BARS = "▁▂▃▄▅▆▇█"
UNBOUNDED = 1_000_000
"""Columns of a table's page: a line is never wrapped or cut, the terminal or the pager does that."""


def say(text: str) -> None:
    """Print lines for the person at the terminal, at once. Writes: standard output."""
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Print lines about what went wrong. Writes: standard error."""
    _print(text, sys.stderr)


def _print(text: str, file: TextIO) -> None:
    """Print lines that cannot steer a terminal, with an escape for what its encoding lacks."""
    lines = "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    encoding = file.encoding or "utf-8"
    print(lines.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned columns as text: the first `left` flush left, the others flush right; a cell takes one line."""
    # here: importing rich takes 30 ms, and most commands print no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, name in enumerate(head):
        grid.add_column(Text(printable(name)), justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"table: expected {len(head)} cells in a row, got {len(row)}")
        grid.add_row(*(Text(printable(cell)) for cell in row))
    page = io.StringIO()
    Console(file=page, width=UNBOUNDED, color_system=None, legacy_windows=False).print(grid)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as at most `width` bars, each the mean of its share; `x` where one of them is not finite."""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    means = [
        math.fsum(values[a:b]) / (b - a) if all(map(math.isfinite, values[a:b])) else math.nan
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    finite = [mean for mean in means if math.isfinite(mean)]
    low = min(finite, default=0.0)
    span = (max(finite, default=0.0) - low) or 1.0
    top = len(BARS) - 1
    return "".join(BARS[round((mean - low) / span * top)] if math.isfinite(mean) else "x" for mean in means)
