"""A plan as text, for one rank and for a machine of many GPUs, and as numbers for a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch

from nmoe.config import Config, Mixed, Model
from nmoe.config.check import cut_short, unproven
from nmoe.pure.cost.plan import Plan
from nmoe.pure.cost.scale import Scaled
from nmoe.pure.cost.traffic import Traffic
from nmoe.pure.parallel.exchange_arena import Fields
from nmoe.pure.units import counted, duration, quantity, time_of

Line = tuple[str, str]
"""What a line is about, and what it says."""

Grid = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows of a table."""

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
"""Aligns the cells of a table."""


def _aligned(*lines: Line) -> str:
    """Lines with what they are about in a column."""
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def alone(config: Config, taken: Scaled) -> str:
    """The plan of one GPU, and whether it fits; of a CPU, whose speed nobody knows before a run, without the time."""
    if config.run.device == "cpu":
        unknown = "not planned on a CPU: `nmoe run` measures the machine and says it"
        return _aligned(*_about(config, taken.plan), ("time", unknown))
    memory = quantity(taken.machine.memory, "B")
    verdict = f"fits into {memory}" if taken.fits() else f"DOES NOT FIT into {memory}"
    fit = _aligned(("machine", f"1 {taken.machine.gpu}: {verdict}"), *_to_fit(config, taken))
    return f"{render(config, taken.plan)}\n{fit}"


def _to_fit(config: Config, taken: Scaled) -> tuple[Line, ...]:
    """What makes a plan smaller that does not fit, of what the config has not done yet."""
    if taken.fits():
        return ()
    train = config.train
    changes = (
        "lower train.microbatch_size" if train.microbatch_size > 1 else "",
        'write train.recompute = "full"' if train.recompute != "full" else "",
        'write precision.moments = "bf16"' if config.precision.moments != "bf16" else "",
        "plan for more GPUs or larger ones",
    )
    return (("to fit", ", or ".join(filter(None, changes))),)


def render(config: Config, planned: Plan) -> str:
    """The plan of ranks that wait for nobody."""
    slower = ", as in bf16: emulated products take longer" if config.precision.emulate else ""
    return _aligned(
        *_about(config, planned),
        (
            "time",
            f"{duration(planned.seconds())} at {100 * planned.mfu:.0f} % of "
            f"{quantity(planned.peak_flops, 'FLOP/s')} a rank: "
            f"{quantity(planned.tokens_per_second())} tokens/s, {quantity(planned.flop_total, 'FLOP')} in all{slower}",
        ),
    )


def _about(config: Config, planned: Plan) -> tuple[Line, ...]:
    """What is trained, and what it takes of each rank."""
    c, train = config.model, config.train
    flops, memory = planned.flops, planned.memory
    forward = flops.total()
    mixtures = c.num_layers - c.num_dense_layers
    ahead = f" and {c.depth()} of multi-token prediction" if c.mtp else ""
    parts = "  ".join(f"{name} {100 * value / forward:.1f} %" for name, value in attrs.asdict(flops).items() if value)
    kinds = [
        f"{'optimizer states' if name == 'moments' else name} {quantity(value, 'B')}" if value else ""
        for name, value in attrs.asdict(memory).items()
    ]
    return (
        (
            "model",
            f"{c.num_layers} layers ({c.num_dense_layers} dense, {mixtures} MoE){ahead}  hidden {c.hidden_size}  "
            f"{_heads(c)}  {c.moe.num_experts} experts, top {c.moe.top_k}, "
            f"{c.moe.num_shared_experts} shared",
        ),
        (
            "parameters",
            f"{quantity(planned.parameters.total)} total  {quantity(planned.parameters.active)} active a token  "
            f"{quantity(planned.parameters.routed)} routed  {quantity(planned.parameters.embedding)} embedding",
        ),
        (
            "FLOPs a token",
            f"{quantity(flops.training(), 'FLOP')} training  {quantity(forward, 'FLOP')} forward (causal)  "
            f"{quantity(planned.flops_executed.training(), 'FLOP')} training as the reference executes it",
        ),
        ("", parts),
        *_precision(config, planned),
        (
            "ranks",
            f"{planned.ranks}  EP size {planned.expert_ranks}  {counted(planned.microbatches, 'microbatch', 'es')} of "
            f"{train.microbatch_size} x {train.sequence_length} a rank",
        ),
        *(("transport", text) for text in unproven(config)),
        ("memory a rank", f"{quantity(memory.total(), 'B')}  {'  '.join(filter(None, kinds[:4]))}"),
        ("", f"{'  '.join(filter(None, kinds[4:]))}  (activations are an estimate)"),
        (
            "checkpoint",
            f"{quantity(planned.checkpoint, 'B')}  written from one copy of {quantity(planned.staging, 'B')} in each "
            "rank's host memory",
        ),
        ("tokens", f"{quantity(planned.tokens)}  {train.steps} steps of {quantity(planned.tokens_per_step)}"),
        *(("schedule", text) for text in cut_short(config).values()),
    )


