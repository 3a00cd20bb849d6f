"""The loop of a training: validate, save, read, step, report; and what happens at its end.

V = ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import attrs
import numpy as np
import torch
from torch import Tensor

from nmoe.effects.checkpoint.writer import SaveError
from nmoe.effects.data.tokenizer import Tokenizer, byte_lengths
from nmoe.effects.device import gpu, signals
from nmoe.effects.parallel import exchange
from nmoe.effects.parallel.ranks import Ranks, lost_ranks_named, on_all_ranks, with_rank_note
from nmoe.effects.terminal import say, warn
from nmoe.effects.train import zero
from nmoe.effects.train.evaluate import Held, evaluate, even
from nmoe.effects.train.outcome import EXIT_UNSAVED, end, network, record_failure, sample_on_the_way
from nmoe.effects.train.session import Session, Start
from nmoe.effects.train.step import State
from nmoe.errors import InputError
from nmoe.pure.evals.score import Score
from nmoe.pure.model.model import Batch, model_at
from nmoe.pure.watch.validations import Validations, validated

FOREVER_S = 1e9
"""Stands for no limit among the grace times that ranks compare, in seconds: in milliseconds it fits an i64."""


def train(session: Session, start: Start) -> int:
    """Take the steps, save the last state, save the weights; whatever ends the run, the log has an event of it.

    returns  exit code
    """
    rt = session.runtime
    validations = Validations() if start.restored is None else start.restored.validations
    try:
        with lost_ranks_named(rt.ranks):
            return take_steps_and_end(session, start.state, validations)
    except SaveError as error:
        record_failure(session, error)
        if rt.rank == 0:
            warn(f"nmoe: {error}")
        return EXIT_UNSAVED
    except BaseException as error:
        record_failure(session, error)
        with with_rank_note(f"rank {rt.rank}, step {session.heartbeat.step}" if rt.world > 1 else ""):
            raise


def take_steps_and_end(session: Session, state: State, validations: Validations) -> int:
    """Take the steps, save the last state, save the weights; the exit code."""
    rt, saver, stop, first = session.runtime, session.saver, session.stop, state.step
    state, validations, finite = train_until(session, state, validations)

    # At the end.
    session.heartbeat.rest()
    gather_(session, state)
    if finite:
        # in whole milliseconds, of the rank that has the least
        if state.step > first:
            say(f"checkpoint     writing the last one, of step {state.step}")
        left_ms = int(1000 * min(stop.left_s(session.config.checkpoint.grace_s), FOREVER_S))
        saver.finish(state, validations, -rt.ranks.all_reduce_max([-left_ms])[0] / 1000)
    saver.settle()
    return end(session, state, validations, finite, settled(stop, rt.ranks))


def train_until(session: Session, state: State, validations: Validations) -> tuple[State, Validations, bool]:
    """Take steps until the last one, a signal, or too many non-finite steps.

    All ranks agree on signals and on the time to save, so that all take the same branch.

    returns  the state, its validations, and whether the steps were finite
    """
    config, train, ranks = session.config, session.config.train, session.runtime.ranks
    clock, report, saver, stop = session.clock, session.report, session.saver, session.stop
    validate = _validator(session)
    reported, skipped, spikes = state.step, int(state.skipped.item()), int(state.spikes.item())
    clock.mark("start")
    while True:
        # Once in a while: a validation. At the head, so that a resumed run makes up for one its last attempt missed.
        due = state.step > 0 and (state.step % config.validation.every == 0 or state.step >= train.steps)
        if due and not validations.at(state.step) and not agreed(stop, ranks)[0]:
            gather_(session, state)
            held = validate(state)
            if held is not None:
                report.validation(state.step, held)
                validations = validated(validations, state.step, held.loss, held.bits_per_byte)
            clock.mark(gpu.APART)

        # Once in a while: an evaluation, at the head as a validation.
        every = config.eval.every
        due = every > 0 and state.step > 0 and (state.step % every == 0 or state.step >= train.steps)
        if due and validations.evaluated != state.step and not agreed(stop, ranks)[0]:
            gather_(session, state)
            scores = _scores(session, state)
            if scores is not None:
                report.evaluation(state.step, scores)
                validations = attrs.evolve(validations, evaluated=state.step)
            clock.mark(gpu.APART)  # no part of a step's time either

        # Once in a while: a checkpoint. All see here, before the next step, that one of them can not read its batch.
        refused = _refusal(session, state)
        clock.mark("data")
        stopped, save, bad = agreed(stop, ranks, saver.due(state.step), refused is not None)
        if bad:
            _refuse(ranks, refused)
        if state.step >= train.steps or stopped:
            return state, validations, True
        if save:
            saver.save(state, validations)
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
            before, earlier = skipped, spikes
            spikes, skipped, in_row = report.step(state, metrics, clock.split(), state.step - reported)
            reported = state.step
            if session.exchange is not None:
                exchange.check(session.exchange)
            if skipped > before:
                session.log.event("nonfinite", step=state.step, new=skipped - before, in_row=in_row)
            if spikes > earlier:
                session.log.event("spike", step=state.step, new=spikes - earlier)
            if in_row >= train.max_nonfinite_steps:
                return state, validations, False
            clock.mark("log")

        # Once in a while: a text. The last step's comes at the end, after its validation.
        if config.sample.every and state.step % config.sample.every == 0 and not last:
            gather_(session, state)
            sample_on_the_way(session, state)
            session.heartbeat.beat()
            clock.mark(gpu.APART)  # as a validation, no part of a step's time


def gather_(session: Session, state: State) -> None:
    """Complete the parameters, before anything but a step or a save reads them. Writes: values of `state`."""
    zero.gather_(session.blueprint.layouts, state.arenas, state.params, session.runtime.ranks)


def _refusal(session: Session, state: State) -> InputError | None:
    """Why data can not be read: of the next step, if there is one, or of shards that are verified beside the steps."""
    problem = session.refusal(state.cursor) if state.step < session.config.train.steps else None
    return problem or session.verification.problem


def _refuse(ranks: Ranks, problem: InputError | None) -> None:
    """End the run on every rank, because data can not be read on one.

    Raises:  InputError.
    """

    def act() -> None:
        if problem is not None:
            raise problem

    on_all_ranks(ranks, act)


def _validator(session: Session) -> Callable[[State], Held | None]:
    """Loss on the validation split; None when a signal came meanwhile."""
    config, ranks, stop = session.config, session.runtime.ranks, session.stop
    batches = even(session.corpus.held, ranks)
    lengths = _byte_lengths(session.corpus.tokenizer, config.model.vocab_size).to(session.runtime.device)

    def unless_stopped() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            session.heartbeat.beat()
            if agreed(stop, ranks)[0]:
                return

    def validate(state: State) -> Held | None:
        held = evaluate(
            state.params,
            state.router_bias,
            session.env,
            model_at(config.model, session.env, state.tokens),
            unless_stopped(),
            lengths,
            chunk=config.train.loss_chunk,
            ranks=ranks,
        )
        return None if agreed(stop, ranks)[0] else held

    return validate


class _Stopped(Exception):
    """A signal came while the model was evaluated."""


def _scores(session: Session, state: State) -> Mapping[str, Score] | None:
    """Scores of the tasks; None when a signal came meanwhile, or nobody judges."""
    config, ranks = session.config, session.runtime.ranks
    if session.judge is None:
        return None
    # Of these tokens all may choose the experts of one rank, which has room for `capacity` times the mean.
    share = min(1.0, config.parallel.room() / ranks.experts.size)
    tokens = int(share * config.train.microbatch_size * config.train.sequence_length)
    model = network(config, session.corpus, state, session.env)

    def between() -> None:
        session.heartbeat.beat()
        if agreed(session.stop, ranks)[0]:
            raise _Stopped

    try:
        together = attrs.evolve(model, ranks=ranks, batch_tokens=min(model.batch_tokens, tokens))
        return session.judge(together, session.corpus.tokenizer, between)
    except _Stopped:
        return None


def _byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """[V] i64: bytes of each id of the model; ids the tokenizer does not know never occur and have 0."""
    known = byte_lengths(tokenizer)
    return torch.from_numpy(np.pad(known, (0, vocab_size - len(known))).astype(np.int64))


def agreed(stop: signals.Stop, ranks: Ranks, *wishes: bool) -> list[bool]:
    """All-reduce (max) of signal and wishes: whether any rank got a signal, and whether any has each wish.

    Writes: `stop`, which has the signal on every rank from now on.
    """
    signal, *wanted = ranks.all_reduce_max([stop.signal or 0, *wishes])
    if signal and ranks.world.size > 1:
        stop.hear(signal)
    return [bool(signal), *map(bool, wanted)]


def settled(stop: signals.Stop, ranks: Ranks) -> signals.Stop:
    """The signal that ended the run, as all ranks see it; one that comes later changes nothing any more."""
    final = signals.Stop()
    if number := ranks.all_reduce_max([stop.signal or 0])[0]:
        final.hear(number)
    return final
