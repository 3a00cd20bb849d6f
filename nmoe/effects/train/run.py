"""`nmoe run`: the composition root of training. Every effect is opened here, in one scope, and handed down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nmoe.config import Checkpoint, Config, dump, identity
from nmoe.effects.checkpoint import weights
from nmoe.effects.checkpoint.fs import Disk, Fs
from nmoe.effects.checkpoint.writer import SaveError, open_writer
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.corpus import Corpus, open_corpus
from nmoe.effects.data.prefetch import prefetching
from nmoe.effects.device import buffers, gpu, graph, ops, process, recompute, signals
from nmoe.effects.parallel import exchange as exchanges
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.parallel.launch import from_environment, open_rank_heartbeat
from nmoe.effects.parallel.ranks import Ranks, check_machine, on_all_ranks, open_ranks, with_rank_note
from nmoe.effects.record import provenance
from nmoe.effects.record.log import create_folder, open_log
from nmoe.effects.record.monitor import watching
from nmoe.effects.record.names import CHECKPOINTS
from nmoe.effects.terminal import say, warn
from nmoe.effects.train import attempt, resume
from nmoe.effects.train.evaluate import Held, evaluate, even
from nmoe.effects.train.identity import Identity, check_same, facts
from nmoe.effects.train.loop import agreed, settled, train_until
from nmoe.effects.train.outcome import end, tell_origin
from nmoe.effects.train.report import Report
from nmoe.effects.train.save import Saver
from nmoe.effects.train.step import Metrics, State, make_step
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core.blueprint import Blueprint
from nmoe.pure.core.key import Key
from nmoe.pure.cost.plan import Plan, plan
from nmoe.pure.cost.report import render
from nmoe.pure.model import model
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.parallel import exchange_arena
from nmoe.pure.units import quantity
from nmoe.pure.watch.validations import Seen

EXIT_UNSAVED = 6
"""Exit code of a run that ended because its state could not be saved."""

FOREVER_S = 1e9

ASSUMED_MFU = MappingProxyType({"cpu": 0.35, "cuda": 0.15})
"""What the estimate before the first step assumes: about what docs/log.md has of each device."""


def as_it_is(thing: Any) -> Any:
    """What it is given."""
    return thing


@attrs.frozen(kw_only=True)
class World:
    """What a run meets outside: the disk, the data, the ops. `nmoe soak` gives it a worse one."""

    fs: Fs = attrs.Factory(Disk)
    read: Callable[[Callable[[int], Batch]], Callable[[int], Batch]] = as_it_is
    env: Callable[[Env], Env] = as_it_is


def fresh(
    config: Config, blueprint: Blueprint, rt: process.Runtime, exchange: Exchange | None = None
) -> tuple[State, Env]:
    """The state before the first step, and what the model needs besides it."""
    state, env = blank(config, blueprint, rt, exchange)
    initialise_(config, blueprint, state, rt)
    return state, env


def initialise_(config: Config, blueprint: Blueprint, state: State, rt: process.Runtime) -> None:
    """Draw the initial values. Writes: the parameters of `state`."""
    key = Key(config.run.seed).fold("init")
    buffers.initialise_(state.arenas, blueprint, key, ranks=rt.ranks)


def blank(
    config: Config, blueprint: Blueprint, rt: process.Runtime, exchange: Exchange | None = None
) -> tuple[State, Env]:
    """A state of zeros at step 0, and what the model needs besides it."""
    c = config.model
    arenas = buffers.allocate(blueprint, rt.device)
    state = State(
        buffers.bind(blueprint, arenas),
        arenas,
        torch.zeros(c.num_layers - c.num_dense_layers, c.moe.num_experts, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        torch.zeros((), dtype=torch.int64, device=rt.device),
        0,
        0,
    )
    train = config.train
    built = ops.build(rt.device, c, deterministic=train.deterministic, documents=train.document_mask, exchange=exchange)
    env = environment(c, train.sequence_length, built)
    return state, attrs.evolve(env, tables=buffers.place(env.tables, rt.device))


def stepper(
    config: Config,
    blueprint: Blueprint,
    env: Env,
    rt: process.Runtime,
    *,
    mark: Callable[[str], None],
    before_update: Callable[[], None] = lambda: None,
    exchange: Exchange | None = None,
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
        return make_step(
            config, blueprint, env, rt, mark=mark, before_update=before_update, exchange=exchange, run=block
        )
    replayed = make_step(
        config, blueprint, env, rt, mark=lambda name: None, exchange=exchange, run=block, wrap=graph.replaying
    )

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        before_update()
        after = replayed(state, batch)
        mark("step")
        return after

    return step


def exchanging(
    config: Config, ranks: Ranks, device: torch.device
) -> AbstractContextManager[Exchange] | AbstractContextManager[None]:
    """The exchange of rows with the ranks that hold the other experts, if there are others."""
    train, moe, parallel, group = config.train, config.model.moe, config.parallel, ranks.experts
    if group.handle is None:
        return nullcontext()
    sizes = exchange_arena.sizes(
        ranks=group.size,
        experts=moe.num_experts,
        top_k=moe.top_k,
        hidden_size=config.model.hidden_size,
        tokens=train.microbatch_size * train.sequence_length,
        capacity=parallel.room(),
        dedup=parallel.dedup,
        dtype=torch.bfloat16 if config.precision.compute == "bf16" else torch.float32,
    )
    return exchanges.open_exchange(device=device, group=group.handle, sizes=sizes, timeout_s=parallel.timeout_s)


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
    with signals.exit_on_signals(), ExitStack() as scope:
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
    launch = from_environment(os.environ)
    if launch.world != config.parallel.ranks:
        raise InputError(
            f"parallel.ranks: as many as a launcher started, {launch.world}, got {config.parallel.ranks}; start with "
            f"`nmoe run --gpus {config.parallel.ranks}`, or add --parallel.ranks={launch.world}"
        )
    expert_ranks = config.parallel.experts or launch.world
    rank_heartbeat = scope.enter_context(open_rank_heartbeat(launch, config.parallel.timeout_s))
    if launch.rank:
        nothing = scope.enter_context(open(os.devnull, "w", encoding="utf-8"))
        scope.enter_context(redirect_stdout(nothing))
    with with_rank_note(f"rank {launch.rank}" if launch.world > 1 else ""):
        device = gpu.device(config.run.device, launch.local_rank, launch.local_world)
        check_machine(launch, expert_ranks, cuda=device.type == "cuda")
        ranks = scope.enter_context(open_ranks(launch, expert_ranks, device, config.parallel.timeout_s))
    rt = process.Runtime(
        device=device, rank=launch.rank, world=launch.world, peak_flops=gpu.peak_flops(device), ranks=ranks
    )
    on_all_ranks(ranks, lambda: check_same(ranks, {**provenance.versions(), **facts(config)}))
    name = ranks.all_gather_text(config.run.name or f"{label}-{datetime.now(UTC):%Y%m%d-%H%M%S}")[0]
    folder = Path(config.run.root) / name
    origin = on_all_ranks(ranks, lambda: resume.origin(config.train.resume, folder))
    corpus = on_all_ranks(ranks, lambda: open_corpus(config, launch))
    this = Identity(config=config, tokenizer=corpus.tokenizer.identity, data=corpus.identity)
    on_all_ranks(ranks, lambda: check_same(ranks, {"tokenizer": this.tokenizer, "data": this.data}))
    parallel = config.parallel
    blueprint = make_blueprint(config, rt.world, expert_ranks)
    planned = plan(
        config,
        blueprint,
        mfu=ASSUMED_MFU[device.type],
        peak_flops=rt.peak_flops,
        dedup=parallel.dedup,
        capacity=parallel.room(),
    )
    c = config.model
    contents = {
        "config.toml": dump(config),
        "sources.toml": "".join(f'"{path}" = {_quoted(source)}\n' for path, source in sources.items()),
        "provenance.toml": provenance.describe(
            device, command, config=identity(config), tokenizer=this.tokenizer, data=this.data
        ),
    }
    exchange = on_all_ranks(ranks, lambda: scope.enter_context(exchanging(config, ranks, device)))
    damaged: list[str] = []

    def begin() -> tuple[State, Env, resume.Restored | None]:
        check_memory(config, planned, device)
        state, env = blank(config, blueprint, rt, exchange)
        restored = None
        if origin is not None:
            restored = resume.restore(world.fs, origin, state, blueprint, this, accept, damaged.append, ranks)
        if restored is not None:
            state = restored.state
        else:
            initialise_(config, blueprint, state, rt)
            if config.train.warm_start is not None:
                start = weights.of_path(world.fs, Path(config.train.warm_start), blueprint)
                resume.put_(state, blueprint, start, ranks)
        if state.step > config.train.steps:
            raise InputError(
                f"train.steps: at least the {state.step} steps taken, got {config.train.steps}; raise it, or name an "
                "earlier checkpoint as train.resume"
            )
        return state, env, restored

    state, env, restored = on_all_ranks(ranks, begin)
    first = state.step
    is_new = rt.rank == 0 and not folder.exists()
    on_all_ranks(ranks, lambda: create_folder(folder.parent, folder.name, contents) if is_new else folder)
    writer = on_all_ranks(
        ranks,
        lambda: scope.enter_context(
            open_writer(
                world.fs,
                folder / CHECKPOINTS,
                keep=keep(config.checkpoint),
                parent=None if restored is None else restored.manifest,
                rank=rt.rank,
                world=rt.world,
                exchange=ranks.background,
            )
        ),
    )
    number = writer.attempt

    def prepare_folder() -> None:
        if not is_new:
            attempt.fix(folder, first, validated=restored is not None and restored.seen.at(first))
            attempt.record(folder, number, contents)
        tokenizers.save(corpus.tokenizer, folder)

    on_all_ranks(ranks, lambda: rt.rank or prepare_folder())
    on_all_ranks(ranks, lambda: writer.reserve(resume.pieces(state, blueprint, ranks=ranks)))
    say("\n".join((banner(config, planned, corpus, folder), *ops.unmeasured(device, c))))

    env = world.env(env)
    ahead = prefetching(corpus.read, batch_size=config.train.batch_size, depth=config.data.prefetch, device=rt.device)
    read = world.read(scope.enter_context(ahead))
    clock = gpu.Clock(device)

    def mark(name: str) -> None:
        clock.mark(name)
        rank_heartbeat.beat()

    step = stepper(config, blueprint, env, rt, mark=mark, before_update=writer.staged, exchange=exchange)
    byte_lengths = _byte_lengths(corpus.tokenizer, c.vocab_size).to(device)
    began = time.monotonic()
    log = scope.enter_context(open_log(folder, attempt=number, rank=rt.rank))
    flops, on_gpu = planned.flops.training(), device.type == "cuda"
    monitor = None
    if rt.rank == 0:
        skipped = int(state.skipped.item())
        monitor = scope.enter_context(
            watching(config, log, flops=flops, world=rt.world, cuda=on_gpu, step=first, skipped=skipped)
        )
        log = monitor.log

    def overdue() -> None:
        log.event("end", status="interrupted", exit_code=signals.EXIT_PREEMPTED, error="the grace time was over")

    stop = scope.enter_context(signals.stop_on_signals(config.checkpoint.grace_s, overdue))
    batches = even(corpus.held, ranks)

    def held() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            rank_heartbeat.beat()
            if agreed(stop, ranks)[0]:
                return

    def validate(state: State) -> Held | None:
        chunk = config.train.loss_chunk
        found = evaluate(state.params, state.router_bias, env, c, held(), byte_lengths, chunk=chunk, ranks=ranks)
        return None if agreed(stop, ranks)[0] else found

    log.event(
        "start",
        pid=os.getpid(),
        steps=config.train.steps,
        parameters=planned.parameters.total,
        active_parameters=planned.parameters.active,
        yardstick={"unigram": corpus.unigram, "bigram": corpus.bigram},
    )
    tell_origin(log, first, restored, damaged)
    report = Report(
        config=config,
        rt=rt,
        log=log,
        flops=flops,
        began=began,
        first_step=first,
        monitor=monitor,
        exchange=exchange,
    )
    if corpus.stream is not None and rt.rank == 0:
        report.mixture(corpus.stream, state)
    saver = Saver(
        config.checkpoint,
        writer,
        log,
        pieces=lambda state: resume.pieces(state, blueprint, ranks=ranks),
        meta=lambda state, seen: resume.meta(state, seen, this),
        saved_step=first,
    )
    seen = Seen() if restored is None else restored.seen
    try:
        state, seen, finite = train_until(
            config, state, seen, step, read, validate, saver, report, clock, stop, rank_heartbeat, ranks, exchange
        )
        rank_heartbeat.rest()
        if finite:
            # in whole milliseconds, for the rank that has the least
            left_s = (
                -ranks.all_reduce_max([-int(1000 * min(stop.left_s(config.checkpoint.grace_s), FOREVER_S))])[0] / 1000
            )
            saver.finish(state, seen, left_s)
        saver.settle()
        return end(config, corpus, state, seen, finite, env, report, settled(stop, ranks), blueprint, ranks)
    except SaveError as error:
        log.event("end", status="failed", exit_code=EXIT_UNSAVED, error=str(error))
        if rt.rank == 0:
            warn(f"nmoe: {error}")
        return EXIT_UNSAVED
    except BaseException as error:
        saver.settle()
        log.event("end", status="failed", exit_code=1, error=f"{type(error).__name__}: {error}")
        with with_rank_note(f"rank {rt.rank}, step {rank_heartbeat.step}" if rt.world > 1 else ""):
            raise


def keep(settings: Checkpoint) -> Keep:
    """What the config keeps of the checkpoints."""
    return Keep(last=settings.keep_last, every=settings.keep_every, best=int(settings.keep_best))


def _byte_lengths(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of each id the model has; ids the tokenizer does not know never occur."""
    known = tokenizers.byte_lengths(tokenizer)
    return torch.from_numpy(np.pad(known, (0, vocab_size - len(known))).astype(np.int64))


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
