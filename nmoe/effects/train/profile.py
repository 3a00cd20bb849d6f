"""`nmoe run --profile`: a trace of a few steps, and the time of each part beside its FLOPs at the device's peak."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch.profiler import ProfilerActivity

from nmoe.config import Config
from nmoe.effects import files
from nmoe.effects.device import gpu
from nmoe.effects.terminal import say, table
from nmoe.effects.train.world import World, unchanged
from nmoe.errors import InputError
from nmoe.pure.cost.plan import plan
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import labelled

FIRST = 3
"""Steps before the trace: kernels are built, memory is allocated."""

STEPS = 3
"""Steps that are traced."""

PARTS = (
    *(
        "norm",
        "add_norm",
        "swiglu",
        "project",
        "query",
        "convolve",
        "attend",
        "route",
        "dispatch",
        "experts",
        "combine",
    ),
    *("linear_cross_entropy", "global_norm", "adamw_"),
)
"""Fields of the records of ops, and the parts kernels name inside them; of an exchange all that begin with its name."""

FLOPS: Mapping[str, str] = MappingProxyType(
    {"attend": "attention", "route": "router", "experts": "routed", "linear_cross_entropy": "head"}
)
"""Which FLOPs of a plan a part makes; the others move memory or are a part of the rest."""

BACKWARD = "autograd::engine::evaluate_function"
"""What the profiler calls a node of the backward pass; its sequence number is that of the forward op it belongs to."""


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


@contextmanager
def profiling(path: Path, config: Config) -> Iterator[World]:
    """Profile a run in the World yielded; after enough steps write the trace and print the times.

    path     of the trace, which must not exist yet; Chrome and Perfetto open it

    Raises:  InputError where it cannot be written, a step is replayed or the run takes too few steps.
    """
    check(path, config)
    on_gpu = config.run.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = torch.profiler.profile(activities=activities)
    watch = Watch(profiler=profiler, on_gpu=on_gpu)
    try:
        # A GPU's ops have their ranges, see `ops.build`.
        yield World(
            read=watch.reading, env=unchanged if on_gpu else lambda env: attrs.evolve(env, ops=labelled(env.ops))
        )
    finally:
        watch.end()
    if watch.steps == 0:
        raise InputError(
            f"--profile: expected a run of more than {FIRST} steps, got {watch.reads}; raise train.steps, or start a "
            "new run"
        )
    beside = path.with_name(f".{path.name}.part")
    profiler.export_chrome_trace(str(beside))
    os.replace(beside, path)
    device = gpu.device(config.run.device, kernels=config.run.kernels)
    floor = gpu.peak_flops(device, files.home(os.environ))
    say(
        breakdown(
            parts(profiler.events() or [], config, watch.steps, floor, on_gpu=on_gpu), watch.seconds / watch.steps
        )
    )
    say(f"trace          {path}; open it in chrome://tracing or https://ui.perfetto.dev")


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
    if config.parallel.ranks > 1:
        problems.append(f"--profile: expected one rank, got {config.parallel.ranks}; add --gpus 1")
    if config.train.steps <= FIRST:
        problems.append(
            f"--profile: expected a run of more than {FIRST} steps, got {config.train.steps}; raise train.steps"
        )
    if problems:
        raise InputError(*problems)


@attrs.define
class Watch:
    """Starts and stops the profiler at the head of a step, where a run reads its next batch."""

    profiler: Any
    on_gpu: bool
    reads: int = 0  # batches read, one a step
    steps: int = 0  # of these, traced to their end
    seconds: float = 0.0  # that they took
    began: float | None = None

    def reading(self, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """`read`, counted: it starts and stops the profiler."""

        def counted(cursor: int) -> Batch:
            if self.began is not None and self.reads == FIRST + STEPS:
                self.end()
            if self.reads == FIRST:
                self.wait()
                self.profiler.start()
                self.began = time.perf_counter()
            self.reads += 1
            return read(cursor)

        return counted

    def end(self) -> None:
        """Stop the profiler, if it runs."""
        if self.began is None:
            return
        self.wait()
        self.seconds, self.began = time.perf_counter() - self.began, None
        self.profiler.stop()
        self.steps = self.reads - FIRST

    def wait(self) -> None:
        """Synchronize with the device, so that the work of a step is counted in that step."""
        if self.on_gpu:
            torch.cuda.synchronize()


def parts(events: Sequence[Any], config: Config, steps: int, peak_flops: float, *, on_gpu: bool) -> tuple[Part, ...]:
    """Attribute the time of events to parts, longest first; the last part, `rest`, is all that has no name.

    An event belongs to the innermost name around it; in the backward pass, where there is none, to the name around the
    forward op of the same sequence number.

    events      the profiler's, of its CPU threads
    peak_flops  FLOP/s of the device
    """
    forward: dict[int, str] = {}
    for event in events:
        name, node = owner(event)
        if name is not None and node is None and event.sequence_nr >= 0:
            forward.setdefault(event.sequence_nr, name)
    spent: dict[tuple[str, bool], float] = {}
    for event in events:
        name, node = owner(event)
        if name is None and node is not None:
            name = forward.get(node.sequence_nr)
        key = (name or "rest", node is not None)
        spent[key] = spent.get(key, 0.0) + time_of(event, on_gpu) * 1e-6 / steps
    per_token = attrs.asdict(plan(config, make_blueprint(config), mfu=1.0, peak_flops=peak_flops).flops)
    tokens = config.train.batch_size * config.train.sequence_length
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


def owner(event: Any) -> tuple[str | None, Any]:
    """The innermost name around an event, and the node of the backward pass it lies in, if any."""
    name, node = None, None
    while event is not None:
        if name is None and (event.name in PARTS or event.name.startswith("exchange ")):
            name = event.name
        if event.name.startswith(BACKWARD):
            node = event
        event = event.cpu_parent
    return name, node


def time_of(event: Any, on_gpu: bool) -> float:
    """Microseconds of an event without those inside it: of the kernels it launched, or of the CPU."""
    return sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total


def breakdown(times: Sequence[Part], step_s: float) -> str:
    """Format the times of a step as a table.

    step_s   of a step, by the clock
    """
    rows = [_row(part, step_s) for part in times]
    idle_s = max(0.0, step_s - sum(part.total_s() for part in times))
    rows.append(("nothing runs", _ms(idle_s), "", _percent(idle_s, step_s), "", ""))
    head = ("profile", "forward", "backward", "share", "at best", "of it")
    note = f"a step took {_ms(step_s)} with the profiler on; at best: its FLOPs at the device's peak"
    return f"{table(head, rows, left=1)}\n{note}"


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
