"""The live footer on a terminal: progress, the loss as a sparkline, the last events. Elsewhere there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nmoe.effects.terminal import sparkline

WIDTH = 40
EVENTS = 3


class Footer:
    """What the footer shows; `rich` asks for it when it draws."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._losses: deque[float] = deque(maxlen=WIDTH)
        self._events: deque[str] = deque(maxlen=EVENTS)

    def step(self, step: int, loss: float) -> None:
        """Take one report."""
        self._step = step
        self._losses.append(loss)

    def event(self, fields: Mapping[str, Any]) -> None:
        """Take one event."""
        details = "  ".join(str(fields[key]) for key in ("rule", "message", "step", "error", "status") if key in fields)
        self._events.append(f"{fields['event']}  {details}")

    def __rich__(self) -> Text:
        share = self._step / self._steps
        filled = round(WIDTH * share)
        lines = [
            f"{'━' * filled}{'─' * (WIDTH - filled)}  {100 * share:5.1f} %  step {self._step}/{self._steps}",
            f"{sparkline(tuple(self._losses), WIDTH):<{WIDTH}}  loss {self._losses[-1]:.4f}" if self._losses else "",
            *self._events,
        ]
        return Text("\n".join(lines), style="dim", overflow="ellipsis", no_wrap=True)


@contextmanager
def shown(steps: int, *, wanted: bool, console: Callable[[], Console] = Console) -> Iterator[Footer]:
    """A footer under the lines that are printed, where standard output is a terminal and it is wanted."""
    footer, screen = Footer(steps), console()
    if not (wanted and screen.is_terminal):
        yield footer
        return
    with Live(footer, console=screen, refresh_per_second=4, transient=True):
        yield footer
