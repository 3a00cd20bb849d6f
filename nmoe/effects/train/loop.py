"""The loop of a training: validate, save, read, step, report, and what all ranks have to agree on meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from nmoe.config import Config
from nmoe.effects.device import gpu, signals
from nmoe.effects.parallel import exchange as exchanges
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.parallel.launch import RankHeartbeat
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.train.evaluate import Held
from nmoe.effects.train.report import Report
from nmoe.effects.train.save import Saver
from nmoe.effects.train.step import Metrics, State
from nmoe.pure.model.model import Batch
from nmoe.pure.watch.validations import Seen, validated


def train_until(
    config: Config,
    state: State,
    seen: Seen,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    read: Callable[[int], Batch],
    validate: Callable[[State], Held | None],
    saver: Saver,
    report: Report,
    clock: gpu.Clock,
    stop: signals.Stop,
    rank_heartbeat: RankHeartbeat,
    ranks: Ranks,
    exchange: Exchange | None,
) -> tuple[State, Seen, bool]:
    """Take steps until the last one, a signal, or too many non-finite steps.

    What decides how it goes on, a signal and the time to save, is agreed on by all ranks.

    validate  None when a signal came meanwhile
    returns   the state, its validations, and whether the steps were finite
    """
    train = config.train
    reported, skipped = state.step, int(state.skipped.item())
    clock.mark("start")
    while True:
        # At the head of the loop, so that a run that goes on makes up for what its last attempt did not come to.
        due = state.step > 0 and (state.step % config.validation.every == 0 or state.step >= train.steps)
        if due and not seen.at(state.step) and not agreed(stop, ranks)[0]:
            held = validate(state)
            if held is not None:
                report.validation(state.step, held)
                seen = validated(seen, state.step, held.loss, held.bits_per_byte)
            clock.mark("validation")
        stopped, save = agreed(stop, ranks, saver.due(state.step))
        if state.step >= train.steps or stopped:
            return state, seen, True
        if save:
            saver.save(state, seen)
            clock.mark("checkpoint")
        batch = read(state.cursor)
        clock.mark("data")
        state, metrics = step(state, batch)
        rank_heartbeat.beat(state.step)
        saver.poll()
        stopped, save = agreed(stop, ranks, saver.due(state.step))
        last = state.step == train.steps or stopped
        # A state that no step changes any more is not worth a checkpoint.
        latched = save and int(metrics.skipped_in_row.item()) >= train.max_nonfinite_steps
        if last or latched or state.step == 1 or state.step % config.log.every == 0:
            before = skipped
            skipped, in_row = report.step(state, metrics, clock.split(), state.step - reported)
            reported = state.step
            if exchange is not None:
                exchanges.check(exchange)
            if skipped > before:
                report.log.event("nonfinite", step=state.step, new=skipped - before, in_row=in_row)
            if in_row >= train.max_nonfinite_steps:
                return state, seen, False
            clock.mark("log")


def agreed(stop: signals.Stop, ranks: Ranks, *wishes: bool) -> list[bool]:
    """Whether any rank was asked to end, which all of them know from now on; and whether any has each wish.

    Writes: `stop`.
    """
    found = ranks.all_reduce_max([stop.signal or 0, *wishes])
    if found[0] and ranks.world.size > 1:
        stop.hear(found[0])
    return [bool(each) for each in found]


def settled(stop: signals.Stop, ranks: Ranks) -> signals.Stop:
    """How the run was asked to end, as all ranks see it; a signal that comes later changes nothing any more."""
    found = signals.Stop()
    if number := ranks.all_reduce_max([stop.signal or 0])[0]:
        found.hear(number)
    return found
