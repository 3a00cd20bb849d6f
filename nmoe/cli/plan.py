"""`nmoe plan`: print what a config will cost, on one GPU or on a machine that somebody thinks of renting."""

from __future__ import annotations

from functools import partial

import attrs

from nmoe.config import Config, validate
from nmoe.config.check import unrunnable
from nmoe.effects.terminal import say, say_json, table
from nmoe.errors import InputError
from nmoe.pure.cost.machines import MACHINES, Machine
from nmoe.pure.cost.report import alone, numbers, screen
from nmoe.pure.cost.scale import Arrangement, Scaled, best, choices, scale


def main(config: Config, gpus: int, hosts: int | None, machine: str, mfu: float | None, as_json: bool) -> int:
    """Print the plan of `config` on GPUs of a kind; without `parallel.experts`, of the fastest number that fits.

    mfu      of the computation alone; None: what was measured on such a GPU
    hosts    they are in; None: as few as the kind's hosts allow
    returns  exit code: 0, or 1 when it does not fit into the memory of the GPUs
    Raises:  InputError with everything that is wrong with the options.
    """
    check(config, gpus, hosts, machine, mfu)
    experts = config.parallel.experts
    kind = MACHINES[machine]
    mfu = kind.mfu if mfu is None else mfu
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
        say_json(numbers(taken, candidates, bests))
    elif gpus == 1:
        say(alone(config, taken))
    else:
        say(screen(config, taken, candidates, bests, partial(table, left=0)))
    as_planned = attrs.evolve(config.parallel, experts=taken.arrangement.expert_ranks)
    for problem in () if as_json else unrunnable(attrs.evolve(config, parallel=as_planned), gpus):
        say("planned only   " + problem.replace("; ", f"\n{'':<15}"))
    if not as_json and taken.arrangement.expert_hosts() > 1 and config.parallel.transport == "proxy":
        say('transport      "proxy" sends by a thread and TCP, slower than these links: no network has run it')
    return 0 if taken.fits() or (gpus == 1 and config.run.device == "cpu") else 1


def check(config: Config, gpus: int, hosts: int | None, machine: str, mfu: float | None) -> None:
    """Refuse options that make no sense, all of them at once."""
    problems: list[str] = []
    if gpus < 1:
        problems.append(f"--gpus: expected at least 1, got {gpus}; say how many ranks to plan for")
    if mfu is not None and not 0 < mfu <= 1:
        problems.append(f"--mfu: expected a share above 0 and at most 1, got {mfu}; leave it out for what was measured")
    if machine not in MACHINES:
        problems.append(f"--machine: expected one of {', '.join(MACHINES)}, got {machine}; write one of them")
    if hosts is not None and (hosts < 1 or gpus % hosts):
        problems.append(
            f"--hosts: expected a divisor of the {gpus} GPUs, got {hosts}; every host has as many GPUs as another"
        )
    per_host = 8 if machine not in MACHINES else MACHINES[machine].gpus_per_host
    if hosts is None and gpus > per_host and gpus % per_host:
        problems.append(f"--gpus: expected a multiple of the {per_host} GPUs of a host, got {gpus}; say --hosts too")
    experts = config.parallel.experts
    if not problems and experts is not None:
        there = gpus // (hosts or -(-gpus // per_host))
        possible = sorted({1, *choices(gpus=gpus, hosts=gpus // there, num_experts=config.model.moe.num_experts)})
        if experts not in possible:
            problems.append(
                f"parallel.experts: expected GPUs that hold equal parts of {config.model.moe.num_experts} experts, "
                f"within a host or on whole hosts, one of {', '.join(map(str, possible))}, got {experts}; write one of "
                "them"
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
