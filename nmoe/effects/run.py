"""`nmoe run`: the composition root of training. Every effect is opened here, in one scope, and handed down."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nmoe.config import Checkpoint, Config, dump, identity
from nmoe.effects import attempt, buffers, graph, ops, provenance, recompute, resume, runtime, warm, weights
from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.checkpoint.writer import SaveError, open_writer
from nmoe.effects.corpus import Corpus, open_corpus
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.evaluate import Held, evaluate
from nmoe.effects.generate import extend
from nmoe.effects.identity import Identity
from nmoe.effects.log import Log, create_folder, open_log, say
from nmoe.effects.monitor import watching
from nmoe.effects.plan import duration, quantity, render
from nmoe.effects.prefetch import prefetching
from nmoe.effects.report import Report
from nmoe.effects.saver import Saver
from nmoe.effects.seen import Seen, validated
from nmoe.effects.step import Metrics, State, make_step
from nmoe.errors import InputError
from nmoe.pure import model
from nmoe.pure.key import Key
from nmoe.pure.layout import ArenaLayout, layout
from nmoe.pure.model import Batch
from nmoe.pure.ops import Env
from nmoe.pure.plan import Plan, plan
from nmoe.pure.retention import Keep

__all__ = ["EXIT_NONFINITE", "EXIT_UNSAVED", "World", "arena_layouts", "blank", "fresh", "main", "stepper"]

EXIT_NONFINITE = 5
"""Exit code of a run that stopped after too many non-finite steps."""

EXIT_UNSAVED = 6
"""Exit code of a run that ended because its state could not be saved."""

ASSUMED_MFU = MappingProxyType({"cpu": 0.35, "cuda": 0.15})
"""What the estimate before the first step assumes: about what docs/log.md has of each device."""

SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 96


def as_it_is(thing: Any) -> Any:
    """What it is given."""
    return thing


@attrs.frozen(kw_only=True)
class World:
    """What a run meets outside: the disk, the data, the ops. `nmoe soak` gives it a worse one."""

    fs: Fs = attrs.Factory(Disk)
    read: Callable[[Callable[[int], Batch]], Callable[[int], Batch]] = as_it_is
    env: Callable[[Env], Env] = as_it_is


def train_until(
    config: Config,
    state: State,
    seen: Seen,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    read: Callable[[int], Batch],
    validate: Callable[[State], Held | None],
    saver: Saver,
    report: Report,
    clock: runtime.Clock,
    stop: runtime.Stop,
) -> tuple[State, Seen, bool]:
    """Take steps until the last one, a signal, or too many non-finite steps.

    validate  None when a signal came meanwhile
    returns   the state, its validations, and whether the steps were finite
    """
    train = config.train
    reported, skipped = state.step, int(state.skipped.item())
    clock.mark("start")
    while True:
        # At the head of the loop, so that a run that goes on makes up for what its last attempt did not come to.
        due = state.step > 0 and (state.step % config.validation.every == 0 or state.step >= train.steps)
        if due and stop.signal is None and not seen.at(state.step):
            held = validate(state)
            if held is not None:
                report.validation(state.step, held)
                seen = validated(seen, state.step, held.loss, held.bits_per_byte)
            clock.mark("validation")
        if state.step >= train.steps or stop.signal is not None:
            return state, seen, True
        if saver.due(state.step):
            saver.save(state, seen)
            clock.mark("checkpoint")
        batch = read(state.cursor)
        clock.mark("data")
        state, metrics = step(state, batch)
        saver.poll()
        last = state.step == train.steps or stop.signal is not None
        # A state that no step changes any more is not worth a checkpoint.
        latched = saver.due(state.step) and int(metrics.skipped_in_row.item()) >= train.max_nonfinite_steps
        if last or latched or state.step == 1 or state.step % config.log.every == 0:
            before = skipped
            skipped, in_row = report.step(state, metrics, clock.split(), state.step - reported)
            reported = state.step
            if skipped > before:
                report.log.event("nonfinite", step=state.step, new=skipped - before, in_row=in_row)
            if in_row >= train.max_nonfinite_steps:
                return state, seen, False
            clock.mark("log")


def fresh(config: Config, layouts: tuple[ArenaLayout, ...], rt: runtime.Runtime) -> tuple[State, Env]:
    """The state before the first step, and what the model needs besides it."""
    state, env = blank(config, layouts, rt)
    initialise_(config, layouts, state, rt)
    return state, env


def initialise_(config: Config, layouts: tuple[ArenaLayout, ...], state: State, rt: runtime.Runtime) -> None:
    """Draw the initial values. Writes: the parameters of `state`."""
    key = Key(config.run.seed).fold("init")
    buffers.initialise_(state.arenas, layouts, key, model.dims(config.model), rank=rt.rank, world=rt.world)


def blank(config: Config, layouts: tuple[ArenaLayout, ...], rt: runtime.Runtime) -> tuple[State, Env]:
    """A state of zeros at step 0, and what the model needs besides it."""
    c = config.model
    arenas = buffers.allocate(layouts, rt.device)
    state = State(
        buffers.bind(model.specs(c), layouts, arenas),
        arenas,
        torch.zeros(c.num_layers - c.num_dense_layers, c.moe.num_experts, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        0,
        0,
    )
    rope = buffers.place(model.rope_table(c, config.train.sequence_length), rt.device)
    train = config.train
    built = ops.build(rt.device, c, deterministic=train.deterministic, documents=train.document_mask)
    return state, Env(built, rope)


def stepper(
    config: Config,
    layouts: tuple[ArenaLayout, ...],
    env: Env,
    rt: runtime.Runtime,
    *,
    mark: Callable[[str], None],
    before_update: Callable[[], None] = lambda: None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`make_step` as the config wants it: what is recomputed, and whether it is replayed.

    mark           called with the name of each part of a step when it ends; a replayed step is one part
    before_update  called before anything but gradients is written; of a replayed step, before all of it
    """
    block: Callable[..., Any] = model.block
    if config.train.recompute == "full":
        block = recompute.full()
    elif config.train.recompute == "cheap":
        cheap, block = recompute.cheap(env.ops)
        env = attrs.evolve(env, ops=cheap)
    if not config.train.graph:
        return make_step(config, layouts, env, rt, mark=mark, before_update=before_update, run=block)
    replayed = make_step(config, layouts, env, rt, mark=lambda name: None, run=block, wrap=graph.replaying)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        before_update()
        after = replayed(state, batch)
        mark("step")
        return after

    return step


