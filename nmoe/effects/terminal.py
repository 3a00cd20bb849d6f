"""The terminal: the only place that prints, which makes text from files printable; tables and sparklines as text."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from nmoe.errors import printable
from nmoe.pure.units import plain

BARS = "▁▂▃▄▅▆▇█"
PROGRESS_EVERY_S = 2.0
UNBOUNDED = 1_000_000
"""Columns of a table's page: a line is never wrapped or cut, the terminal or the pager does that."""


def say(text: str) -> None:
    """Print lines for the person at the terminal, at once. Writes: standard output."""
    _print(text, sys.stdout)


def note(text: str) -> None:
    """Record lines that reach the screen only after its record is closed. Writes: the record of standard error."""
    if (record := getattr(sys.stderr, "record", None)) is not None:
        record(text)


def say_json(value: Any) -> None:
    """Print a value as JSON, for a program. Paths and times are text, and numbers that are not finite are the strings
    nan, inf and -inf, as in the files of a run. Writes: standard output.
    """
    say(json.dumps(plain(value), indent=2, default=str, allow_nan=False))


def stream(text: str) -> None:
    """Print a piece of a text, at once, without a line break after it. Writes: standard output."""
    _print(text, sys.stdout, end="")


def warn(text: str) -> None:
    """Print lines about what went wrong. Writes: standard error."""
    _print(text, sys.stderr)


def width() -> int | None:
    """Columns of the terminal that standard output is; None: it is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def _print(text: str, file: TextIO | None, end: str = "\n") -> None:
    """Print lines that cannot steer a terminal, with an escape for what its encoding lacks. Writes: its record too."""
    if file is None:  # closed before the start
        return
    lines = "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    # by its name: a live footer wraps the stream, and hands on what it does not know
    if (record := getattr(file, "record", None)) is not None:
        record(lines)
    encoding = file.encoding or "utf-8"
    print(lines.encode(encoding, "backslashreplace").decode(encoding), file=file, end=end, flush=True)


class _Output:
    """A stream whose reader may go: from then on what is written is dropped. `record` takes the lines that are said."""

    def __init__(self, stream: TextIO, gone: Callable[[], None], record: Callable[[str], None]) -> None:
        self._stream, self._gone = stream, gone
        self.record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._unless_gone(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # what is buffered has to go somewhere, or every later flush fails again, the interpreter's last one too
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._gone()


@contextmanager
def until_closed(gone: Callable[[], None], record: Callable[[str], None]) -> Iterator[None]:
    """Standard output and error that a closed pipe, a terminal that hung up or a full disk does not make fail.

    gone    called when standard output can no longer be written
    record  called with the lines that are said on either, without what steers a terminal
    """
    with ExitStack() as scope:
        # None: closed before the start, and print() drops what it gets
        if sys.stdout is not None:
            scope.enter_context(redirect_stdout(_Output(sys.stdout, gone, record)))  # pyright: ignore[reportArgumentType]
        if sys.stderr is not None:
            scope.enter_context(redirect_stderr(_Output(sys.stderr, lambda: None, record)))  # pyright: ignore[reportArgumentType]
        yield


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


class Progress:
    """Lines about long work: what is done, and how long the rest takes at the pace so far.

    Prints at most a line every `PROGRESS_EVERY_S` seconds, and one when everything is done.

    say    prints a line
    total  what there is to do, in any unit
    """

    def __init__(self, say: Callable[[str], None], total: float) -> None:
        self._say, self._total = say, total
        self._began = self._printed = time.monotonic()

    def at(self, done: float, text: str) -> None:
        """Print `text` with seconds taken and left, if it is time. `done` is of `total`."""
        now = time.monotonic()
        if not done or (now - self._printed < PROGRESS_EVERY_S and done < self._total):
            return
        self._printed, took = now, now - self._began
        self._say(f"{text}, {took:.0f} s, about {took * (self._total - done) / done:.0f} s left")