def _precision(config: Config, planned: Plan) -> tuple[Line, ...]:
    """What is multiplied in fewer bits than it is stored in; nothing where nothing is."""
    p = config.precision
    if not p.low():
        return ()
    share, how = planned.lowered / planned.flops.total(), ", emulated: right, and slow" if p.emulate else ""
    return (("precision", f"{p.compute} in {100 * share:.1f} % of the FLOPs, the experts; bf16 elsewhere{how}"),)


def _heads(c: Model) -> str:
    """Heads of the attention; of a mixed one the layers and heads of each part."""
    if not isinstance(c.attention, Mixed):
        return f"{c.attention.num_heads} heads"
    letters, parts = c.attention.letters(c.num_layers), c.attention.parts()
    return " + ".join(
        f"{letters.count(letter)} {part.kind} of {part.num_heads} heads" for letter, part in parts.items()
    )


def numbers(taken: Scaled, candidates: tuple[Scaled, ...], bests: tuple[Scaled, ...]) -> dict[str, Any]:
    """All of it, for a program: the plan that is taken, how it is arranged, and what it was compared with."""
    return {
        **attrs.asdict(taken.plan, value_serializer=_plain),
        "tokens_per_second": taken.tokens_per_second(),
        "seconds": taken.seconds(),
        "machine": attrs.asdict(taken.machine),
        "taken": _summary(taken),
        "choices": [_summary(choice) for choice in candidates],
        "sizes": [_summary(best) for best in bests],
    }


