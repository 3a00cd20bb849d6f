"""Alerts: rules over the metrics of a run. State goes in and comes out; an alert is returned when its rule begins to
hold, and again only after it has ceased to."""

from __future__ import annotations

import math
import statistics

import attrs

WINDOW = 50
"""Reports that a spike or a drop is measured against."""

ENOUGH = 10
"""Reports in the window before anything is compared with it."""


@attrs.frozen(kw_only=True)
class Limits:
    """When each rule holds."""

    spike: float  # loss above the window's median, in deviations
    dead: float  # share of a layer's experts without a token
    drop: float  # share of the window's median throughput that is lost
    wait: float  # share of a step spent waiting for data
    disk_bytes: float  # free where the run is written


@attrs.frozen(kw_only=True)
class Observation:
    """What one report says."""

    step: int
    loss: float
    grad_norm: float
    nonfinite_steps: int  # since the start
    spike_steps: int  # since the start, those that were skipped
    dead: float  # largest share of a layer's experts without a token
    tokens_per_s: float
    wait: float  # share of a step spent waiting for data
    disk_bytes: float


@attrs.frozen(kw_only=True)
class History:
    """What the rules remember of earlier reports."""

    losses: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    nonfinite_steps: int = 0
    spike_steps: int = 0
    holding: frozenset[str] = frozenset()


@attrs.frozen(kw_only=True)
class Alert:
    """One thing a person should look at."""

    rule: str
    severity: str  # "error" or "warning"
    message: str


def judge(limits: Limits, history: History, latest: Observation) -> tuple[History, tuple[Alert, ...]]:
    """Apply every rule to one report.

    returns  the history with this report, and the alerts whose rule holds now and did not before
    """
    alerts = tuple(
        alert
        for alert in (
            _nonfinite(history, latest),
            _spike(limits, history, latest),
            _skipped(history, latest),
            _dead(limits, latest),
            _drop(limits, history, latest),
            _wait(limits, latest),
            _disk(limits, latest),
        )
        if alert is not None
    )
    after = History(
        losses=_recent(history.losses, latest.loss),
        rates=_recent(history.rates, latest.tokens_per_s),
        nonfinite_steps=max(history.nonfinite_steps, latest.nonfinite_steps),
        spike_steps=max(history.spike_steps, latest.spike_steps),
        holding=frozenset(alert.rule for alert in alerts),
    )
    return after, tuple(alert for alert in alerts if alert.rule not in history.holding)


def _recent(values: tuple[float, ...], value: float) -> tuple[float, ...]:
    """The window with one more value; what is not finite is left out, or it would hide every later spike."""
    return (*values, value)[-WINDOW:] if math.isfinite(value) else values


def _nonfinite(history: History, latest: Observation) -> Alert | None:
    if (
        math.isfinite(latest.loss)
        and math.isfinite(latest.grad_norm)
        and latest.nonfinite_steps <= history.nonfinite_steps
    ):
        return None
    return Alert(
        rule="nonfinite",
        severity="error",
        message=f"loss {latest.loss}, gradient norm {latest.grad_norm}, "
        f"{latest.nonfinite_steps} non-finite steps so far",
    )


def _spike(limits: Limits, history: History, latest: Observation) -> Alert | None:
    if len(history.losses) < ENOUGH or not math.isfinite(latest.loss):
        return None
    middle = statistics.median(history.losses)
    # 1.4826 makes the median deviation of a normal distribution its standard deviation; a floor for flat windows
    spread = max(1.4826 * statistics.median(abs(loss - middle) for loss in history.losses), 0.01 * abs(middle))
    if latest.loss <= middle + limits.spike * spread:
        return None
    return Alert(
        rule="spike",
        severity="warning",
        message=f"loss {latest.loss:.4f} against a median of {middle:.4f}, over {limits.spike:g} deviations above",
    )


def _skipped(history: History, latest: Observation) -> Alert | None:
    if latest.spike_steps <= history.spike_steps:
        return None
    return Alert(
        rule="skipped_spike",
        severity="warning",
        message=f"steps skipped as spikes: {latest.spike_steps - history.spike_steps}, so far {latest.spike_steps}",
    )


def _dead(limits: Limits, latest: Observation) -> Alert | None:
    if latest.dead <= limits.dead:
        return None
    return Alert(
        rule="dead_experts",
        severity="warning",
        message=f"{100 * latest.dead:.0f} % of a layer's experts got no token, over {100 * limits.dead:g} %",
    )


def _drop(limits: Limits, history: History, latest: Observation) -> Alert | None:
    if len(history.rates) < ENOUGH:
        return None
    usual = statistics.median(history.rates)
    if latest.tokens_per_s >= (1 - limits.drop) * usual:
        return None
    return Alert(
        rule="throughput",
        severity="warning",
        message=f"{latest.tokens_per_s:.0f} tokens/s against a median of {usual:.0f}",
    )


def _wait(limits: Limits, latest: Observation) -> Alert | None:
    if latest.wait <= limits.wait:
        return None
    return Alert(
        rule="loader_wait",
        severity="warning",
        message=f"{100 * latest.wait:.0f} % of the step waits for data, over {100 * limits.wait:g} %",
    )


def _disk(limits: Limits, latest: Observation) -> Alert | None:
    if latest.disk_bytes >= limits.disk_bytes:
        return None
    return Alert(
        rule="disk",
        severity="error",
        message=f"{latest.disk_bytes / 1e9:.1f} GB free where the run is written, under {limits.disk_bytes / 1e9:g} GB",
    )