def arena_layouts(config: Config) -> tuple[ArenaLayout, ...]:
    """Where the parameters of this config lie on one rank."""
    return layout(
        model.specs(config.model),
        model.dims(config.model),
        compute=config.precision.compute,
        moments=config.precision.moments,
        accumulate=config.train.batch_size > config.train.microbatch_size,
    )


def check_memory(config: Config, planned: Plan, device: torch.device) -> None:
    """Refuse what the GPU has no room for, before anything is allocated.

    Raises:  InputError with the settings that would make it fit.
    """
    if device.type == "cpu":
        return
    wanted, there = planned.memory.total(), torch.cuda.get_device_properties(device).total_memory
    if wanted > there:
        train = config.train
        raise InputError(
            f"train.microbatch_size: what a step needs fits the GPU's {quantity(there, 'B')}, got "
            f"{quantity(wanted, 'B')} for {train.microbatch_size} sequences of {train.sequence_length}; lower "
            'microbatch_size, write train.recompute = "cheap" or "full", or precision.moments = "bf16"'
        )


def banner(config: Config, planned: Plan, corpus: Corpus, folder: Path) -> str:
    """What is about to happen, before step 0."""
    train_tokens = corpus.num_tokens
    return "\n".join(
        (
            f"run            {folder}",
            render(config, planned),
            f"data           {quantity(train_tokens)} training tokens ({planned.tokens / train_tokens:.2f} passes)  "
            f"tokenizer {corpus.tokenizer.name} {corpus.tokenizer.identity[:12]} ({corpus.tokenizer.size} ids)",
            f"yardstick      unigram {corpus.unigram:.4f} nats  bigram {corpus.bigram:.4f} nats on the validation "
            "tokens",
        )
    )


def main(
    config: Config,
    sources: Mapping[str, str],
    command: Sequence[str],
    label: str,
    accept: Sequence[str] = (),
    world: World | None = None,
) -> int:
    """Train `config`, from the start or from where an earlier attempt was saved.

    sources  where each value of the config came from
    command  the argument vector, for the record
    label    first part of the run folder's name when the config gives none
    accept   keys of the identity that may differ from the checkpoint's
    world    what is met outside; None: as it is
    returns  exit code: 0 finished, 5 too many non-finite steps, 6 a state that could not be saved, 75 told to end by
             SIGTERM or SIGUSR1, 130 interrupted
    """
    with runtime.exit_on_signals(), ExitStack() as scope:
        return _main(config, sources, command, label, accept, World() if world is None else world, scope)


