"""Names of the files and folders of a run folder, for whoever writes and whoever reads them."""

from __future__ import annotations

CONFIG = "config.toml"
SOURCES = "sources.toml"
PROVENANCE = "provenance.toml"
DIFF = "code.diff"
"""What the checkout differed in from the commit in PROVENANCE; empty where it did not."""
RUN = "run.json"
EVENTS = "events.jsonl"
CONSOLE = "console.log"
"""What the first rank said on the screen, of all attempts."""
ARRAYS = "arrays.rank0.jsonl"
TELEMETRY = "telemetry.rank0.jsonl"
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights.safetensors"
EVALS = "evals.json"
"""Scores of `nmoe eval`, by task."""
ATTEMPTS = "attempts"
"""Folder of what config.toml and the like were in each attempt before the newest."""

LEFT_OUT = "left_out.json"
"""Rewinds of a run: which sequences of the stream are read no more."""

NOTES = "notes.json"
"""What people wrote about a run in the dashboard."""

TRACK = "track"
"""Folder of how far each target of `nmoe track` has come."""

ALL_METRICS = "metrics.rank*.jsonl"
"""Pattern of the metrics of every rank."""

OF_STEPS = ("metrics.rank", "arrays.rank")
"""First part of the names of files whose lines belong to a step."""


def metrics(rank: int) -> str:
    """The file of a rank's metrics."""
    return f"metrics.rank{rank}.jsonl"


METRICS = metrics(0)
"""The metrics that all ranks have in common."""
