"""When a run is saved, and what a failed save does to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nmoe.config.sections import Checkpoint
from nmoe.effects.checkpoint.writer import Saved, SaveError, Writer
from nmoe.effects.record.log import Log
from nmoe.effects.terminal import say
from nmoe.effects.train.step import State
from nmoe.pure.checkpoint.pieces import Piece
from nmoe.pure.units import quantity
from nmoe.pure.watch.validations import Validations


class Saver:
    """Saves the state at the config's cadence, one save at a time, and reports what became of each.

    A failed save is reported as soon as it is known. With `checkpoint.on_error = "stop"` the next save point raises it,
    with "continue" the next save is tried as if nothing had been.
    """

    def __init__(
        self,
        settings: Checkpoint,
        writer: Writer,
        log: Log,
        *,
        pieces: Callable[[State], Sequence[Piece]],
        meta: Callable[[State, Validations], Mapping[str, Any]],
        saved_step: int,
    ) -> None:
        """saved_step: the step of the checkpoint this attempt continues from, 0 without one."""
        self._settings, self._writer, self._log = settings, writer, log
        self._pieces, self._meta = pieces, meta
        self._saved_step = saved_step
        self._since = time.monotonic()
        self._seconds = 0.0
        self._stall_s = 0.0
        self._failure: SaveError | None = None

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved by now."""
        every, minutes = self._settings.every, self._settings.minutes
        if step in (0, self._saved_step):
            return False
        return (every > 0 and step % every == 0) or 0 < 60 * minutes <= time.monotonic() - self._since

    def poll(self) -> None:
        """Report a save that has ended since the last call. Does not wait."""
        self._collect(self._writer.poll)

    def settle(self) -> None:
        """Wait for the save that is being written, and report what became of it."""
        self._collect(self._writer.wait)

    def save(self, state: State, validations: Validations) -> None:
        """Save the state, in the background when the config says so.

        Waits for a save that is still being written.

        Writes:  the checkpoint, and the log to disk, so that no checkpoint is newer than the lines before it.
        Raises:  SaveError as the class says.
        """
        began = time.monotonic()
        self._collect(self._writer.wait)
        self._raise_failure()
        self._log.sync()
        score = validations.last.loss if validations.last is not None and validations.at(state.step) else math.nan
        self._writer.save(
            self._pieces(state),
            step=state.step,
            meta=self._meta(state, validations),
            score=score if math.isfinite(score) else None,
        )
        self._saved_step, self._since, self._stall_s = state.step, began, time.monotonic() - began
        if not self._settings.asynchronous:
            self._collect(self._writer.wait)
            self._raise_failure()

    def finish(self, state: State, validations: Validations, within_s: float) -> None:
        """Save the state, if it is not saved, and wait until it is committed.

        within_s  time there is for it; a save that last took longer is not begun, what was committed before stays

        Raises:  SaveError when the state, or the one saved before it, is not committed.
        """
        self._collect(self._writer.wait)
        if self._failure is not None or state.step not in (0, self._saved_step):
            if self._seconds > within_s:
                self._log.event("checkpoint_skipped", step=state.step, takes_s=self._seconds, within_s=within_s)
                say(f"checkpoint     not saved: it takes {self._seconds:.0f} s, {within_s:.0f} s are left")
                return
            self._failure = None
            self.save(state, validations)
            self._collect(self._writer.wait)
        if self._failure is not None:
            raise self._failure

    def _collect(self, result: Callable[[], Saved | None]) -> None:
        """Report what became of a save. Writes: events, and whether one failed."""
        try:
            saved = result()
        except SaveError as error:
            self._failure, saved = error, None
            self._log.event("checkpoint_failed", step=self._saved_step, error="; ".join(error.problems))
            say(f"checkpoint     of step {self._saved_step} failed: {'; '.join(error.problems)}")
        if saved is not None:
            for problem in saved.undeleted:
                self._log.event("checkpoint_undeleted", step=saved.step, error=problem)
                say(f"checkpoint     of step {saved.step} is saved, an older one stays: {problem}")
            self._seconds = saved.seconds
            stall_s = self._stall_s if self._settings.asynchronous else time.monotonic() - self._since
            numbers = {"step": saved.step, "bytes": saved.bytes, "seconds": saved.seconds, "stall_s": stall_s}
            self._log.event("checkpoint", **numbers, checkpoint=saved.name)
            took = f"{quantity(saved.bytes, 'B')} in {saved.seconds:.2f} s, of which the steps waited {stall_s:.2f} s"
            say(f"checkpoint     of step {saved.step} saved, {took}")

    def _raise_failure(self) -> None:
        """Raise a failure that is known, when the config says so. Writes: that it is dealt with."""
        failure, self._failure = self._failure, None
        if failure is not None and self._settings.on_error == "stop":
            raise failure
