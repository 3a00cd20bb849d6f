"""Run folders for the tests of the viewer: whole, resumed, crashed, lost, with values that are not finite, and bare."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BEGAN = datetime(2026, 11, 24, 6, 0, 0, tzinfo=UTC)
LAYERS, EXPERTS, TOKENS = [1, 2, 3], 16, 1024

CONFIG = """[model]
hidden_size = 128
num_layers = 4

[model.moe]
num_experts = {experts}
top_k = 2

[optim]
peak_lr = {lr}

[train]
steps = {steps}
"""


def at(seconds: float) -> str:
    """A time of the fixture, as runs write it."""
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def loss(step: int) -> float:
    """A curve with a spike of a single step, which thinning must keep."""
    return 2 + 6 / (1 + step / 30) + (7.5 if step == 77 else 0.0)


def loads(step: int, layer: int) -> list[int]:
    """Rows of each expert: uneven, and expert 5 of layer 2 is dead after step 100."""
    source = random.Random(1000 * step + layer)
    counts = [
        round(128 * math.exp(source.gauss(0, 0.25)) * (1.8 if expert == layer else 1)) for expert in range(EXPERTS)
    ]
    return [0 if (layer, expert) == (2, 5) and step > 100 else count for expert, count in enumerate(counts)]


def metrics(step: int, attempt: int = 1, elapsed: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of metrics of rank 0."""
    elapsed = step / 2 if elapsed is None else elapsed
    rows = [loads(step, layer) for layer in LAYERS]
    means = [sum(row) / len(row) for row in rows]
    experts = {
        "layer": LAYERS,
        "max_over_mean": [max(row) / mean for row, mean in zip(rows, means, strict=True)],
        "cv": [
            math.sqrt(sum((each - mean) ** 2 for each in row) / len(row)) / mean
            for row, mean in zip(rows, means, strict=True)
        ],
        "dead": [row.count(0) for row in rows],
        "entropy": [2.7 - 0.001 * step - 0.01 * layer for layer in LAYERS],
        "bias_min": [-0.0001 * step * layer for layer in LAYERS],
        "bias_max": [0.0001 * step * layer for layer in LAYERS],
    }
    return {
        "attempt": attempt,
        "time": at(elapsed),
        "step": step,
        "elapsed_s": elapsed,
        "tokens_global": TOKENS * step,
        "loss": loss(step),
        "grad_norm": 0.5 + 0.3 * math.sin(step / 9),
        "lr/dense": 0.001,
        "tokens_per_s": 2048.0 + step,
        "mfu": 0.31,
        "step_s": 0.5,
        "time/data_s": 0.01,
        "time/forward_s": 0.15,
        "time/backward_s": 0.25,
        "time/reduce_s": 0.06,
        "time/optimizer_s": 0.03,
        "exchange/bytes_per_s": 1.5e9 + 1e6 * step,
        "experts": experts,
    } | more


def telemetry(step: int, attempt: int = 1) -> dict[str, Any]:
    """A line of telemetry with two GPUs."""
    gpus = [
        {
            "index": index,
            "name": "NVIDIA H100 80GB HBM3",
            "uuid": f"GPU-{index}",
            "utilization": 90 + index,
            "memory_used_bytes": (60 + index) << 30,
            "memory_total_bytes": 80 << 30,
            "power_w": 600.5 + 10 * index + step % 7,
            "power_limit_w": 700,
            "temperature_c": 61 + index,
            "sm_clock_mhz": 1755,
            "memory_clock_mhz": 2619,
            "throttle": ["sw_power_cap"] if index else [],
            "ecc_corrected": 2 * index,
            "ecc_uncorrected": 0,
        }
        for index in range(2)
    ]
    host = {
        "cpu_percent": 31.5,
        "memory_used_bytes": 12 << 30,
        "memory_total_bytes": 64 << 30,
        "disk_free_bytes": 9 << 40,
    }
    return {"attempt": attempt, "time": at(step / 2), "elapsed_s": step / 2, "gpus": gpus, "host": host}


def event(name: str, seconds: float, /, **fields: Any) -> dict[str, Any]:
    """A line of events."""
    return {"time": at(seconds), "event": name, "attempt": 1} | fields


STAGES = {"pretrain": (900, 300, 0), "anneal": (500, 300, 200)}


def mixture(seconds: float, **more: Any) -> dict[str, Any]:
    """The plan of a mixture: windows of 128 tokens, 8 a step, two of three sources in the first stage."""
    sources = [{"name": name, "windows": windows} for name, windows in (("web", 5000), ("code", 400), ("books", 100))]
    stages = [{"name": name, "windows": list(quotas)} for name, quotas in STAGES.items()]
    told = {"step": 0, "cursor": 0, "batch_size": 8, "sequence_length": 128, "sources": sources, "stages": stages}
    return event("mixture", seconds, **(told | more))


def folder(root: Path, name: str, *, steps: int = 200, lr: float = 0.001, host: str | None = None) -> Path:
    """A run folder with what each has."""
    path = root / name
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG.format(experts=EXPERTS, lr=lr, steps=steps))
    provenance = f'command = "nmoe run"\n[hardware]\nhost = "{host or platform.node()}"\n'
    (path / "provenance.toml").write_text(provenance)
    return path


