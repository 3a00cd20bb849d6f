"""What keeps a job from being printed, and what its objects are called."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.errors import InputError
from nmoe.pure.cluster.job import label, plan_job
from tests.pure.cluster.jobs import RUN_RULE, config


@pytest.mark.parametrize(
    ("hosts", "per_host", "ranks", "experts", "remedy"),
    [
        (2, 8, 8, 8, "= 8, got 2 * 8 = 16; write --hosts 1 or add --parallel.ranks=16"),
        (1, 8, 32, 8, "= 32, got 1 * 8 = 8; write --hosts 4 or add --parallel.ranks=8"),
        (2, 8, 12, 4, "= 12, got 2 * 8 = 16; write --gpus-per-host 6 or add --parallel.ranks=16"),
        (5, 8, 12, 4, "= 12, got 5 * 8 = 40; add --parallel.ranks=40"),
        (0, 8, 8, 8, "got 0 of 8; raise them"),
        (1, -1, 8, 8, "got 1 of -1; raise them"),
    ],
)
def test_hosts_times_gpus_are_the_ranks(hosts: int, per_host: int, ranks: int, experts: int, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        plan_job(config(ranks=ranks, experts=experts), hosts, per_host, {})
    (problem,) = error.value.problems
    assert problem.startswith("--hosts: expected ") and problem.endswith(remedy)


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        (None, "expected at most the 4 ranks of one host, got 8; add --parallel.experts=4"),
        (8, "expected at most the 4 ranks of one host, got 8; add --parallel.experts=4"),
    ],
)
def test_experts_over_several_hosts_are_refused(experts: int | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        plan_job(config(ranks=8, experts=experts), 2, 4, {})


def test_neighbours_lie_on_one_host() -> None:
    with pytest.raises(InputError, match="parallel.experts: expected a divisor of the 6 ranks of a host, got 4"):
        plan_job(config(ranks=12, experts=4), 2, 6, {})


def test_a_run_without_a_name_could_not_be_restarted() -> None:
    with pytest.raises(InputError, match="^run.name: expected a name, got nothing; add --run.name=NAME"):
        plan_job(config(name=None), 1, 8, {})


@given(st.from_regex(RUN_RULE, fullmatch=True))
def test_names_are_dns_labels(name: str) -> None:
    # with the longest suffix and a host's index it has to stay one
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label(name))
    assert len(f"{label(name)}-prep-65535") <= 63


@given(st.lists(st.from_regex(RUN_RULE, fullmatch=True), min_size=2, max_size=2, unique=True))
def test_names_of_two_runs_differ(names: list[str]) -> None:
    assert label(names[0]) != label(names[1])


@pytest.mark.parametrize(("one", "other"), [("a.b", "a-b"), ("A", "a"), ("a" * 50 + "1", "a" * 50 + "2")])
def test_names_that_nearly_agree_differ(one: str, other: str) -> None:
    assert label(one) != label(other)
