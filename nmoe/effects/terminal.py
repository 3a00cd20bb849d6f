"""The terminal: the only place that prints; tables and sparklines as text."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
UNBOUNDED = 1_000_000
"""Columns of a table's page: a line is never wrapped or cut, the terminal or the pager does that."""


def say(text: str) -> None:
    """Print lines for the person at the terminal, at once. Writes: standard output."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print lines about what went wrong. Writes: standard error."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned columns as text: the first `left` flush left, the others flush right; cells are taken literally."""
    # here: importing rich takes 30 ms, and most commands print no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, name in enumerate(head):
        grid.add_column(Text(name), justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"table: expected {len(head)} cells in a row, got {len(row)}")
        grid.add_row(*map(Text, row))
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
