"""`nmoe run --profile`: a trace of a few steps, and the time of each part beside its FLOPs at the device's peak."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch.profiler import ProfilerActivity

from nmoe.config import Config
from nmoe.effects.device.process import Runtime
from nmoe.effects.parallel.launch import from_environment
from nmoe.effects.parallel.ranks import on_all_ranks
from nmoe.effects.terminal import say, table
from nmoe.effects.train.world import World, unchanged
from nmoe.errors import InputError
from nmoe.pure.cost.plan import plan
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import labelled

FIRST = 3
"""Steps before the trace: kernels are built, memory is allocated, and before the last of them the profiler is loaded.
When it was loaded at the first traced step, the first all-reduce there took 456 ms on one of two H200, and the other
eight at most 0.05 ms; that wait was not in the other rank's time, so it was probably still loading."""

STEPS = 3
"""Steps that are traced."""

PARTS = (
    "norm",
    "add_norm",
    "swiglu",
    "project",
    "query",
    "convolve",
    "attend",
    "route",
    "report",
    "dispatch",
    "quantise",
    "experts",
    "shared",
    "combine",
    "linear_cross_entropy",
    "global_norm",
    "adamw_",
    "muon_",
    "reduce",
    "gather",
)
"""Fields of the records of ops, and the parts kernels name inside them; of an exchange all that begin with its name.
`reduce` and `gather` are the collectives of several ranks, with the waiting for those that come late."""

WAITING = frozenset({"exchange wait", "reduce", "gather"})
"""Parts in which a rank waits for the others: the slowest rank is the one with the most of all the rest."""

FLOPS: Mapping[str, str] = MappingProxyType(
    {"attend": "attention", "route": "router", "experts": "routed", "shared": "shared", "linear_cross_entropy": "head"}
)
"""Which FLOPs of a plan a part makes; the others move memory or are a part of the rest."""

BACKWARD = "autograd::engine::evaluate_function"
"""What the profiler calls a node of the backward pass; its sequence number is that of the forward op that made it."""

LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
"""Categories of a trace's events by which the host launches work: torch's kernels by the first, Triton's by both."""

KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of what a GPU runs; the events have the correlation of their launch."""


@attrs.frozen(kw_only=True)
class Part:
    """Time of one part of a step."""

    name: str
    forward_s: float
    backward_s: float
    floor_s: float | None  # at the peak rate of the device; None where not FLOPs are what counts

    def total_s(self) -> float:
        """Both passes."""
        return self.forward_s + self.backward_s


@attrs.frozen(kw_only=True)
class Profile:
    """Where the time of a rank's steps went."""

    step_s: float  # by the clock
    parts: tuple[Part, ...]

    def busy_s(self) -> float:
        """Of a step, but for what the rank waited for others in."""
        return sum(part.total_s() for part in self.parts if part.name not in WAITING)


@contextmanager
def profiling(path: Path, config: Config) -> Iterator[World]:
    """Profile a run in the World yielded; after enough steps, or at its end, write the traces and print the times.

    path     of the trace of rank 0, which must not exist yet; Chrome and Perfetto open it

    Raises:  InputError where it cannot be written, a step is replayed or the run takes too few steps.
    """
    own = path_of(path, from_environment(os.environ).rank)
    check(own, config)
    on_gpu = config.run.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    warmed = torch.profiler.schedule(wait=0, warmup=1, active=STEPS)
    profiler = torch.profiler.profile(activities=activities, schedule=warmed)
    watch = Watch(profiler=profiler, on_gpu=on_gpu)

    def report(runtime: Runtime) -> None:
        beside = own.with_name(f".{own.name}.part")
        profiler.export_chrome_trace(str(beside))
        os.replace(beside, own)
        seen = Profile(
            step_s=watch.seconds / watch.steps,
            parts=parts(_trace(own), config, watch.steps, runtime.peak_flops, on_gpu=on_gpu),
        )
        texts = runtime.ranks.all_gather_text(json.dumps(attrs.asdict(seen)))
        say(breakdown([_profile(json.loads(text)) for text in texts]))
        more = f", and of the other ranks as {path_of(path, 1).name}" if len(texts) > 1 else ""
        say(f"trace          {path}{more}; open it in chrome://tracing or https://ui.perfetto.dev")

    def begun(runtime: Runtime) -> None:
        watch.report = partial(report, runtime)

    def ended(runtime: Runtime) -> None:
        late = watch.warm
        watch.end()
        on_all_ranks(runtime.ranks, lambda: _check_steps(watch))
        if late:
            report(runtime)

    try:
        # A GPU's ops have their ranges, see `ops.build`.
        env = unchanged if on_gpu else lambda env: attrs.evolve(env, ops=labelled(env.ops))
        yield World(read=watch.reading, env=env, begun=begun, ended=ended)
    finally:
        watch.end()


