"""The metrics schema: every name a line of metrics may hold, with its unit and what it means."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import attrs

Kind = Literal["place", "count", "value", "time", "layers"]
"""place: which line this is; count: a running total; value: what the training computed; time: what depends on the
machine and differs from run to run; layers: a table with one entry a mixture layer."""


Format = Literal["number", "count", "bytes", "percent"]
FORMATS = MappingProxyType[str, Format](
    {"B": "bytes", "B/s": "bytes", "B/step": "bytes", "tokens": "count", "tokens/s": "count", "steps": "count"}
)
"""Of the units whose numbers are shown with a prefix, as kilo or kibi."""


@attrs.frozen
class Metric:
    """One name, or the names of a pattern with `*`."""

    name: str
    unit: str
    kind: Kind
    doc: str

    def format(self) -> Format:
        """How a person reads it."""
        return "percent" if self.name == "mfu" else FORMATS.get(self.unit, "number")


METRICS = (
    Metric("attempt", "", "place", "which start of the run"),
    Metric("time", "UTC, ISO 8601", "place", "wall clock; a label, never a duration"),
    Metric("step", "steps", "place", "optimizer steps taken"),
    Metric("elapsed_s", "s", "time", "monotonic time since the start of the attempt"),
    Metric("tokens_global", "tokens", "count", "tokens read by all ranks"),
    Metric("tokens_local", "tokens", "count", "tokens read by this rank"),
    Metric("loss", "nats/token", "value", "cross entropy a target"),
    Metric("auxiliary_loss", "nats/token", "value", "weighted sequence-wise balance loss, and the attention's own"),
    Metric("lr/*", "1", "value", "learning rate of an optimizer group in this step"),
    Metric("grad_norm", "1", "value", "global norm of the gradient before the clip"),
    Metric("update_norm", "1", "value", "norm of the change of all parameters"),
    Metric("nonfinite_steps", "steps", "count", "skipped steps so far"),
    Metric("tokens_per_s", "tokens/s", "time", "throughput of all ranks, mean since the previous line"),
    Metric("mfu", "1", "time", "model FLOPs over peak FLOPs, mean since the previous line"),
    Metric("memory_bytes", "B", "time", "most memory this process has held, of the GPU or else of the host"),
    Metric("step_s", "s", "time", "a step without validation, mean since the previous line"),
    Metric("time/*_s", "s", "time", "a part of a step, mean since the previous line"),
    Metric("exchange/bytes", "B/step", "value", "written into the memory of other ranks, mean of the attempt"),
    Metric("exchange/bandwidth", "B/s", "time", "those bytes over the time of a step"),
    Metric("experts/layer", "", "place", "number of the layer"),
    Metric("experts/max_over_mean", "1", "layers", "load of the fullest expert over the mean load"),
    Metric("experts/cv", "1", "layers", "standard deviation of the loads over their mean"),
    Metric("experts/dead", "experts", "layers", "experts without a token"),
    Metric("experts/entropy", "nats", "layers", "entropy of the routing"),
    Metric("experts/bias_min", "1", "layers", "smallest router bias"),
    Metric("experts/bias_max", "1", "layers", "largest router bias"),
    Metric("validation/loss", "nats/token", "value", "loss over the validation split; on a line of its own"),
    Metric("validation/bits_per_byte", "bits/B", "value", "the same over the bytes of the text"),
)


def metric(name: str) -> Metric | None:
    """The entry of a name; None for a name outside the schema."""
    return next((entry for entry in METRICS if fnmatchcase(name, entry.name)), None)


def described(names: Iterable[str]) -> tuple[Metric, ...]:
    """Names with what the schema says of each, in its order; names outside the schema, as of an evaluation, last."""
    place = {entry: number for number, entry in enumerate(METRICS)}
    entries = [(metric(name), name) for name in names]
    entries.sort(key=lambda pair: len(place) if pair[0] is None else place[pair[0]])
    unknown = Metric("", "", "value", "")
    return tuple(attrs.evolve(entry or unknown, name=name) for entry, name in entries)


def names(fields: dict[str, Any]) -> tuple[str, ...]:
    """The names of a line of metrics; those of a table within it behind its own."""
    parts = [[f"{key}/{part}" for part in value] if isinstance(value, dict) else [key] for key, value in fields.items()]
    return tuple(name for part in parts for name in part)


def is_timed(name: str) -> bool:
    """Whether a metric differs between two runs that compute the same bits."""
    entry = metric(name)
    return entry is not None and (entry.kind == "time" or entry.name in ("attempt", "time"))


def table() -> str:
    """The schema as a table in Markdown."""
    rows = (f"| `{entry.name}` | {entry.unit} | {entry.kind} | {entry.doc} |" for entry in METRICS)
    return "\n".join(("| `metrics.rank0.jsonl` | unit | kind | meaning |", "|---|---|---|---|", *rows))