def _plain(owner: Any, field: Any, value: Any) -> Any:
    """A dtype by its name; everything else as it is."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _summary(s: Scaled) -> dict[str, Any]:
    """One arrangement in numbers."""
    values = attrs.asdict(s, filter=lambda field, _: field.name not in ("machine", "plan"))
    return {
        **values,
        "memory": s.plan.memory.total(),
        "fits": s.fits(),
        "step_s": s.step_s(),
        "mfu": s.mfu(),
        "tokens_per_second": s.tokens_per_second(),
        "seconds": s.seconds(),
    }


def screen(
    config: Config, taken: Scaled, candidates: tuple[Scaled, ...], bests: tuple[Scaled, ...], table: Table
) -> str:
    """Everything about a machine of several GPUs, on one screen; `table` aligns cells."""
    a, machine = taken.arrangement, taken.machine
    where = (
        f"{a.gpus} {machine.gpu} of {quantity(machine.memory, 'B')} on {_hosts_of(a.hosts)} of {a.per_host()}; "
        "in the next table two values are without | with dedup"
    )
    return _aligned(
        *_about(config, taken.plan),
        ("machine", where),
        *_named("EP size", table(*_compared(candidates)).splitlines()),
        *_in_detail(config, taken),
        *_named("other sizes", table(*_by_size(bests)).splitlines()),
        *_assumed(taken),
    )


def _hosts_of(number: int) -> str:
    """A number of hosts, in words."""
    return "1 host" if number == 1 else f"{number} hosts"


def _named(name: str, rows: Iterable[str]) -> tuple[Line, ...]:
    """Rows with their name before the first."""
    return tuple((name if place == 0 else "", row) for place, row in enumerate(rows))


def _compared(candidates: tuple[Scaled, ...]) -> Grid:
    """Ways to share out the experts: two candidates a line, without and with dedup."""
    head = ("GPUs", "hosts", "memory a GPU", "", "dispatch sends", "takes", "a step", "tokens/s")
    columns = (
        lambda s: quantity(s.plan.memory.total(), "B"),
        _verdict,
        lambda s: quantity(_total(s.dispatch), "B"),
        lambda s: time_of(s.dispatch_s),
        lambda s: time_of(s.step_s()),
        lambda s: quantity(s.tokens_per_second()),
    )
    rows = [
        (
            *(str(number) for number in (plain.arrangement.expert_ranks, plain.arrangement.expert_hosts())),
            *(_pair(show(plain), show(dedup)) for show in columns),
        )
        for plain, dedup in zip(candidates[::2], candidates[1::2], strict=True)
    ]
    return head, rows


def _verdict(s: Scaled) -> str:
    """Whether an arrangement fits into the memory of its GPUs."""
    return "fits" if s.fits() else "no"


def _pair(left: str, right: str) -> str:
    """Two values, without and with dedup; one where they read the same, one unit where they share it."""
    if left == right:
        return left
    number, _, unit = left.partition(" ")
    return f"{number if right.endswith(f' {unit}') else left} | {right}"


def _total(traffic: Traffic) -> float:
    """Bytes over both links."""
    return traffic.inside + traffic.between


def _sent(traffic: Traffic) -> str:
    """Bytes a GPU sends, by wire."""
    near, far = quantity(traffic.inside, "B"), quantity(traffic.between, "B")
    return f"{near} in its host, {far} to others" if traffic.between else f"{near} in its host"


def _in_detail(config: Config, s: Scaled) -> tuple[Line, ...]:
    """One arrangement."""
    a, planned, machine = s.arrangement, s.plan, s.machine
    why = "the fastest that fits" if s.fits() else f"DOES NOT FIT into {quantity(machine.memory, 'B')}"
    return (
        (
            "taken",
            f"EP size {a.expert_ranks} of {a.gpus} GPUs, on {_hosts_of(a.expert_hosts())}, "
            f"{'with' if a.dedup else 'without'} dedup: {why}",
        ),
        *_to_fit(config, s),
        (
            "exchange",
            f"dispatch {_sent(s.dispatch)}: {time_of(s.dispatch_s)}, {s.dispatches} a step; "
            f"a token reaches {planned.distinct:.2f} GPUs on average",
        ),
        *(
            (("", f"in bf16 in the backward pass {_sent(s.again)}: {time_of(s.again_s)}"),)
            if config.precision.kernels_fp8()
            else ()
        ),
        ("", f"combine {_sent(s.combine)}: {time_of(s.combine_s)}, {s.combines} a step"),
        (
            "",
            _symmetric_memory(planned.arena),
        ),
        *_once(s),
        ("gradients", f"reduce-scatter {_sent(s.reduce)}: {time_of(s.reduce_s)} a step"),
        ("parameters", f"all-gather {_sent(s.gather)}: {time_of(s.gather_s)} a step"),
        (
            "a step",
            f"{time_of(s.step_s())} = {time_of(s.compute_s)} compute + {time_of(s.exchange_s)} exchanges + "
            f"{time_of(s.reduce_exposed_s)} gradients + {time_of(s.gather_exposed_s)} parameters, as far as not hidden",
        ),
        (
            "time",
            f"{duration(s.seconds())} at {quantity(s.tokens_per_second())} tokens/s, {100 * s.mfu():.1f} % MFU of "
            f"{quantity(machine.peak_flops, 'FLOP/s')}; {duration(planned.seconds())} if everything were hidden",
        ),
    )


def _once(s: Scaled) -> tuple[Line, ...]:
    """What the exchange takes of a step where rows cross once to each host, beside the step of the other lines."""
    if s.arrangement.expert_hosts() == 1:
        return ()
    share, before = s.once_exchange_s / s.once_step_s(), s.exchange_s / s.step_s()
    return (
        (
            "once a host",
            f"dispatch {_sent(s.once)}: {time_of(s.once_s)}; exchanges {100 * share:.0f} % of a step of "
            f"{time_of(s.once_step_s())}, else {100 * before:.0f} %",
        ),
    )


def _by_size(bests: tuple[Scaled, ...]) -> Grid:
    """Numbers of GPUs, each with its best arrangement."""
    head = ("GPUs", "hosts", "EP size", "memory a GPU", "", "a step", "exposed", "tokens/s", "a GPU", "days")
    rows = [
        (
            *(str(number) for number in (s.arrangement.gpus, s.arrangement.hosts, s.arrangement.expert_ranks)),
            quantity(s.plan.memory.total(), "B"),
            _verdict(s),
            time_of(s.step_s()),
            f"{100 * (1 - s.compute_s / s.step_s()):.0f} %",
            quantity(s.tokens_per_second()),
            quantity(s.tokens_per_second() / s.arrangement.gpus),
            f"{s.seconds() / 86400:.1f}",
            quantity(s.seconds() / 3600 * s.arrangement.gpus),
        )
        for s in bests
    ]
    return (*head, "GPU hours"), rows


def _assumed(s: Scaled) -> tuple[Line, ...]:
    """What the figures rest on."""
    machine = s.machine
    links = (
        ("rows in a host", machine.push),
        ("NCCL in a host", machine.collective),
        ("between hosts", machine.network),
    )
    used = links if s.arrangement.hosts > 1 else links[:2]
    texts = (
        f"{name}: {time_of(wire.alpha_s)} + bytes / {quantity(wire.bytes_per_s, 'B/s')}, {wire.source}"
        for name, wire in used
    )
    return (
        *_named("links", texts),
        (
            "assumed",
            f"computing alone runs at {100 * s.plan.mfu:.0f} % MFU; routing is even; room for "
            f"{s.arrangement.capacity:g} x the mean rows; exchanges hide behind",
        ),
        ("", "nothing; gradients hide behind a microbatch's backward pass, parameters behind its forward pass"),
    )


def _symmetric_memory(arena: Fields | None) -> str:
    """Bytes of the exchange's arena, by kind; none on a single rank."""
    if arena is None:
        return f"symmetric memory {quantity(0, 'B')}"
    landing, combine = arena.land.size() + arena.land_gradient.size(), arena.back.size()
    sent = arena.sent.size() + arena.sent_back.size()
    staged = f"send buffers {quantity(sent, 'B')}  " if sent else ""
    return (
        f"symmetric memory {quantity(arena.allocated(), 'B')}: receive buffers {quantity(landing, 'B')}  combine "
        f"{quantity(combine, 'B')}  {staged}gates, indices, counts, flags "
        f"{quantity(arena.size - landing - combine - sent, 'B')}"
    )