def _trace(path: Path) -> Sequence[Mapping[str, Any]]:
    """The events of a trace; times are decimals, because nanoseconds since the machine's start do not fit a float."""
    return json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)["traceEvents"]


def path_of(path: Path, rank: int) -> Path:
    """The trace of a rank: beside that of rank 0, with its number."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def _check_steps(watch: Watch) -> None:
    if watch.steps == 0:
        raise InputError(
            f"--profile: expected a run of more than {FIRST} steps, got {watch.reads}; raise train.steps, or start a "
            "new run"
        )


def _profile(fields: Mapping[str, Any]) -> Profile:
    """A Profile as another rank sent it."""
    return Profile(step_s=fields["step_s"], parts=tuple(Part(**part) for part in fields["parts"]))


def check(path: Path, config: Config) -> None:
    """Refuse a run that would not end in a trace."""
    problems: list[str] = []
    if path.exists():
        problems.append(f"--profile: expected a file that is not there yet, got {path}; move it or name another")
    elif not path.parent.is_dir():
        problems.append(f"--profile: expected a file in an existing folder, got {path}; make {path.parent}")
    if config.train.graph:
        problems.append(
            "--profile: expected steps that are not replayed, got train.graph = true; add --train.graph=false"
        )
    if config.train.steps <= FIRST:
        problems.append(
            f"--profile: expected a run of more than {FIRST} steps, got {config.train.steps}; raise train.steps"
        )
    if problems:
        raise InputError(*problems)


def nothing() -> None:
    """Do nothing."""


@attrs.define
class Watch:
    """Loads, starts and stops the profiler at the head of a step, where a run reads its next batch."""

    profiler: Any
    on_gpu: bool
    reads: int = 0  # batches read, one a step
    steps: int = 0  # of these, traced to their end
    seconds: float = 0.0  # that they took
    warm: bool = False  # the profiler is loaded and must be stopped
    began: float | None = None
    report: Callable[[], None] = nothing  # called when as many steps as wanted are traced

    def reading(self, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """`read`, counted: it loads, starts and stops the profiler."""

        def counted(cursor: int) -> Batch:
            if self.began is not None and self.reads == FIRST + STEPS:
                self.end()
                self.report()
            if self.reads == FIRST - 1:
                self.profiler.start()
                self.warm = True
            elif self.reads == FIRST:
                self.wait()
                self.profiler.step()
                self.began = time.perf_counter()
            self.reads += 1
            return read(cursor)

        return counted

    def end(self) -> None:
        """Stop the profiler, if it runs."""
        if not self.warm:
            return
        self.wait()
        if self.began is not None:
            self.seconds, self.began = time.perf_counter() - self.began, None
            self.steps = self.reads - FIRST
        self.warm = False
        self.profiler.stop()

    def wait(self) -> None:
        """Synchronize with the device, so that the work of a step is counted in that step."""
        if self.on_gpu:
            torch.cuda.synchronize()


def parts(
    events: Sequence[Mapping[str, Any]], config: Config, steps: int, peak_flops: float, *, on_gpu: bool
) -> tuple[Part, ...]:
    """Attribute the time of a trace to parts, longest first; the last part, `rest`, is all that has no name.

    events      as of `attribute`
    peak_flops  FLOP/s of the device
    """
    spent = {key: us * 1e-6 / steps for key, us in attribute(events, on_gpu=on_gpu).items()}
    per_token = attrs.asdict(plan(config, make_blueprint(config), mfu=1.0, peak_flops=peak_flops).flops)
    tokens = config.train.batch_size * config.train.sequence_length // config.parallel.ranks  # of a rank
    named = sorted({name for name, _ in spent} | set(PARTS), key=lambda name: -total(spent, name))
    named = [*(name for name in named if name != "rest"), "rest"]
    others = sum(value for key, value in per_token.items() if key not in FLOPS.values())
    work = {name: per_token[FLOPS[name]] for name in named if name in FLOPS} | {"rest": others}
    return tuple(
        Part(
            name=name,
            forward_s=spent.get((name, False), 0.0),
            backward_s=spent.get((name, True), 0.0),
            floor_s=3 * tokens * work[name] / peak_flops if name in work else None,
        )
        for name in named
    )


def total(spent: Mapping[tuple[str, bool], float], name: str) -> float:
    """Of both passes."""
    return spent.get((name, False), 0.0) + spent.get((name, True), 0.0)


def attribute(events: Sequence[Mapping[str, Any]], *, on_gpu: bool) -> dict[tuple[str, bool], float]:
    """Microseconds by part and by whether they are the backward pass's.

    On a GPU a kernel belongs where the host launched it, because torch's profiler attaches kernels to operators, never
    to the ranges inside which Triton launches; on a CPU the time of an operator without those inside it counts. Either
    belongs to the innermost name around it on its thread, and in the backward pass, where there is none, to the name
    around the forward op that made the node.

    events  `traceEvents` of the Chrome trace that torch's profiler exports
    """
    cpu: list[Mapping[str, Any]] = []
    kernels: list[Mapping[str, Any]] = []
    for event in events:
        kind = event.get("cat")
        if kind in LAUNCHES or kind == "cpu_op" or _is_part(event):
            cpu.append(event)
        elif kind in KERNELS:
            kernels.append(event)
    nested = list(_nested(cpu))
    # An op that makes no node has the sequence number of the next that does: of all with a number the last made it.
    maker = {_number(event): _name(around) for event, around in nested if _node(around) is None}

    def owner(around: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
        """The part that the innermost of these events belongs to."""
        node = _node(around)
        made = None if node is None or (number := _number(node)) is None else maker.get(number)
        return _name(around) or made or "rest", node is not None

    spent: dict[tuple[str, bool], Any] = {}

    def spend(key: tuple[str, bool], us: Any) -> None:
        spent[key] = spent.get(key, 0) + us

    if on_gpu:
        at = {event["args"]["correlation"]: around for event, around in nested if event["cat"] in LAUNCHES}
        for kernel in kernels:
            spend(owner(at.get(kernel["args"]["correlation"], ())), kernel["dur"])
    else:
        for event, around in nested:
            spend(owner(around), event["dur"])
            if len(around) > 1:
                spend(owner(around[:-1]), -event["dur"])
    return {key: float(us) for key, us in spent.items()}


def _nested(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]]:
    """Each event, by its start, and the events around it on its thread, from the outermost to itself."""
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        around = threads.setdefault((event["pid"], event["tid"]), [])
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        around.append(event)
        yield event, tuple(around)


def _is_part(event: Mapping[str, Any]) -> bool:
    """Whether an event is a range that has the name of a part."""
    return event.get("cat") == "user_annotation" and (event["name"] in PARTS or event["name"].startswith("exchange "))


def _name(around: Sequence[Mapping[str, Any]]) -> str | None:
    """The innermost name around an event."""
    return next((event["name"] for event in reversed(around) if _is_part(event)), None)


def _node(around: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The outermost node of the backward pass around an event."""
    return next((event for event in around if event["name"].startswith(BACKWARD)), None)


