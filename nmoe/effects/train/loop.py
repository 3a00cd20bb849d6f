"""The loop of a training: validate, save, read, step, report, and what all ranks have to agree on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.device import signals
from nmoe.effects.parallel import exchange as exchanges
from nmoe.effects.parallel.ranks import Ranks
from nmoe.effects.train.evaluate import Held, evaluate, even
from nmoe.effects.train.session import Session
from nmoe.effects.train.step import State
from nmoe.pure.model.model import Batch
from nmoe.pure.watch.validations import Seen, validated


def train_until(session: Session, state: State, seen: Seen) -> tuple[State, Seen, bool]:
    """Take steps until the last one, a signal, or too many non-finite steps.

    Signals and the time to save are agreed on by all ranks, so that all take the same branch.

    returns  the state, its validations, and whether the steps were finite
    """
    config, train, ranks = session.config, session.config.train, session.runtime.ranks
    clock, report, saver, stop = session.clock, session.report, session.saver, session.stop
    validate = _validator(session)
    reported, skipped = state.step, int(state.skipped.item())
    clock.mark("start")
    while True:
        # Once in a while: a validation. At the head, so that a resumed run makes up for one its last attempt missed.
        due = state.step > 0 and (state.step % config.validation.every == 0 or state.step >= train.steps)
        if due and not seen.at(state.step) and not agreed(stop, ranks)[0]:
            held = validate(state)
            if held is not None:
                report.validation(state.step, held)
                seen = validated(seen, state.step, held.loss, held.bits_per_byte)
            clock.mark("validation")

        # Once in a while: a checkpoint.
        stopped, save = agreed(stop, ranks, saver.due(state.step))
        if state.step >= train.steps or stopped:
            return state, seen, True
        if save:
            saver.save(state, seen)
            clock.mark("checkpoint")

        # Every step.
        batch = session.read(state.cursor)
        clock.mark("data")
        state, metrics = session.step(state, batch)
        session.heartbeat.beat(state.step)
        saver.poll()

        # Once in a while: a line of metrics, the only place that waits for the device.
        stopped, save = agreed(stop, ranks, saver.due(state.step))
        last = state.step == train.steps or stopped
        # A state that no step changes any more is not worth a checkpoint.
        latched = save and int(metrics.skipped_in_row.item()) >= train.max_nonfinite_steps
        if last or latched or state.step == 1 or state.step % config.log.every == 0:
            before = skipped
            skipped, in_row = report.step(state, metrics, clock.split(), state.step - reported)
            reported = state.step
            if session.exchange is not None:
                exchanges.check(session.exchange)
            if skipped > before:
                session.log.event("nonfinite", step=state.step, new=skipped - before, in_row=in_row)
            if in_row >= train.max_nonfinite_steps:
                return state, seen, False
            clock.mark("log")


def _validator(session: Session) -> Callable[[State], Held | None]:
    """Loss on the validation split; None when a signal came meanwhile."""
    config, ranks, stop = session.config, session.runtime.ranks, session.stop
    batches = even(session.corpus.held, ranks)
    byte_lengths = _byte_lengths(session.corpus.tokenizer, config.model.vocab_size).to(session.runtime.device)

    def held() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            session.heartbeat.beat()
            if agreed(stop, ranks)[0]:
                return

    def validate(state: State) -> Held | None:
        result = evaluate(
            state.params,
            state.router_bias,
            session.env,
            config.model,
            held(),
            byte_lengths,
            chunk=config.train.loss_chunk,
            ranks=ranks,
        )
        return None if agreed(stop, ranks)[0] else result

    return validate


def _byte_lengths(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of each id the model has; ids the tokenizer does not know never occur."""
    known = tokenizers.byte_lengths(tokenizer)
    return torch.from_numpy(np.pad(known, (0, vocab_size - len(known))).astype(np.int64))


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
