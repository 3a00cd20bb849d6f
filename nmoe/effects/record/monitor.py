"""What watches a run: heartbeat, telemetry, loads of every expert, alerts, footer; opened and closed together."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
from torch import Tensor

from nmoe.config import Config
from nmoe.config.sections import Log as LogConfig
from nmoe.effects.record import alert_command, footer, heartbeat, telemetry
from nmoe.effects.record.alive import process_start
from nmoe.effects.record.log import LineFile, Log, now, open_lines
from nmoe.effects.record.names import ARRAYS, TELEMETRY
from nmoe.effects.terminal import say, warn
from nmoe.errors import InputError
from nmoe.pure.watch.alerts import History, Limits, Observation, judge
from nmoe.pure.watch.metrics import Step

GB = 1e9

LEAST_LOADS = 50
"""Columns of a heat map over time: a run with fewer shows no trend."""


class Monitor:
    """Takes what each report tells. Its `log` is the run's, with this as its listener."""

    def __init__(
        self,
        config: Config,
        log: Log,
        heart: heartbeat.Heart,
        foot: footer.Footer,
        arrays: LineFile,
        aside: Executor,
        history: History,
    ) -> None:
        self.log = attrs.evolve(log, heard=self._hear)
        self._config = config
        self._heart = heart
        self._foot = foot
        self._arrays = arrays
        self._arrays_every = arrays_every(config.log, config.train.steps)
        self._aside = aside
        self._writing: Future[None] | None = None  # the last line of loads
        self._history = history
        self._reports = 0
        self._disk_bytes = float("inf")  # until telemetry tells
        self._commands: list[threading.Thread] = []
        self._limits = Limits(
            spike=config.log.alert_spike,
            dead=config.log.alert_dead,
            drop=config.log.alert_drop,
            wait=config.log.alert_wait,
            disk_bytes=config.log.alert_disk_gb * GB,
        )

    def step(self, line: Step, load: Tensor) -> None:
        """Take one report.

        load    [L E] i64, on the host

        Raises:  InputError when the loads before could not be written.
        """
        step = line.rank.step
        self._heart.update(step=step, status="running")
        self._foot.step(step, line.loss)
        if self._reports % self._arrays_every == 0:
            header = {"attempt": self.log.attempt, "time": now(), "step": step, "tokens_global": line.tokens_global}
            self._written()
            # aside, for tens of thousands of counts take long to become text; a copy, for the trainer reuses its own
            self._writing = self._aside.submit(self._whole, {**header, "layers": line.experts.layer}, load.clone())
        self._reports += 1
        observation = Observation(
            step=step,
            loss=line.loss,
            grad_norm=line.grad_norm,
            nonfinite_steps=line.nonfinite_steps,
            spike_steps=line.spike_steps,
            dead=max(line.experts.dead, default=0) / self._config.model.moe.num_experts,
            tokens_per_s=line.tokens_per_s,
            wait=line.rank.times.get("data", 0.0) / line.rank.step_s,
            disk_bytes=self._disk_bytes,
        )
        self._history, alerts = judge(self._limits, self._history, observation)
        for alert in alerts:
            self._alert({"rule": alert.rule, "step": step, "message": alert.message, "severity": alert.severity})

    def reading(self, file: LineFile, fields: Mapping[str, Any]) -> None:
        """Take one reading of the machine. Writes: telemetry.rank0.jsonl."""
        self._disk_bytes = fields["host"]["disk_free_bytes"]
        self.log.append(file, fields)

    def settle(self) -> None:
        """Wait for the loads being written and the alert commands that still run; each has its timeout.

        Raises:  InputError when the loads could not be written, once.
        """
        for thread in self._commands:
            thread.join()
        self._written()

    def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _whole(self, fields: Mapping[str, Any], load: Tensor) -> None:
        # counts are finite integers: no need to look at each for one that JSON cannot hold
        self._arrays.append(json.dumps({**fields, "load": load.tolist()}))

    def notice(self, name: str, **fields: Any) -> None:
        """Append an event about the watching itself: where it cannot be written either, a warning is all."""
        try:
            self.log.event(name, **fields)
        except InputError as error:
            warn(f"nmoe: {name}: {fields.get('error', '')}; {error}")

    def _alert(self, alert: Mapping[str, Any]) -> None:
        self.log.event("alert", **alert)
        say(f"alert          {alert['rule']} at step {alert['step']}: {alert['message']}")
        command = self._config.log.alert_command
        if command is None:
            return

        def failed(problem: str) -> None:
            self.notice("alert_command_failed", error=problem)

        self._commands = [thread for thread in self._commands if thread.is_alive()]
        message = {"event": "alert", "run": self.log.folder.name, **alert}
        self._commands.append(alert_command.start(command, message, self._config.log.alert_timeout_s, failed))

    def _hear(self, event: Mapping[str, Any]) -> None:
        self._foot.event(event)
        if event["event"] == "end":
            self._heart.update(status=event["status"], **({"step": event["step"]} if "step" in event else {}))


def arrays_every(log: LogConfig, steps: int) -> int:
    """Logged steps between loads of every expert; fewer than configured where `steps` would have under 50 of them."""
    return min(log.arrays_every, max(1, steps // log.every // LEAST_LOADS))


@contextmanager
def watching(
    config: Config, log: Log, *, flops: int, world: int, cuda: bool, step: int, history: History
) -> Iterator[Monitor]:
    """Watch a run while the block lasts.

    flops    of training, a token
    step     the attempt begins after
    history  what was skipped until then, which is no news
    """
    settings, c = config.log, config.model
    heart = heartbeat.Heart(
        {
            "name": log.folder.name,
            "status": "starting",
            "attempt": log.attempt,
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "host": platform.node(),
            "step": step,
            "steps": config.train.steps,
            "started": now(),
            "heartbeat_every_s": settings.heartbeat_every_s,
            "world": world,
            "layers": list(c.mixtures()),
            "num_experts": c.moe.num_experts,
            "top_k": c.moe.top_k,
            "tokens_per_step": config.train.batch_size * config.train.sequence_length,
            "flops_per_token": flops,
        },
        now,
    )
    with ExitStack() as scope:
        arrays = scope.enter_context(open_lines(log.folder / ARRAYS))
        readings = scope.enter_context(open_lines(log.folder / TELEMETRY))
        foot = scope.enter_context(footer.shown(config.train.steps, wanted=settings.footer))
        aside = scope.enter_context(ThreadPoolExecutor(1, thread_name_prefix="loads"))
        monitor = Monitor(config, log, heart, foot, arrays, aside, history)
        scope.callback(monitor.settle)

        def append(fields: Mapping[str, Any]) -> None:
            monitor.reading(readings, fields)

        def failed(problem: str) -> None:
            monitor.notice("heartbeat_failed", error=problem)

        scope.enter_context(heartbeat.beating(log.folder, heart, settings.heartbeat_every_s, failed))
        scope.enter_context(
            telemetry.sampling(log.folder, settings.telemetry_every_s, cuda=cuda, append=append, event=monitor.notice)
        )
        yield monitor
