"""A config and its job, for the tests of schedulers."""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import strategies as st

from nmoe.config import Config, load
from nmoe.pure.cluster.job import Job, plan_job
from tests.configs import ROOT

MOONLIGHT = load(ROOT / "configs" / "moonlight.toml", {}, ()).config
TEXTS = st.text(
    st.sampled_from("$()`'\"\\ \n!*x") | st.characters(exclude_characters="\0", exclude_categories=("Cs",)),
    min_size=1,
    max_size=20,
)
"""What no shell and no template takes for itself, half of it what they look for."""

RUN_RULE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def config(*, ranks: int = 8, experts: int | None = None, grace_s: float = 30.0, **run: Any) -> Config:
    run = {"name": "first", **run}
    return attrs.evolve(
        MOONLIGHT,
        parallel=attrs.evolve(MOONLIGHT.parallel, ranks=ranks, experts=experts),
        checkpoint=attrs.evolve(MOONLIGHT.checkpoint, grace_s=grace_s),
        run=attrs.evolve(MOONLIGHT.run, **run),
    )


def job(hosts: int = 1, per_host: int = 8, **changes: Any) -> Job:
    return plan_job(config(ranks=hosts * per_host, experts=1, **changes), hosts, per_host, {"A": "b 'c' \"d\" $E"})
