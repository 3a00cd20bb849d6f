"""`run.json`: what a run is and whether it lives, replaced whole by a thread of its own.

A process that is killed leaves its last heartbeat; a reader that finds it older than a few `heartbeat_every_s` knows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nmoe.effects import files
from nmoe.effects.record.names import RUN


class Heart:
    """What `run.json` says next; set by the trainer, written by the thread."""

    def __init__(self, facts: Mapping[str, Any], now: Callable[[], str]) -> None:
        self._facts = dict(facts)
        self._now = now
        self._lock = threading.Lock()

    def update(self, **facts: Any) -> None:
        """Change facts. Writes: what the next beat says."""
        with self._lock:
            self._facts.update(facts)

    def beat(self, folder: Path) -> None:
        """Write now. Writes: run.json, whole or not at all."""
        with self._lock:
            facts = dict(self._facts)
        # outside the lock: a slow disk must not hold the trainer
        files.write_text(folder / RUN, json.dumps({**facts, "heartbeat": self._now()}) + "\n")


@contextmanager
def beating(folder: Path, heart: Heart, every_s: float, failed: Callable[[str], None]) -> Iterator[None]:
    """Beat at once, every `every_s` seconds, and at the end.

    failed  called the first time in a row that a beat cannot be written
    """
    done = threading.Event()

    def attempt(reported: bool) -> bool:
        try:
            heart.beat(folder)
        except OSError as error:
            if not reported:
                failed(f"{RUN}: expected to be written, got {error.strerror}; free space or fix permissions")
            return True
        return False

    def keep_beating() -> None:
        reported = attempt(False)
        while not done.wait(every_s):
            reported = attempt(reported)

    thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        attempt(False)