def _number(event: Mapping[str, Any]) -> int | None:
    """The sequence number of an operator."""
    return event.get("args", {}).get("Sequence number")


def breakdown(profiles: Sequence[Profile]) -> str:
    """Format the times of a step, means over the ranks, as a table; of several ranks, the slowest in each part too.

    profiles  of each rank
    """
    count = len(profiles)
    step_s = sum(each.step_s for each in profiles) / count
    of_rank = [{part.name: part for part in each.parts} for each in profiles]
    names = {name: None for each in of_rank for name in each if name != "rest"} | {"rest": None}
    rows: list[tuple[str, ...]] = []
    spent_s = 0.0
    for name in names:
        found = [each.get(name) or Part(name=name, forward_s=0.0, backward_s=0.0, floor_s=None) for each in of_rank]
        mean = Part(
            name=name,
            forward_s=sum(part.forward_s for part in found) / count,
            backward_s=sum(part.backward_s for part in found) / count,
            floor_s=found[0].floor_s,
        )
        spent_s += mean.total_s()
        longest = max(range(count), key=lambda rank: found[rank].total_s())
        slowest = (f"{longest}: {_ms(found[longest].total_s())}",) if count > 1 else ()
        rows.append((*_row(mean, step_s), *slowest))
    beyond = ("nothing runs", step_s - spent_s) if spent_s < step_s else ("in overlap", spent_s - step_s)
    rows.append((beyond[0], _ms(beyond[1]), "", _percent(beyond[1], step_s), "", "", *([""] if count > 1 else [])))
    head = ("profile", "forward", "backward", "share", "at best", "of it", *(["slowest rank"] if count > 1 else []))
    notes = [f"a step took {_ms(step_s)} with the profiler on; at best: its FLOPs at the device's peak"]
    if count > 1:
        busy = [each.busy_s() for each in profiles]
        last = busy.index(max(busy))
        notes.append(
            f"slowest rank: {last}, {_ms(busy[last])} of its own work a step, {_ms(sum(busy) / count)} in the mean: "
            f"all but {', '.join(sorted(WAITING))}, where ranks wait for each other"
        )
    return "\n".join((table(head, rows, left=1), *notes))


def _row(part: Part, step_s: float) -> tuple[str, ...]:
    """The cells of one part."""
    best, reached = "", ""
    if part.floor_s is not None and part.total_s():
        best, reached = _ms(part.floor_s), _percent(part.floor_s, part.total_s())
    return part.name, _ms(part.forward_s), _ms(part.backward_s), _percent(part.total_s(), step_s), best, reached


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