def record(path: Path, **fields: Any) -> None:
    """Write run.json."""
    told = {"name": path.name, "attempt": 1, "steps": 200, "heartbeat_every_s": 10, "host": platform.node()}
    told |= {"layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "tokens_per_step": TOKENS, "flops_per_token": 6e6}
    (path / "run.json").write_text(json.dumps(told | {"heartbeat": datetime.now(UTC).isoformat()} | fields))


def dead_pid() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as done:
        done.wait()
    return done.pid


CHECKPOINT = "step-00000100.0001-0002"
SAVED = {"bytes": 31_753_112, "seconds": 0.174012, "stall_s": 0.0312}
CONSOLE = "config         \x1b[1mquickstart\x1b[0m\nstep 1/200\rstep 2/200\nfinished       200 steps\n"
SCORES = {"arc_easy": {"value": 0.4125, "error": 0.0101, "count": 2376, "at": "2026-11-24T07:00:00+00:00"}}


def finished(root: Path, name: str = "finished", steps: int = 200) -> Path:
    """A run that told everything."""
    path = folder(root, name, steps=steps)
    record(path, status="finished", pid=1, step=steps)
    (path / "checkpoints" / CHECKPOINT).mkdir(parents=True)
    (path / "checkpoints" / CHECKPOINT / "manifest.json").write_text("{}")
    (path / "console.log").write_text(CONSOLE)
    (path / "evals.json").write_text(json.dumps(SCORES))
    append(path / "metrics.rank0.jsonl", (metrics(step) for step in range(1, steps + 1)))
    validations = [
        {"attempt": 1, "time": at(step / 2), "step": step, "elapsed_s": step / 2, "validation/loss": loss(step) + 0.1}
        for step in range(50, steps + 1, 50)
    ]
    append(path / "metrics.rank0.jsonl", validations)
    for rank in range(1, 4):
        slow = 0.1 if rank == 2 else 0.0
        lines = (
            {
                "attempt": 1,
                "step": step,
                "time/data_s": 0.01 + slow,
                "time/forward_s": 0.15,
                "time/backward_s": 0.25 + slow,
                "step_s": 0.5,
            }
            for step in range(1, steps + 1)
        )
        append(path / f"metrics.rank{rank}.jsonl", lines)
    append(
        path / "arrays.rank0.jsonl",
        (
            {"attempt": 1, "time": at(step / 2), "step": step, "tokens_global": TOKENS * step, "layers": LAYERS}
            | {"load": [loads(step, layer) for layer in LAYERS]}
            for step in range(10, steps + 1, 10)
        ),
    )
    append(path / "telemetry.rank0.jsonl", (telemetry(step) for step in range(0, steps, 10)))
    append(
        path / "events.jsonl",
        [
            event("start", 0, pid=1, steps=steps),
            event("gpus", 0.1, driver="570.86.15", cuda="12.8"),
            mixture(0.2),
            event("checkpoint", 25, step=50, **SAVED, checkpoint="step-00000050.0001-0001"),
            event("validation", 49, step=100, loss=loss(100) + 0.1, bits_per_byte=1.5, tokens=57_984),
            event("checkpoint", 50, step=100, **SAVED, checkpoint=CHECKPOINT),
            event("alert", 60, step=120, rule="dead", message="layer 2: 1 expert is dead", severity="warning"),
            event("sample", 70, step=140, prompt="def ", text="main():\n    return '<b>not markup</b>'"),
            event("validation", 99, step=steps, loss=loss(steps) + 0.1, bits_per_byte=1.25, tokens=4096),
            event("end", 100, step=steps, status="finished", exit_code=0),
        ],
    )
    return path


def resumed(root: Path) -> Path:
    """Killed at step 100, continued from 80, running: steps 81 to 100 are told twice, by losses 100 apart."""
    path = folder(root, "resumed", lr=0.002)
    # It runs as long as the tests of a module do: by a heartbeat every ten seconds it is lost after 35.
    record(path, status="running", pid=os.getpid(), step=150, attempt=2, heartbeat_every_s=3600)
    append(path / "metrics.rank0.jsonl", (metrics(step, loss=100 + loss(step)) for step in range(81, 81)))
    append(path / "metrics.rank0.jsonl", (metrics(step) for step in range(1, 81)))
    append(path / "metrics.rank0.jsonl", (metrics(step, loss=100 + loss(step)) for step in range(81, 101)))
    append(path / "metrics.rank0.jsonl", (metrics(step, 2, (step - 80) / 2) for step in range(81, 151)))
    append(
        path / "events.jsonl",
        [
            event("start", 0, pid=dead_pid(), steps=200),
            mixture(0.2),
            event("start", 60, pid=os.getpid(), steps=200, attempt=2),
            mixture(60.1, attempt=2, step=80, cursor=640, batch_size=4),
            event("resume", 60.1, step=80, attempt=2),
        ],
    )
    return path


def everything(root: Path) -> None:
    """One run of each kind."""
    finished(root)
    resumed(root)
    broken = folder(root, "nan-loss", lr=0.1)
    append(broken / "metrics.rank0.jsonl", (metrics(s, loss="nan" if s > 60 else loss(s)) for s in range(1, 71)))
    append(broken / "events.jsonl", [event("start", 0, pid=1, steps=200), event("nonfinite", 31, step=61, new=1)])
    append(broken / "events.jsonl", [event("end", 35, step=70, status="failed", exit_code=3, error="loss is finite")])
    crashed = folder(root, "crashed", lr=0.003)
    append(crashed / "metrics.rank0.jsonl", (metrics(step) for step in range(1, 41)))
    with open(crashed / "metrics.rank0.jsonl", "a") as file:
        file.write('not json\n{"attempt": 1, "step": 41, "loss": 1.')
    append(crashed / "events.jsonl", [event("start", 0, pid=dead_pid(), steps=200)])
    lost = folder(root, "lost", host="elsewhere")
    record(lost, status="running", pid=1, host="elsewhere", heartbeat=at(0))
    append(lost / "metrics.rank0.jsonl", (metrics(step) for step in range(1, 31)))
    append(lost / "events.jsonl", [event("start", 0, pid=1, steps=200)])
    folder(root, "bare")
