"""`nmoe plan`: print what a config will cost, on one GPU or on a machine that somebody thinks of renting."""

from __future__ import annotations

import json
from typing import Any

import attrs

from nmoe.config import Config, validate
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.cost.machines import MACHINES, Machine
from nmoe.pure.cost.report import Line, about, aligned, duration, quantity, render
from nmoe.pure.cost.scale import Arrangement, Scaled, best, choices, scale
from nmoe.pure.cost.traffic import Traffic
from nmoe.pure.parallel.exchange_arena import Fields


def main(
    config: Config, gpus: int, hosts: int | None, experts: int | None, machine: str, mfu: float, as_json: bool
) -> int:
    """Print the plan of `config` on GPUs of a kind.

    hosts    they are in; None: as few as the kind's hosts allow
    experts  GPUs that share out one set of experts; None: the fastest number that fits
    Raises:  InputError with everything that is wrong with the options.
    """
    check(config, gpus, hosts, experts, machine, mfu)
    kind = MACHINES[machine]
    hosts = hosts or -(-gpus // kind.gpus_per_host)
    candidates = scaled(config, kind, gpus=gpus, hosts=hosts, mfu=mfu)
    wanted = candidates if experts is None else scaled(config, kind, gpus=gpus, hosts=hosts, mfu=mfu, experts=experts)
    taken = best(wanted)
    per_host = gpus // hosts if hosts > 1 else kind.gpus_per_host
    bests = tuple(
        best(candidates if n == gpus else scaled(config, kind, gpus=n, hosts=max(1, n // per_host), mfu=mfu))
        for n in sizes(config, gpus=gpus, per_host=per_host)
    )
    if as_json:
        say(json.dumps(numbers(taken, candidates, bests), indent=2))
    elif gpus == 1:
        say(render(config, taken.plan))
    else:
        say(screen(config, taken, candidates, bests))
    return 0


def check(config: Config, gpus: int, hosts: int | None, experts: int | None, machine: str, mfu: float) -> None:
    """Refuse options that make no sense, all of them at once."""
    problems: list[str] = []
    if gpus < 1:
        problems.append(f"--gpus: at least 1, got {gpus}; say how many ranks to plan for")
    if not 0 < mfu <= 1:
        problems.append(f"--mfu: a share above 0 and at most 1, got {mfu}; 0.4 is a good start")
    if machine not in MACHINES:
        problems.append(f"--machine: one of {', '.join(MACHINES)}, got {machine}; write one of them")
    if hosts is not None and (hosts < 1 or gpus % hosts):
        problems.append(f"--hosts: a divisor of the {gpus} GPUs, got {hosts}; every host has as many GPUs as another")
    per_host = 8 if machine not in MACHINES else MACHINES[machine].gpus_per_host
    if hosts is None and gpus > per_host and gpus % per_host:
        problems.append(f"--gpus: a multiple of the {per_host} GPUs of a host, got {gpus}; say --hosts too")
    if not problems and experts is not None:
        there = gpus // (hosts or -(-gpus // per_host))
        possible = sorted({1, *choices(gpus=gpus, hosts=gpus // there, num_experts=config.model.moe.num_experts)})
        if experts not in possible:
            problems.append(
                f"--experts: GPUs that hold equal parts of {config.model.moe.num_experts} experts, within a host or on "
                f"whole hosts, one of {', '.join(map(str, possible))}, got {experts}; write one of them"
            )
    if problems:
        raise InputError(*problems)


def scaled(
    config: Config, machine: Machine, *, gpus: int, hosts: int, mfu: float, experts: int | None = None
) -> tuple[Scaled, ...]:
    """The ways to share out the experts, each without and with dedup. What `[parallel]` says of them is read here."""
    possible = choices(gpus=gpus, hosts=hosts, num_experts=config.model.moe.num_experts)
    return tuple(
        scale(
            config,
            Arrangement(gpus=gpus, hosts=hosts, expert_ranks=ranks, dedup=dedup, capacity=config.parallel.room()),
            machine,
            mfu=mfu,
        )
        for ranks in (possible if experts is None else (experts,))
        for dedup in (False, True)
    )


def sizes(config: Config, *, gpus: int, per_host: int) -> tuple[int, ...]:
    """Numbers of GPUs to compare: twice as many, as many, half as many and so on, for which the config is valid."""
    return tuple(
        n
        for n in (2 * gpus >> halvings for halvings in range(7) if 2 * gpus % 2**halvings == 0)
        if (n % per_host == 0 or n < per_host) and not validate(config, n)
    )


def numbers(taken: Scaled, candidates: tuple[Scaled, ...], bests: tuple[Scaled, ...]) -> dict[str, Any]:
    """All of it, for a program: the plan that is taken, how it is arranged, and what it was compared with."""
    return {
        **attrs.asdict(taken.plan),
        "tokens_per_second": taken.tokens_per_second(),
        "seconds": taken.seconds(),
        "machine": attrs.asdict(taken.machine),
        "taken": summary(taken),
        "choices": [summary(each) for each in candidates],
        "sizes": [summary(each) for each in bests],
    }


def summary(s: Scaled) -> dict[str, Any]:
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


def screen(config: Config, taken: Scaled, candidates: tuple[Scaled, ...], bests: tuple[Scaled, ...]) -> str:
    """Everything about a machine of several GPUs, on one screen."""
    a, machine = taken.arrangement, taken.machine
    where = (
        f"{a.gpus} {machine.gpu} of {quantity(machine.memory, 'B')} on {hosts_of(a.hosts)} of {a.per_host()}; "
        "in the next table two values are without | with dedup"
    )
    return aligned(
        *about(config, taken.plan),
        ("machine", where),
        *table("experts over", compared(candidates)),
        *in_detail(taken),
        *table("other sizes", by_size(bests)),
        *assumed(taken),
    )


def hosts_of(number: int) -> str:
    """A number of hosts, in words."""
    return "1 host" if number == 1 else f"{number} hosts"


def table(name: str, rows: tuple[str, ...]) -> tuple[Line, ...]:
    """Rows with their name before the first."""
    return tuple((name if place == 0 else "", row) for place, row in enumerate(rows))


def compared(candidates: tuple[Scaled, ...]) -> tuple[str, ...]:
    """Ways to share out the experts: two candidates a line, without and with dedup."""
    head = (
        f"{'GPUs':>4} {'hosts':>5} {'memory a GPU':>15}      {'dispatch sends':>15} {'takes':>15} {'a step':>16} "
        f"{'tokens/s':>15}"
    )
    rows = [head]
    for both in zip(candidates[::2], candidates[1::2], strict=True):
        a = both[0].arrangement
        memory, sends, takes, step, speed = (
            pair(*(show(each) for each in both))
            for show in (
                lambda s: quantity(s.plan.memory.total(), "B"),
                lambda s: quantity(total(s.dispatch), "B"),
                lambda s: time_of(s.dispatch_s),
                lambda s: time_of(s.step_s()),
                lambda s: quantity(s.tokens_per_second()),
            )
        )
        fits = pair(*("fits" if each.fits() else "no" for each in both))
        rows.append(
            f"{a.expert_ranks:>4} {a.expert_hosts():>5} {memory:>15} {fits:<4} {sends:>15} {takes:>15} {step:>16} "
            f"{speed:>15}"
        )
    return tuple(rows)


def pair(left: str, right: str) -> str:
    """Two values, without and with dedup; one where they read the same, one unit where they share it."""
    if left == right:
        return left
    number, _, unit = left.partition(" ")
    return f"{number if right.endswith(f' {unit}') else left} | {right}"


def time_of(seconds: float) -> str:
    """A time of three digits in s, ms or us."""
    if seconds == 0:
        return "0 s"
    for limit, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def total(traffic: Traffic) -> float:
    """Bytes over both wires."""
    return traffic.inside + traffic.between


def sent(traffic: Traffic) -> str:
    """Bytes a GPU sends, by wire."""
    near, far = quantity(traffic.inside, "B"), quantity(traffic.between, "B")
    return f"{near} in its host, {far} to others" if traffic.between else f"{near} in its host"


def symmetric_memory(arena: Fields | None) -> str:
    """Bytes of the exchange's arena, by kind; none on a single rank."""
    if arena is None:
        return f"symmetric memory {quantity(0, 'B')}"
    landing, combine = arena.land.size() + arena.land_gradient.size(), arena.back.size()
    return (
        f"symmetric memory {quantity(arena.allocated(), 'B')}: landing {quantity(landing, 'B')}  combine "
        f"{quantity(combine, 'B')}  gates, indices, counts, flags {quantity(arena.size - landing - combine, 'B')}"
    )


def in_detail(s: Scaled) -> tuple[Line, ...]:
    """One arrangement."""
    a, planned, machine = s.arrangement, s.plan, s.machine
    why = "the fastest that fits" if s.fits() else f"DOES NOT FIT into {quantity(machine.memory, 'B')}"
    return (
        (
            "taken",
            f"experts over {a.expert_ranks} of {a.gpus} GPUs on {hosts_of(a.expert_hosts())}, "
            f"{'with' if a.dedup else 'without'} dedup: {why}",
        ),
        (
            "exchange",
            f"dispatch {sent(s.dispatch)}: {time_of(s.dispatch_s)}, {s.dispatches} a step; "
            f"a token reaches {planned.distinct:.2f} GPUs on average",
        ),
        ("", f"combine {sent(s.combine)}: {time_of(s.combine_s)}, {s.combines} a step"),
        (
            "",
            symmetric_memory(planned.arena),
        ),
        ("gradients", f"reduce-scatter {sent(s.reduce)}: {time_of(s.reduce_s)} a step"),
        ("parameters", f"all-gather {sent(s.gather)}: {time_of(s.gather_s)} a step"),
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


def by_size(bests: tuple[Scaled, ...]) -> tuple[str, ...]:
    """Numbers of GPUs, each with its best arrangement."""
    rows = [
        f"{'GPUs':>4} {'hosts':>5} {'experts over':>12} {'memory a GPU':>12}      {'a step':>8} {'waits':>6} "
        f"{'tokens/s':>9} {'a GPU':>8} {'days':>7} {'GPU hours':>10}"
    ]
    for each in bests:
        a = each.arrangement
        rows.append(
            f"{a.gpus:>4} {a.hosts:>5} {a.expert_ranks:>12} {quantity(each.plan.memory.total(), 'B'):>12} "
            f"{'fits' if each.fits() else 'no':<4} {time_of(each.step_s()):>8} "
            f"{100 * (1 - each.compute_s / each.step_s()):>4.0f} % {quantity(each.tokens_per_second()):>9} "
            f"{quantity(each.tokens_per_second() / a.gpus):>8} {each.seconds() / 86400:>7.1f} "
            f"{quantity(each.seconds() / 3600 * a.gpus):>10}"
        )
    return tuple(rows)


def assumed(s: Scaled) -> tuple[Line, ...]:
    """What the figures rest on."""
    machine = s.machine
    wires = (
        ("rows in a host", machine.push),
        ("NCCL in a host", machine.collective),
        ("between hosts", machine.network),
    )
    used = wires if s.arrangement.hosts > 1 else wires[:2]
    texts = (
        f"{name}: {time_of(wire.alpha_s)} + bytes / {quantity(wire.bytes_per_s, 'B/s')}, {wire.source}"
        for name, wire in used
    )
    return (
        *table("wires", tuple(texts)),
        (
            "assumed",
            f"computing alone runs at {100 * s.plan.mfu:.0f} % MFU; routing is even; room for "
            f"{s.arrangement.capacity:g} x the mean rows; exchanges hide behind",
        ),
        ("", "nothing; gradients hide behind a microbatch's backward pass, parameters behind its forward pass"),
    )
