"""The sections of what is measured and written while a model trains."""

from __future__ import annotations

from typing import Literal

import attrs

from nmoe.config.setting import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, setting


@attrs.frozen(kw_only=True)
class Validation:
    """Loss on held-out documents."""

    every: int = setting(
        "steps between validations; one more at the end", unit="steps", low=1, high=MOST_STEPS, identity=False
    )
    tokens: int = setting("tokens a validation reads at most", unit="tokens", low=1, high=MOST_TOKENS, identity=False)


@attrs.frozen(kw_only=True)
class Sample:
    """A text that the model writes while it trains. One more is written at the end."""

    every: int = setting(
        "steps between samples; 0: at the end alone", default=0, unit="steps", low=0, high=MOST_STEPS, identity=False
    )
    prompt: str = setting("text that is continued", default="def ", identity=False)


@attrs.frozen(kw_only=True)
class Eval:
    """Tasks of `nmoe eval` that are scored while it trains. They are scored once more at the end."""

    every: int = setting(
        "steps between evaluations; 0: none", default=0, unit="steps", low=0, high=MOST_STEPS, identity=False
    )
    suite: Literal["all", "bits", "choices", "probes", "syntax", "programs", "human-eval"] = setting(
        "which tasks, as --suite of `nmoe eval`", default="choices", identity=False
    )
    limit: int = setting("items of a task at most", default=100, unit="items", low=2, high=10**6, identity=False)


@attrs.frozen(kw_only=True)
class Log:
    """What is printed and written, and when."""

    every: int = setting("steps between logged steps", default=10, unit="steps", low=1, high=MOST_STEPS, identity=False)
    arrays_every: int = setting(
        "logged steps between loads of every expert; fewer in a run that would have under 50 of them",
        default=10,
        unit="logged steps",
        low=1,
        high=MOST_STEPS,
        identity=False,
    )
    telemetry_every_s: float = setting(
        "time between readings of GPUs and host", default=5.0, unit="s", low=0.1, high=MOST_SECONDS, identity=False
    )
    heartbeat_every_s: float = setting(
        "time between replacements of run.json", default=5.0, unit="s", low=0.1, high=MOST_SECONDS, identity=False
    )
    footer: bool = setting("a live footer under the lines when they go to a terminal", default=True, identity=False)
    alert_spike: float = setting(
        "loss above the recent median that is an alert",
        default=8.0,
        unit="deviations",
        above=0.0,
        high=1e6,
        identity=False,
    )
    alert_dead: float = setting(
        "share of a layer's experts without a token that is an alert", default=0.1, low=0.0, high=1.0, identity=False
    )
    alert_drop: float = setting(
        "loss of throughput against the recent median that is an alert", default=0.5, low=0.0, high=1.0, identity=False
    )
    alert_wait: float = setting(
        "share of a step waiting for data that is an alert", default=0.2, low=0.0, high=1.0, identity=False
    )
    alert_disk_gb: float = setting(
        "free disk that is an alert", default=5.0, unit="GB", low=0.0, high=1e9, identity=False
    )
    alert_command: str | None = setting(
        "shell command run for each alert, JSON on its standard input; absent: none", default=None, identity=False
    )
    alert_timeout_s: float = setting(
        "time the command may take", default=30.0, unit="s", above=0.0, high=MOST_SECONDS, identity=False
    )
