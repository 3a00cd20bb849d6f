"""`nmoe bench log`: what a logged step costs the trainer in metrics, expert loads, alerts, heartbeat and telemetry."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import attrs
import numpy as np
import torch

from nmoe.config import Config
from nmoe.effects.record.log import open_log
from nmoe.effects.record.monitor import watching
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.watch import metrics
from nmoe.pure.watch.alerts import History

PAUSE_S = 0.005
"""Between two reports: a step, in which the threads have their turn."""


def log(config: Config, steps: int) -> int:
    """Write `steps` reports of a config's shape to a temporary run folder and print how long each held the trainer.

    The figures are made up and already on the host, so that nothing of a device is in the time.
    """
    if steps < 100:
        raise InputError(
            f"--steps: expected at least 100, or there is no 99th percentile, got {steps}; 1000 is a good start"
        )
    c = config.model
    layers = list(c.mixtures())
    load = torch.arange(len(layers) * c.moe.num_experts).reshape(len(layers), -1) + 1000
    values = [0.0123456789] * len(layers)
    experts = metrics.Experts(
        layer=layers,
        max_over_mean=values,
        cv=values,
        dead=[0] * len(layers),
        entropy=values,
        bias_min=values,
        bias_max=values,
    )
    step_0 = metrics.Step(
        rank=metrics.Rank(
            step=0,
            elapsed_s=0.1,
            tokens_local=1,
            memory_bytes=1,
            step_s=0.1,
            times={"data": 0.01},
            exchange_bytes=None,
            exchange_bandwidth=None,
        ),
        tokens_global=1,
        loss=2.0,
        mtp_losses={},
        auxiliary_loss=0.0,
        rates={"dense": 1e-3},
        grad_norm=1.0,
        update_norm=1.0,
        nonfinite_steps=0,
        spike_steps=0,
        tokens_per_s=1e5,
        mfu=0.1,
        experts=experts,
    )
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, open_log(Path(folder), attempt=1) as opened:
        cuda = config.run.device == "cuda"
        with watching(config, opened, flops=1, world=1, cuda=cuda, step=0, history=History()) as monitor:
            for step in range(1, steps + 1):
                line = attrs.evolve(step_0, rank=attrs.evolve(step_0.rank, step=step))
                begin = time.perf_counter()
                monitor.log.metrics(**metrics.fields(line))
                monitor.step(line, load)
                seconds.append(time.perf_counter() - begin)
                time.sleep(PAUSE_S)
    middle, high = np.percentile(seconds, (50, 99))
    say(
        f"log            {1000 * middle:.3f} ms a report, {1000 * high:.3f} ms at the 99th percentile  "
        f"{len(layers)} layers x {c.moe.num_experts} experts, loads every {config.log.arrays_every}"
    )
    return 0
