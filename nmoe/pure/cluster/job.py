"""A training on several hosts, as any scheduler starts it, and what keeps one from being started."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping

import attrs

from nmoe.config import Config
from nmoe.config.check import beyond_hosts
from nmoe.errors import InputError

EXIT_AGAIN = 75
"""Exit code of a run that the same command resumes (docs/architecture.md)."""

EXITS_FOR_GOOD = (2, 5, 6)
"""Exit codes after which the same command would end in the same way: bad input, steps that are not finite, no room."""

LAST_RANK_S = 10
"""Seconds that a launcher waits for its ranks after their grace time."""

MARGIN_S = 15
"""Seconds between the end of the grace time and SIGKILL of the launcher, which needs some after its last rank."""

LONGEST_LABEL = 40
"""Characters of a name that objects of Kubernetes get; with suffix and index a host name may have 63."""


@attrs.frozen(kw_only=True)
class Job:
    """A training on hosts of equally many ranks.

    name       of the run, which a restarted job resumes by
    variables  of the environment that every rank has
    """

    config: Config
    name: str
    hosts: int
    per_host: int
    variables: Mapping[str, str]

    def end_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return math.ceil(self.config.checkpoint.grace_s) + MARGIN_S

    def environment(self) -> dict[str, str]:
        """Variables of every launcher and rank: torchrun, from torch 2.12 on, kills no rank before its grace time is
        over; before, after 30 s."""
        patience = math.ceil(self.config.checkpoint.grace_s) + LAST_RANK_S
        return {**self.variables, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience)}

    def gpus(self) -> int:
        """GPUs of a host."""
        return self.per_host if self.config.run.device == "cuda" else 0


def label(name: str) -> str:
    """What objects of a run are called: a DNS label of RFC 1035, another one for every name of a run."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain == name and len(plain) <= LONGEST_LABEL:
        return f"nmoe-{plain}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return "-".join(filter(None, ("nmoe", plain[: LONGEST_LABEL - 9].strip("-"), digest)))


def plan_job(config: Config, hosts: int, per_host: int, variables: Mapping[str, str]) -> Job:
    """The job of a valid config.

    Raises:  InputError with everything that keeps the ranks from being so many, on these hosts.
    """
    if problems := [*_problems(config, hosts, per_host)]:
        raise InputError(*problems)
    return Job(config=config, name=config.run.name or "", hosts=hosts, per_host=per_host, variables=variables)


def _problems(config: Config, hosts: int, per_host: int) -> Iterator[str]:
    ranks, got = config.parallel.ranks, hosts * per_host
    if hosts < 1 or per_host < 1:
        yield f"--hosts: expected at least 1 host of 1 GPU, got {hosts} of {per_host}; raise them"
    elif got != ranks:
        if ranks % per_host == 0:
            remedy = f"write --hosts {ranks // per_host} or "
        elif ranks % hosts == 0:
            remedy = f"write --gpus-per-host {ranks // hosts} or "
        else:
            remedy = ""
        yield (
            f"--hosts: expected hosts * GPUs of a host = parallel.ranks = {ranks}, got {hosts} * {per_host} = {got}; "
            f"{remedy}add --parallel.ranks={got}"
        )
    else:
        yield from beyond_hosts(config.parallel.experts or ranks, per_host, config.parallel.transport)
    if config.run.name is None:
        yield "run.name: expected a name, got nothing; add --run.name=NAME, a restarted job finds its run by it"


def torchrun(job: Job, config: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments of nmoe-torchrun on every host, but for the number of the host and where the first one listens.

    config     CONFIG of `nmoe run`
    overrides  its other arguments
    """
    launcher = (f"--nnodes={job.hosts}", f"--nproc-per-node={job.per_host}")
    return (*launcher, "-m", "nmoe", "run", config, *overrides)