def _main(
    config: Config,
    sources: Mapping[str, str],
    command: Sequence[str],
    label: str,
    accept: Sequence[str],
    world: World,
    scope: ExitStack,
) -> int:
    launch = runtime.launch(os.environ)
    if launch.world != 1 or config.parallel.ranks != 1:
        raise InputError(
            f"parallel.ranks: this version trains on one rank, got {max(launch.world, config.parallel.ranks)}; "
            "add --parallel.ranks=1, and see `nmoe plan` for larger machines"
        )
    device = runtime.device(config.run.device)
    folder = Path(config.run.root) / (config.run.name or f"{label}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    origin = resume.origin(config.train.resume, folder)
    corpus = open_corpus(config, launch)
    rt = runtime.Runtime(device=device, rank=0, world=1, peak_flops=runtime.peak_flops(device))
    planned = plan(config, ranks=1, mfu=ASSUMED_MFU[device.type], peak_flops=rt.peak_flops)
    check_memory(config, planned, device)
    c = config.model
    layouts, dims = arena_layouts(config), model.dims(c)
    this = Identity(config=config, tokenizer=corpus.tokenizer.identity, data=corpus.identity)
    contents = {
        "config.toml": dump(config),
        "sources.toml": "".join(f'"{path}" = {_quoted(source)}\n' for path, source in sources.items()),
        "provenance.toml": provenance.describe(
            device, command, config=identity(config), tokenizer=corpus.tokenizer.identity, data=corpus.identity
        ),
    }

    damaged: list[str] = []
    state, env = blank(config, layouts, rt)
    restored = None
    if origin is not None:
        restored = resume.restore(world.fs, origin, state, layouts, dims, this, accept, damaged.append)
    if restored is not None:
        state = restored.state
    else:
        initialise_(config, layouts, state, rt)
        if config.train.warm_start is not None:
            warm.put_(state, layouts, warm.of_path(world.fs, Path(config.train.warm_start), model.specs(c), dims))
    first = state.step
    if first > config.train.steps:
        raise InputError(
            f"train.steps: at least the {first} steps taken, got {config.train.steps}; raise it, or name an earlier "
            "checkpoint as train.resume"
        )

    is_new = not folder.exists()
    if is_new:
        create_folder(folder.parent, folder.name, contents)
    writer = scope.enter_context(
        open_writer(
            world.fs,
            folder / resume.CHECKPOINTS,
            keep=keep(config.checkpoint),
            parent=None if restored is None else restored.manifest,
        )
    )
    number = writer.attempt
    if not is_new:
        attempt.mend(folder, first, validated=restored is not None and restored.seen.at(first))
        attempt.record(folder, number, contents)
    tokenizers.save(corpus.tokenizer, folder)
    writer.reserve(resume.pieces(state, layouts, dims))
    say("\n".join((banner(config, planned, corpus, folder), *ops.unmeasured(device, c))))

    env = world.env(env)
    ahead = prefetching(corpus.read, batch_size=config.train.batch_size, depth=config.data.prefetch, device=rt.device)
    read = world.read(scope.enter_context(ahead))
    clock = runtime.Clock(device)
    step = stepper(config, layouts, env, rt, mark=clock.mark, before_update=writer.staged)
    byte_lengths = _byte_lengths(corpus.tokenizer, c.vocab_size).to(device)
    began = time.monotonic()
    opened = scope.enter_context(open_log(folder, attempt=number))
    flops, on_gpu = planned.flops.training(), device.type == "cuda"
    skipped = int(state.skipped.item())
    monitor = scope.enter_context(
        watching(config, opened, flops=flops, world=1, cuda=on_gpu, step=first, skipped=skipped)
    )
    log = monitor.log

    def overdue() -> None:
        log.event("end", status="interrupted", exit_code=runtime.EXIT_PREEMPTED, error="the grace time was over")

    stop = scope.enter_context(runtime.stop_on_signals(config.checkpoint.grace_s, overdue))

    def held() -> Iterator[Batch]:
        for batch in corpus.held:
            yield batch
            if stop.signal is not None:
                return

    def validate(state: State) -> Held | None:
        found = evaluate(state.params, state.router_bias, env, c, held(), byte_lengths, chunk=config.train.loss_chunk)
        return found if stop.signal is None else None

    log.event(
        "start",
        pid=os.getpid(),
        steps=config.train.steps,
        parameters=planned.parameters.total,
        active_parameters=planned.parameters.active,
        yardstick={"unigram": corpus.unigram, "bigram": corpus.bigram},
    )
    tell_origin(log, first, restored, damaged)
    report = Report(config=config, rt=rt, log=log, flops=flops, began=began, first_step=first, monitor=monitor)
    if corpus.stream is not None:
        report.mixture(corpus.stream, state)
    saver = Saver(
        config.checkpoint,
        writer,
        log,
        pieces=lambda state: resume.pieces(state, layouts, dims),
        meta=lambda state, seen: resume.meta(state, seen, this),
        saved_step=first,
    )
    seen = Seen() if restored is None else restored.seen
    try:
        state, seen, finite = train_until(config, state, seen, step, read, validate, saver, report, clock, stop)
        if finite:
            saver.finish(state, seen, stop.left_s(config.checkpoint.grace_s))
        saver.settle()
        return _end(config, corpus, state, seen, finite, env, report, stop)
    except SaveError as error:
        log.event("end", status="failed", exit_code=EXIT_UNSAVED, error=str(error))
        print(f"nmoe: {error}", file=sys.stderr)
        return EXIT_UNSAVED
    except BaseException as error:
        saver.settle()
        log.event("end", status="failed", exit_code=1, error=f"{type(error).__name__}: {error}")
        raise


def tell_origin(log: Log, step: int, restored: resume.Restored | None, damaged: Sequence[str]) -> None:
    """Say what this attempt goes on from, and what it passed over."""
    for each in damaged:
        log.event("checkpoint_damaged", problem=each)
        say(f"damaged        {each}")
    if restored is not None:
        changed = {each.path: [each.left, each.right] for each in restored.accepted}
        log.event("resume", step=step, **{"from": restored.origin}, accepted=changed)
        say(f"resume         at step {step} from {restored.origin}")
        for path, (left, right) in changed.items():
            say(f"accepted       {path}: {left} -> {right}")


def keep(settings: Checkpoint) -> Keep:
    """What the config keeps of the checkpoints."""
    return Keep(last=settings.keep_last, every=settings.keep_every, best=int(settings.keep_best))


def _end(
    config: Config,
    corpus: Corpus,
    state: State,
    seen: Seen,
    finite: bool,
    env: Env,
    report: Report,
    stop: runtime.Stop,
) -> int:
    """Keep the weights, say how it went, and with which exit code."""
    log = report.log
    if not stop.preempted():
        weights.save(log.folder, state.params, state.router_bias)
    if not finite:
        message = (
            f"step {state.step}: loss and gradient norm are finite, got {config.train.max_nonfinite_steps} steps in a "
            "row that were not; lower optim.*.lr or lengthen schedule.warmup_tokens, weights are those before them"
        )
        log.event("end", status="failed", step=state.step, exit_code=EXIT_NONFINITE, error=message)
        print(f"nmoe: {message}", file=sys.stderr)
        return EXIT_NONFINITE
    if seen.last is not None and seen.at(config.train.steps):
        say(
            f"validation     {seen.last.loss:.4f} nats against unigram {corpus.unigram:.4f}, bigram "
            f"{corpus.bigram:.4f}; {seen.last.bits_per_byte:.4f} bits/byte"
        )
        text = sample(config, corpus, state, env)
        log.event("sample", step=state.step, prompt=SAMPLE_PROMPT, text=text)
        say(f"sample         {SAMPLE_PROMPT!r} continued:\n{text}")
    status = "finished" if stop.signal is None else "interrupted"
    why = {} if stop.signal is None else {"signal": stop.signal.name}
    log.event("end", status=status, step=state.step, exit_code=stop.exit_code(), **why)
    left = resume.CHECKPOINTS if stop.preempted() else weights.FILE
    say(f"{status:<14} {state.step} steps in {duration(time.monotonic() - report.began)}  {log.folder / left}")
    return stop.exit_code()


def sample(config: Config, corpus: Corpus, state: State, env: Env) -> str:
    """A short text by the trained model."""
    encoding = tokenizers.encoding(corpus.tokenizer)
    limit = config.train.sequence_length
    tokens = extend(
        state.params,
        state.router_bias,
        env,
        attrs.evolve(config.model, max_positions=limit),
        encoding.encode_ordinary(SAMPLE_PROMPT),
        num_tokens=SAMPLE_TOKENS,
        vocab_size=corpus.tokenizer.size,
        temperature=0.7,
        key=Key(config.run.seed).fold("sample", SAMPLE_PROMPT),
    )
    return encoding.decode(tokens)


def _byte_lengths(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of each id the model has; ids the tokenizer does not know never occur."""
    known = tokenizers.byte_lengths(tokenizer)
    return torch.from_numpy(np.pad(known, (0, vocab_size - len(known))).astype(np.int64))


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
