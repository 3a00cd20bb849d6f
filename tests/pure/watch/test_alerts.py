"""Alerts: each rule begins to hold, is told once, ceases, and is told again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nmoe.pure.watch.alerts import ENOUGH, Alert, History, Limits, Observation, judge

LIMITS = Limits(spike=8.0, dead=0.1, drop=0.3, wait=0.2, disk_bytes=5e9)
GOOD: dict[str, Any] = dict(
    loss=2.0, grad_norm=1.0, nonfinite_steps=0, spike_steps=0, dead=0.1, tokens_per_s=100.0, wait=0.2, disk_bytes=5e9
)


def told(*reports: dict[str, Any]) -> list[tuple[Alert, ...]]:
    history, alerts = History(), []
    for step, report in enumerate(reports):
        history, new = judge(LIMITS, history, Observation(step=step, **{**GOOD, **report}))
        alerts.append(new)
    return alerts


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("nonfinite", {"loss": math.nan}),
        ("nonfinite", {"grad_norm": math.inf}),
        ("spike", {"loss": 2.2}),
        ("dead_experts", {"dead": 0.11}),
        ("throughput", {"tokens_per_s": 69.0}),
        ("loader_wait", {"wait": 0.21}),
        ("disk", {"disk_bytes": 4.9e9}),
    ],
)
def test_a_rule_is_told_when_it_begins_to_hold(rule: str, bad: dict[str, Any]) -> None:
    alerts = told(*[{}] * ENOUGH, bad, bad, {}, bad)
    assert [[alert.rule for alert in each] for each in alerts[ENOUGH:]] == [[rule], [], [], [rule]]
    assert not any(alerts[:ENOUGH])


def test_steps_that_were_skipped_between_reports_are_told() -> None:
    alerts = told({}, {"nonfinite_steps": 1}, {"nonfinite_steps": 1}, {"nonfinite_steps": 2})
    assert [[alert.rule for alert in each] for each in alerts] == [[], ["nonfinite"], [], ["nonfinite"]]


def test_spikes_that_were_skipped_between_reports_are_told() -> None:
    alerts = told({}, {"spike_steps": 1}, {"spike_steps": 1}, {"spike_steps": 3})
    assert [[alert.rule for alert in each] for each in alerts] == [[], ["skipped_spike"], [], ["skipped_spike"]]
    assert alerts[3][0].message == "steps skipped as spikes: 2, so far 3"


def test_a_loss_that_is_not_finite_hides_no_later_spike() -> None:
    alerts = told(*[{}] * ENOUGH, *[{"loss": math.nan}] * 100, {}, {"loss": 9.0})
    assert [[alert.rule for alert in each] for each in alerts[-2:]] == [[], ["spike"]]


def test_nothing_is_compared_with_too_little() -> None:
    assert told(*[{}] * (ENOUGH - 1), {"loss": 9.0, "tokens_per_s": 1.0})[-1] == ()


def test_a_flat_window_makes_no_spike_of_a_ripple() -> None:
    assert told(*[{}] * ENOUGH, {"loss": 2.1})[-1] == ()
