"""What a run reports at its ends: the checkpoint it resumes from; at the end its status, exit code and a sample.

Every rank computes it; the first one prints it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs

from nmoe.config import Config
from nmoe.effects.checkpoint import weights
from nmoe.effects.checkpoint.writer import SaveError
from nmoe.effects.data.corpus import Corpus
from nmoe.effects.data.tokenizer import encoding
from nmoe.effects.device import signals
from nmoe.effects.record.log import Log
from nmoe.effects.record.names import CHECKPOINTS, WEIGHTS
from nmoe.effects.terminal import note, say, warn
from nmoe.effects.train import generate, resume, zero
from nmoe.effects.train.rewind import Rewind
from nmoe.effects.train.session import Session
from nmoe.effects.train.step import State
from nmoe.errors import InputError, printable
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.model import model_at
from nmoe.pure.model.ops import Env
from nmoe.pure.units import duration, quantity
from nmoe.pure.watch.validations import Validation, Validations

EXIT_INPUT = 2
"""Exit code of a run that ended by an error a person can fix."""

EXIT_INTERRUPTED = 130
"""Exit code of a run that a second SIGINT ended."""

EXIT_NONFINITE = 5
"""Exit code of a run that stopped after too many non-finite steps."""

EXIT_UNSAVED = 6
"""Exit code of a run that ended because its state could not be saved."""

SHOWING = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError)
"""What weights, tokenizers, terminals and disks raise while something is shown."""

SAMPLE_TOKENS = 96


def report_origin(log: Log, restored: resume.Restored, rewinds: Sequence[Rewind]) -> None:
    """Report the checkpoint this attempt resumes from, and the damaged ones that were passed over."""
    for problem in restored.damaged:
        log.event("checkpoint_damaged", problem=problem)
        say(f"damaged        {problem}")
    step, checkpoint = restored.state.step, str(restored.checkpoint)
    changed = {difference.path: [difference.left, difference.right] for difference in restored.accepted}
    log.event("resume", step=step, **{"from": checkpoint}, accepted=changed)
    say(f"resume         at step {step} from {checkpoint}")
    if rewinds and rewinds[-1].checkpoint == restored.checkpoint.name:
        last = rewinds[-1]
        log.event("rewind", step=last.step, reached=last.reached, left_out=[list(each) for each in last.sequences])
        count = sum(end - begin for begin, end in last.sequences)
        say(f"rewind         from step {last.reached}: the {count} sequences read since are left out from now on")
    for path, (left, right) in changed.items():
        say(f"accepted       {path}: {left} -> {right}")


def end(session: Session, state: State, validations: Validations, finite: bool, stop: signals.Stop) -> int:
    """Save the weights, report the status, and choose the exit code.

    stop  the signal that ended the run, as all ranks see it
    """
    config, log, ranks = session.config, session.log, session.runtime.ranks
    if not stop.preempted():
        began = time.monotonic()
        params = zero.whole(session.blueprint.layouts, state.params, ranks)
        if ranks.world.rank == 0:
            size = sum(leaf.nbytes for _, leaf in tree.leaves(params))
            say(f"weights        writing {quantity(size, 'B')} to {log.folder / WEIGHTS}")
            weights.save(log.folder, params, state.router_bias)
            say(f"weights        written in {duration(time.monotonic() - began)}")
    if not finite:
        message = (
            f"step {state.step}: expected a finite loss and gradient norm, got {config.train.max_nonfinite_steps} "
            "steps in a row that were not; lower optim.*.lr or lengthen schedule.warmup_tokens, weights are those "
            "before them"
        )
        with reported("the end in events.jsonl"):
            log.event("end", status="failed", step=state.step, exit_code=EXIT_NONFINITE, error=message)
        if ranks.world.rank == 0:
            warn(f"nmoe: {message}")
        return EXIT_NONFINITE
    if validations.last is not None and validations.at(config.train.steps):
        with reported("the sample"):
            show(session, state, validations.last)
    with reported("the last loads of experts"):
        session.report.settle()
    status = "finished" if stop.signal is None else "interrupted"
    why = {} if stop.signal is None else {"signal": stop.signal.name}
    with reported("the end in events.jsonl"):
        log.event("end", status=status, step=state.step, exit_code=stop.exit_code(), **why)
    left = CHECKPOINTS if stop.preempted() else WEIGHTS
    say(f"{status:<14} {state.step} steps in {duration(time.monotonic() - session.report.began)}  {log.folder / left}")
    return stop.exit_code()


@contextmanager
def reported(
    what: str, where: str = "end of the run", remedy: str = "all is saved, start it again to resume"
) -> Iterator[None]:
    """What fails in the block is reported in one line, and decides nothing: the state is sound.

    what  is shown or written in it
    """
    try:
        yield
    except SHOWING as error:
        problem = printable(str(error).partition("\n")[0])
        warn(f"nmoe: {where}: expected {what}, got {type(error).__name__}: {problem}; {remedy}")


def show(session: Session, state: State, last: Validation) -> None:
    """Print the last validation beside the n-gram baselines, and a sample."""
    corpus = session.corpus
    say(
        f"validation     {last.loss:.4f} nats against unigram {corpus.unigram:.4f}, bigram "
        f"{corpus.bigram:.4f}; {last.bits_per_byte:.4f} bits/byte"
    )
    say_sample(session, state)


def sample_on_the_way(session: Session, state: State) -> None:
    """`say_sample` during the training, which continues when it fails."""
    with reported("a sample", f"step {state.step}", "training continues"):
        say_sample(session, state)


def say_sample(session: Session, state: State) -> None:
    """Print and record a text that the model writes. It draws by a key of its own: the training's bits stay."""
    prompt, text = session.config.sample.prompt, sample(session.config, session.corpus, state, session.env)
    session.log.event("sample", step=state.step, prompt=prompt, text=text)
    say(f"sample         of step {state.step}, {prompt!r} continued:\n{text}")


