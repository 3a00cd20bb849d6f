"""`nmoe run`: the composition root of training. Every effect is opened here, in one scope, and handed down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import attrs
import torch

from nmoe.config import Config, dump, identity
from nmoe.effects import files
from nmoe.effects.checkpoint import weights
from nmoe.effects.checkpoint.writer import Writer, open_writer
from nmoe.effects.data import tokenizer
from nmoe.effects.data.corpus import Corpus, open_corpus
from nmoe.effects.data.prefetch import prefetching
from nmoe.effects.data.store.blocks import Verification
from nmoe.effects.device import gpu, ops, process, signals
from nmoe.effects.kernels.accumulate import Accumulator
from nmoe.effects.parallel.copies import open_copies
from nmoe.effects.parallel.launch import from_environment, open_rank_heartbeat
from nmoe.effects.parallel.ranks import Ranks, check_hosts, check_machine, on_all_ranks, open_ranks, with_rank_note
from nmoe.effects.record import address, provenance
from nmoe.effects.record.log import create_folder, open_console, open_log
from nmoe.effects.record.monitor import watching
from nmoe.effects.record.names import CHECKPOINTS, CONFIG, DIFF, LEFT_OUT, PROVENANCE, SOURCES
from nmoe.effects.terminal import say, until_closed
from nmoe.effects.train import attempt, resume, rewind
from nmoe.effects.train.build import blank, check_memory, exchanging, initialise_, keep, memory_explained
from nmoe.effects.train.identity import Identity, check_same, facts
from nmoe.effects.train.loop import train
from nmoe.effects.train.outcome import report_origin
from nmoe.effects.train.report import Report
from nmoe.effects.train.rewind import unless_refused
from nmoe.effects.train.save import Saver
from nmoe.effects.train.session import Connected, Job, Session, Start
from nmoe.effects.train.step import make_step
from nmoe.effects.train.world import World
from nmoe.errors import InputError
from nmoe.pure.cost import fp8
from nmoe.pure.cost.machines import H100
from nmoe.pure.cost.plan import Plan, plan
from nmoe.pure.cost.report import render
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.units import quantity
from nmoe.pure.watch.alerts import History
from nmoe.pure.watch.validations import Validations

ASSUMED_MFU = MappingProxyType({"cpu": 0.35, "cuda": H100.mfu, "torch": 0.1})
"""What the estimate before the first step assumes: about what docs/log.md has of each device; nobody measured a GPU in
plain torch yet."""


@attrs.frozen(kw_only=True)
class Request:
    """What the user asked for.

    sources  where each value of the config came from
    command  the argument vector, for the record
    label    first part of the run folder's name when the config gives none
    accept   keys of the identity that may differ from the checkpoint's
    rewind   go back to the newest checkpoint of at most so many steps first, before the last one; None: continue
    world    its disk, reader of batches and ops
    """

    config: Config
    sources: Mapping[str, str]
    command: Sequence[str]
    label: str
    accept: Sequence[str]
    rewind: int | None
    world: World


def main(
    config: Config,
    sources: Mapping[str, str],
    command: Sequence[str],
    label: str,
    accept: Sequence[str] = (),
    world: World | None = None,
    rewind: int | None = None,
) -> int:
    """Train `config`, from the start or from where an earlier attempt was saved. The arguments are those of `Request`.

    returns  exit code: 0 finished, 5 too many non-finite steps, 6 a state that could not be saved, 75 ended by
             SIGTERM, SIGHUP, SIGUSR1 or a closed standard output, 130 interrupted
    Raises:  ValueError for a config that has the model evaluated, by nobody.
    """
    request = Request(
        config=config,
        sources=sources,
        command=command,
        label=label,
        accept=accept,
        rewind=rewind,
        world=world or World(),
    )
    if config.eval.every and request.world.judge is None:
        raise ValueError("run: expected World.judge for a config with eval.every, got None; pass evals.suite.judging")
    with signals.exit_on_signals(), ExitStack() as scope:
        connected = connect(config, scope)
        folder = run_folder(request, connected.runtime.ranks)
        goes_back = rewind is not None and connected.runtime.rank == 0
        with unless_refused(folder) if goes_back else nullcontext():
            job = open_data(request, connected, folder)
            with memory_explained(job.plan):
                start = begin(request, job, connected.runtime, scope)
                place = open_folder(request, job, start, connected.runtime, scope)
        with memory_explained(job.plan):
            session = open_session(request, job, start, place, connected, scope)
            request.world.begun(connected.runtime)
            code = train(session, start)
            request.world.ended(connected.runtime)
            return code


def connect(config: Config, scope: ExitStack) -> Connected:
    """Open the device and the process groups.

    Raises:  InputError when the launcher started another number of ranks than the config says.
    """
    launch = from_environment(os.environ)
    if launch.world != config.parallel.ranks:
        raise InputError(
            f"parallel.ranks: expected as many as a launcher started, {launch.world}, got {config.parallel.ranks}; "
            f"start with `nmoe run --gpus {config.parallel.ranks}`, or add --parallel.ranks={launch.world}"
        )
    expert_ranks = config.parallel.experts or launch.world
    heartbeat = scope.enter_context(open_rank_heartbeat(launch, config.parallel.timeout_s))
    process.settle_threads()
    if launch.rank:
        nowhere = scope.enter_context(open(os.devnull, "w", encoding="utf-8"))
        scope.enter_context(redirect_stdout(nowhere))
    with with_rank_note(f"rank {launch.rank}" if launch.world > 1 else ""):
        kernels = config.run.kernels
        device = gpu.device(config.run.device, launch.local_rank, launch.local_world, kernels=kernels)
        gpu.set_allocator(device, config.memory, launch.allocator)
        check_machine(launch, expert_ranks, config.parallel.transport, cuda=device.type == "cuda")
        ranks = scope.enter_context(open_ranks(launch, expert_ranks, device, config.parallel.timeout_s))
        by = {"kernels": kernels, "transport": config.parallel.transport}
        ranks = scope.enter_context(open_copies(ranks, device, config.parallel.timeout_s, **by))
    runtime = process.Runtime(
        device=device,
        rank=launch.rank,
        world=launch.world,
        peak_flops=gpu.peak_flops(device, launch.home),
        ranks=ranks,
    )
    on_all_ranks(ranks, lambda: check_hosts(ranks, launch.local_world))
    on_all_ranks(ranks, lambda: check_same(ranks, {**provenance.versions(), **facts(config)}))
    return Connected(launch=launch, runtime=runtime, heartbeat=heartbeat)


def run_folder(request: Request, ranks: Ranks) -> Path:
    """Where this run is written, or goes on; the same on all ranks."""
    run = request.config.run
    name = ranks.all_gather_text(run.name or f"{request.label}-{datetime.now(UTC):%Y%m%d-%H%M%S}")[0]
    return files.expanded(run.root) / name


def open_data(request: Request, connected: Connected, folder: Path) -> Job:
    """Find the checkpoints of the run folder, open the corpus, and plan the training."""
    config, rt = request.config, connected.runtime
    ranks, parallel = rt.ranks, config.parallel
    # A launcher that starts all ranks again starts them with the same command.
    most = request.rewind
    if most is not None and not connected.launch.restart:
        on_all_ranks(ranks, lambda: rt.rank or rewind.go_back(folder, most))
    origin = on_all_ranks(ranks, lambda: resume.origin(config.train.resume, folder))
    rewinds: tuple[rewind.Rewind, ...] = ()
    if origin is not None:
        source = rewind.run_folder(origin)
        rewinds = on_all_ranks(ranks, lambda: rewind.read(folder) or rewind.read(source))
        if not origin.single:
            origin = on_all_ranks(ranks, lambda: rewind.pending(request.world.fs, source, rewinds)) or origin
    corpus = on_all_ranks(ranks, lambda: open_corpus(config, connected.launch, rewind.left_out(rewinds)))
    this = Identity(config=config, tokenizer=corpus.tokenizer.identity, data=corpus.identity)
    on_all_ranks(ranks, lambda: check_same(ranks, {"tokenizer": this.tokenizer, "data": this.data}))
    blueprint = make_blueprint(config, rt.world, parallel.experts or rt.world)
    planned = plan(
        config,
        blueprint,
        mfu=ASSUMED_MFU["torch" if config.run.kernels == "torch" and rt.device.type == "cuda" else rt.device.type],
        peak_flops=rt.peak_flops,
        dedup=parallel.dedup,
        capacity=parallel.room(),
    )
    return Job(
        folder=folder,
        origin=origin,
        rewinds=rewinds,
        corpus=corpus,
        identity=this,
        blueprint=blueprint,
        plan=planned,
    )


def begin(request: Request, job: Job, rt: process.Runtime, scope: ExitStack) -> Start:
    """Restore the newest checkpoint, or initialise the parameters, or take those of another run.

    Raises:  InputError when it does not fit the GPU, or the checkpoint is beyond the last step.
    """
    config, blueprint, ranks = request.config, job.blueprint, rt.ranks
    exchange = on_all_ranks(ranks, lambda: scope.enter_context(exchanging(config, ranks, rt.device)))
    clock = gpu.Clock(rt.device)
    if exchange is not None:
        exchange = attrs.evolve(exchange, within=clock.within)

    def restore_or_initialise() -> Start:
        check_memory(config, job.plan, rt.device)
        accumulator = Accumulator()
        state, env = blank(config, blueprint, rt, exchange, accumulator)
        restored = None
        if job.origin is not None:
            restored = resume.restore(
                request.world.fs, job.origin, state, blueprint, job.identity, request.accept, ranks
            )
        if restored is not None:
            state = restored.state
        else:
            initialise_(config, blueprint, state, rt)
            if config.train.warm_start is not None:
                where = address.resolved(config.train.warm_start, files.expanded(config.run.root))
                start = weights.of_path(request.world.fs, where, blueprint)
                resume.put_(state, blueprint, start, ranks)
        if state.step > config.train.steps:
            raise InputError(
                f"train.steps: expected at least the {state.step} steps taken, got {config.train.steps}; raise it, "
                "or name an earlier checkpoint as train.resume"
            )
        stream = job.corpus.stream
        needed = state.cursor + (config.train.steps - state.step) * config.train.batch_size
        if stream is not None and needed > stream.windows():
            raise InputError(
                f"train.steps: expected at most the {stream.windows()} sequences of the data mixture, of which "
                f"{state.cursor} are read, got {needed}; lower train.steps or train.batch_size, or raise the tokens of "
                "the flow"
            )
        return Start(state=state, env=env, exchange=exchange, accumulator=accumulator, clock=clock, restored=restored)

    return on_all_ranks(ranks, restore_or_initialise)


@attrs.frozen(kw_only=True)
class Place:
    """The run folder, as this attempt has it: nobody else writes into it.

    contents  text of each file that says what the attempt was started with, by name; of a new folder they are there
    """

    writer: Writer
    contents: Mapping[str, str]
    is_new: bool


def open_folder(request: Request, job: Job, start: Start, rt: process.Runtime, scope: ExitStack) -> Place:
    """Create the run folder if there is none, and open the writer of its checkpoints."""
    config, folder, ranks = request.config, job.folder, rt.ranks
    contents = {
        CONFIG: dump(config),
        SOURCES: "".join(f'"{path}" = {_quoted(source)}\n' for path, source in request.sources.items()),
        DIFF: provenance.code().diff,
        PROVENANCE: provenance.describe(
            rt.device,
            request.command,
            config=identity(config),
            memory=attrs.asdict(config.memory),
            tokenizer=job.identity.tokenizer,
            data=job.identity.data,
        ),
    }
    if job.rewinds:
        contents[LEFT_OUT] = rewind.dumped(job.rewinds)
    restored = start.restored
    is_new = rt.rank == 0 and not folder.exists()
    on_all_ranks(ranks, lambda: create_folder(folder.parent, folder.name, contents) if is_new else folder)
    writer = on_all_ranks(
        ranks,
        lambda: scope.enter_context(
            open_writer(
                request.world.fs,
                folder / CHECKPOINTS,
                keep=keep(config.checkpoint),
                parent=None if restored is None else restored.manifest,
                rank=rt.rank,
                world=rt.world,
                all_gather_text=ranks.background,
                pinned=config.memory.pinned,
            )
        ),
    )
    return Place(writer=writer, contents=contents, is_new=is_new)


def continue_folder(job: Job, start: Start, place: Place, rt: process.Runtime) -> Writer:
    """Make the run folder that of this attempt, and the disk hold a checkpoint of it."""
    restored, step, ranks = start.restored, start.state.step, rt.ranks

    def prepare() -> None:
        with files.refusing(job.folder, "a run folder one may write"):
            if not place.is_new:
                known = Validations() if restored is None else restored.validations
                attempt.fix(job.folder, step, validated=known.at(step), evaluated=known.evaluated == step)
                attempt.record(job.folder, place.writer.attempt, place.contents)
            tokenizer.save(job.corpus.tokenizer, job.folder)

    on_all_ranks(ranks, lambda: rt.rank or prepare())
    on_all_ranks(ranks, lambda: place.writer.reserve(resume.pieces(start.state, job.blueprint, ranks=ranks)))
    return place.writer


def open_session(
    request: Request, job: Job, start: Start, place: Place, connected: Connected, scope: ExitStack
) -> Session:
    """Open what writes and reads while the training runs, and say what is about to happen."""
    config, corpus, rt, step = request.config, job.corpus, connected.runtime, start.state.step
    writer = continue_folder(job, start, place, rt)
    log = scope.enter_context(open_log(job.folder, attempt=writer.attempt, rank=rt.rank))

    def overdue() -> None:
        log.event("end", status="interrupted", exit_code=signals.EXIT_PREEMPTED, error="the grace time was over")

    def closed() -> None:
        if stop.signal is None:
            stop.hear(signal.SIGPIPE)

    # From here on there is something to save, whatever ends the run.
    stop = scope.enter_context(signals.stop_on_signals(config.checkpoint.grace_s, overdue))
    console = scope.enter_context(open_console(job.folder, rt.rank))
    scope.enter_context(until_closed(closed, console))
    say("\n".join((banner(config, job.plan, corpus, job.folder), *_unmeasured(config, rt))))

    env = request.world.env(start.env)
    ahead = prefetching(
        corpus.read,
        batch_size=config.train.batch_size,
        depth=config.data.prefetch,
        device=rt.device,
        pinned=config.memory.pinned,
    )
    batches = scope.enter_context(ahead)
    clock = start.clock

    def mark(name: str) -> None:
        clock.mark(name)
        connected.heartbeat.beat()

    step_ = make_step(
        config,
        job.blueprint,
        env,
        rt,
        mark=mark,
        within=clock.within,
        before_update=writer.staged,
        exchange=start.exchange,
        accumulator=start.accumulator,
        scope=scope,
    )
    began = time.monotonic()
    flops, monitor = job.plan.flops.training(), None
    if rt.rank == 0:
        skipped, spikes = int(start.state.skipped.item()), int(start.state.spikes.item())
        history, on_gpu = History(nonfinite_steps=skipped, spike_steps=spikes), rt.device.type == "cuda"
        monitor = scope.enter_context(
            watching(config, log, flops=flops, world=rt.world, cuda=on_gpu, step=step, history=history)
        )
        log = monitor.log

    log.event(
        "start",
        pid=os.getpid(),
        steps=config.train.steps,
        parameters=job.plan.parameters.total,
        active_parameters=job.plan.parameters.active,
        ngram_baseline={"unigram": corpus.unigram, "bigram": corpus.bigram},
    )
    if start.restored is not None:
        report_origin(log, start.restored, job.rewinds)
    first_tokens = () if start.restored is None else start.restored.tokens_by_rank
    report = Report(
        config=config,
        rt=rt,
        log=log,
        flops=flops,
        began=began,
        first_step=step,
        first_tokens=first_tokens,
        monitor=monitor,
        exchange=start.exchange,
    )
    if corpus.stream is not None and rt.rank == 0:
        report.mixture(corpus.stream, start.state)
    saver = Saver(
        config.checkpoint,
        writer,
        log,
        pieces=lambda state: resume.pieces(state, job.blueprint, ranks=rt.ranks),
        meta=lambda state, validations: resume.meta(
            state, resume.count_tokens(first_tokens, state.tokens, rt.world), validations, job.identity
        ),
        saved_step=step,
    )
    return Session(
        config=config,
        blueprint=job.blueprint,
        runtime=rt,
        corpus=corpus,
        env=env,
        exchange=start.exchange,
        log=log,
        step=step_,
        read=request.world.read(batches),
        refusal=batches.refusal,
        verification=scope.enter_context(Verification(corpus.blocks)),
        report=report,
        saver=saver,
        judge=request.world.judge if config.eval.every else None,
        clock=clock,
        stop=stop,
        heartbeat=connected.heartbeat,
    )


def _unmeasured(config: Config, rt: process.Runtime) -> tuple[str, ...]:
    """What to say of the ops before the first step."""
    lines = ops.unmeasured(rt.device, config.model, kernels=config.run.kernels)
    return (fp8.said(config, rt.ranks.experts.size), *lines) if config.precision.kernels_fp8() else lines


def banner(config: Config, planned: Plan, corpus: Corpus, folder: Path) -> str:
    """What is about to happen, before step 0."""
    train_tokens = corpus.num_tokens
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    waiting = " ".join(f"{name}={os.environ.get(name, 'unset')}" for name in names)
    return "\n".join(
        (
            f"run            {folder}",
            render(config, planned),
            f"data           {quantity(train_tokens)} training tokens ({planned.tokens / train_tokens:.2f} passes)  "
            f"tokenizer {corpus.tokenizer.name} {corpus.tokenizer.identity[:12]} ({corpus.tokenizer.size} ids)",
            f"threads        {torch.get_num_threads()} on the CPU, {waiting}",
            f"n-grams        unigram {corpus.unigram:.4f} nats  bigram {corpus.bigram:.4f} nats on validation tokens",
        )
    )


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