def record_failure(session: Session, error: BaseException) -> None:
    """Record that `error` ends the run, with the exit code that the process will have.

    Writes:  events, and notes of `error` about what could not be written.
    """
    code = exit_code(error)
    status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, SaveError):  # which is said at once
        note("\n".join(f"nmoe: {problem}" for problem in getattr(error, "problems", (text,))))
    for act in (
        session.saver.settle,
        session.report.settle,
        lambda: session.log.event("end", status=status, exit_code=code, error=text),
    ):
        try:
            act()
        except InputError as problem:
            error.add_note(str(problem))


def exit_code(error: BaseException) -> int:
    """Exit code of a process that this error ends."""
    if isinstance(error, SaveError):
        return EXIT_UNSAVED
    if isinstance(error, InputError):
        return EXIT_INPUT
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def network(config: Config, corpus: Corpus, state: State, env: Env) -> generate.Network:
    """The model as it stands, for texts as long as those it trains on."""
    limit = config.train.sequence_length
    return generate.Network(
        params=state.params,
        router_bias=state.router_bias,
        env=env,
        config=attrs.evolve(model_at(config.model, env, state.tokens), max_positions=limit),
        vocab_size=corpus.tokenizer.size,
    )


def sample(config: Config, corpus: Corpus, state: State, env: Env) -> str:
    """Sample a short text from the trained model."""
    encoder, prompt = encoding(corpus.tokenizer), config.sample.prompt
    start = encoder.encode_ordinary(prompt) or [corpus.tokenizer.end_of_text]
    columns = generate.steps(
        network(config, corpus, state, env),
        [start],
        num_tokens=SAMPLE_TOKENS,
        sampling=Sampling(temperature=0.7),
        keys=[Key(config.run.seed).fold("sample", prompt)],
        cached=False,  # longer than the positions of a training on short sequences, and of any kind of attention
    )
    return encoder.decode([*start, *(column[0] for column in columns)])
