"""The metrics schema: every name a line of metrics may hold, with its unit and what it means.

The trainer fills these records, so it can log nothing that is not here; readers ask `metric` about a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

import attrs

from nmoe.pure.units import quantity

Kind = Literal["place", "count", "value", "time", "layers"]
"""place: which line this is; count: a running total; value: what the training computed; time: what depends on the
machine and differs from run to run; layers: a table with one entry an MoE layer."""


Format = Literal["number", "count", "bytes", "percent"]
FORMATS = MappingProxyType[str, Format](
    {"B": "bytes", "B/s": "bytes", "B/step": "bytes", "tokens": "count", "tokens/s": "count", "steps": "count"}
)
"""Of the units whose numbers are shown with a prefix, as kilo or kibi."""


Layers = Literal["", "max", "sum"]


@attrs.frozen
class Metric:
    """One name, or the names of a pattern with `*`."""

    name: str
    unit: str
    kind: Kind
    doc: str
    screen: str = ""  # how a line on the screen has it, with `{}` for the number; empty: it does not
    rank: int = 0  # a narrow screen leaves out the greatest first
    layers: Layers = ""  # what the screen shows of a table with one entry an MoE layer
    bad_above: float | None = None  # a value that a page marks is greater
    best: Literal["", "min", "max"] = ""  # which value is the best; empty: there is no better and worse

    def format(self) -> Format:
        """How a person reads it."""
        return "percent" if self.name == "mfu" else FORMATS.get(self.unit, "number")

    def text(self, value: float) -> str:
        """A value as a part of a line on the screen."""
        match self.format():
            case "count":
                return self.screen.format(quantity(value))
            case "bytes":
                return self.screen.format(quantity(value, "B"))
            case "percent":
                return self.screen.format(100 * value)
            case _:
                return self.screen.format(value)


@attrs.frozen(kw_only=True)
class Line:
    """What each line of metrics holds."""

    step: Annotated[int, Metric("step", "steps", "place", "optimizer steps taken")]
    elapsed_s: Annotated[float, Metric("elapsed_s", "s", "time", "monotonic time since the start of the attempt")]


@attrs.frozen(kw_only=True)
class Rank(Line):
    """What a rank reports of itself."""

    tokens_local: Annotated[int, Metric("tokens_local", "tokens", "count", "tokens read by this rank")]
    memory_bytes: Annotated[
        int,
        Metric(
            "memory_bytes",
            "B",
            "time",
            "most memory this process has held, of the GPU or else of the host",
            "mem {}",
            9,
        ),
    ]
    step_s: Annotated[float, Metric("step_s", "s", "time", "a step without validation, mean since the previous line")]
    times: Annotated[
        Mapping[str, float],
        Metric(
            "time/*_s",
            "s",
            "time",
            "a part of a step, mean since the previous line: data, gather, forward, exchange, backward, reduce, "
            "optimizer, log, checkpoint",
        ),
    ]
    exchange_bytes: Annotated[
        float | None,
        Metric("exchange/bytes", "B/step", "value", "written into the memory of other ranks in this step"),
    ]
    exchange_bandwidth: Annotated[
        float | None, Metric("exchange/bandwidth", "B/s", "time", "those bytes over the mean time of a step")
    ]


@attrs.frozen(kw_only=True)
class Experts:
    """How the work is divided among experts, one entry an MoE layer."""

    layer: Annotated[Sequence[int], Metric("experts/layer", "", "place", "number of the layer")]
    max_over_mean: Annotated[
        Sequence[float],
        Metric(
            *("experts/max_over_mean", "1", "layers"),
            "load of the fullest expert over the mean load: 1 more than the max violation, MaxVio",
            *("max/mean {:.2f}", 7, "max"),
        ),
    ]
    cv: Annotated[
        Sequence[float], Metric("experts/cv", "1", "layers", "standard deviation of the loads over their mean")
    ]
    dead: Annotated[
        Sequence[int],
        Metric("experts/dead", "experts", "layers", "experts without a token", "dead {:.0f}", 6, "sum", bad_above=0),
    ]
    entropy: Annotated[Sequence[float], Metric("experts/entropy", "nats", "layers", "entropy of the routing")]
    bias_min: Annotated[Sequence[float], Metric("experts/bias_min", "1", "layers", "smallest router bias")]
    bias_max: Annotated[Sequence[float], Metric("experts/bias_max", "1", "layers", "largest router bias")]


@attrs.frozen(kw_only=True)
class Step:
    """What the first rank reports of a step."""

    tokens_global: Annotated[int, Metric("tokens_global", "tokens", "count", "tokens read by all ranks")]
    loss: Annotated[
        float, Metric("loss", "nats/token", "value", "cross entropy a target", "loss {:.4f}", 1, best="min")
    ]
    mtp_losses: Annotated[
        Mapping[str, float],
        Metric(
            *("mtp/loss_*", "nats/token", "value"),
            "cross entropy a target of one depth of multi-token prediction: 1 predicts the token after the next",
            "mtp {:.4f}",
            6,
            best="min",
        ),
    ]
    auxiliary_loss: Annotated[
        float,
        Metric("auxiliary_loss", "nats/token", "value", "weighted sequence-wise balance loss, and the attention's own"),
    ]
    grad_norm: Annotated[
        float, Metric("grad_norm", "1", "value", "global norm of the gradient before the clip", "gnorm {:.3f}", 4)
    ]
    update_norm: Annotated[float, Metric("update_norm", "1", "value", "norm of the change of all parameters")]
    rates: Annotated[
        Mapping[str, float],
        Metric("lr/*", "1", "value", "learning rate of an optimizer group in this step", "lr {:.1e}", 5),
    ]
    nonfinite_steps: Annotated[int, Metric("nonfinite_steps", "steps", "count", "skipped steps so far")]
    spike_steps: Annotated[int, Metric("spike_steps", "steps", "count", "steps skipped as spikes so far")]
    tokens_per_s: Annotated[
        float,
        Metric(
            *(
                "tokens_per_s",
                "tokens/s",
                "time",
                "throughput of all ranks, mean since the previous line",
                "{} tok/s",
                2,
            ),
            best="max",
        ),
    ]
    mfu: Annotated[
        float,
        Metric(
            *("mfu", "1", "time", "model FLOPs over peak FLOPs, mean since the previous line", "mfu {:.1f} %", 8),
            best="max",
        ),
    ]
    rank: Rank
    experts: Experts


@attrs.frozen(kw_only=True)
class Validation(Line):
    """What the first rank reports of a validation, on a line of its own."""

    loss: Annotated[
        float,
        Metric(
            *("validation/loss", "nats/token", "value"),
            "loss over the validation split; on a line of its own",
            "validation loss {:.4f} nats",
            1,
            best="min",
        ),
    ]
    bits_per_byte: Annotated[
        float,
        Metric(
            *("validation/bits_per_byte", "bits/B", "value", "the same over the bytes of the text"),
            "{:.4f} bits/byte",
            5,
            best="min",
        ),
    ]


@attrs.frozen(kw_only=True)
class Evaluation(Line):
    """What the first rank reports of an evaluation, on a line of its own."""

    bits: Annotated[
        Mapping[str, float],
        Metric(
            *("evaluation/bits/*", "bits/B", "value", "bits per byte of held-out texts of one kind"),
            best="min",
        ),
    ]
    shares: Annotated[
        Mapping[str, float],
        Metric("evaluation/*", "1", "value", "share of the items of a task that are right", best="max"),
    ]
    errors: Annotated[
        Mapping[str, float],
        Metric("evaluation_error/*", "", "value", "standard error of a score of an evaluation, in its unit"),
    ]


def _entries(kind: type) -> tuple[tuple[str, Metric | None], ...]:
    """Fields of a record with their metrics; None for a field that is a record itself."""
    hints = get_type_hints(kind, include_extras=True).items()
    return tuple((name, next(iter(getattr(hint, "__metadata__", ())), None)) for name, hint in hints)


_ENTRIES = MappingProxyType({kind: _entries(kind) for kind in (Line, Step, Rank, Experts, Validation, Evaluation)})

METRICS = (
    Metric("attempt", "", "place", "which start of the run"),
    Metric("time", "UTC, ISO 8601", "place", "wall clock; a label, never a duration"),
    *dict.fromkeys(entry for entries in _ENTRIES.values() for _, entry in entries if entry is not None),
)


def fields(record: Step | Rank | Experts | Validation | Evaluation) -> dict[str, Any]:
    """A record as a line of metrics has it: names to numbers, and `experts` to its table."""
    line: dict[str, Any] = {}
    for attribute, entry in _ENTRIES[type(record)]:
        value = getattr(record, attribute)
        if isinstance(value, Rank):
            line |= fields(value)
        elif isinstance(value, Experts):
            line["experts"] = {name.removeprefix("experts/"): numbers for name, numbers in fields(value).items()}
        elif entry is not None and isinstance(value, Mapping):
            line |= {entry.name.replace("*", part): number for part, number in value.items()}
        elif entry is not None and value is not None:
            line[entry.name] = value
    return line


Part = tuple[int, str]
"""A part of a line on the screen: its rank, as `Metric.rank`, and its text."""


def summary(line: Mapping[str, Any]) -> str:
    """A line of metrics as a person reads it, on one line of the screen."""
    return fitting(parts(line), None)


def fitting(line: Sequence[Part], width: int | None) -> str:
    """The parts of a line that fit into `width` columns: of too many, those of the greatest rank are left out. One part
    is always left. None: all fit."""
    texts = [text for _, text in line]
    if width is None or len(texts) == 1 or len("  ".join(texts)) <= width:
        return "  ".join(texts)
    last = max(range(len(line)), key=lambda place: line[place][0])
    return fitting([part for place, part in enumerate(line) if place != last], width)


def parts(line: Mapping[str, Any]) -> list[Part]:
    """What the screen has of a line of metrics, part by part."""
    experts = line.get("experts", {})
    values = {**line, **{f"experts/{name}": numbers for name, numbers in experts.items()}}
    said: list[Part] = []
    for entry in METRICS:
        value = next((values[name] for name in values if fnmatchcase(name, entry.name)), None)
        if not entry.screen or value is None or value == []:
            continue
        if entry.layers:
            numbers = list(map(float, value))
            value = max(numbers) if entry.layers == "max" else sum(numbers)
        said.append((entry.rank, entry.text(float(value))))
    return said


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
    keys = [[f"{key}/{part}" for part in value] if isinstance(value, dict) else [key] for key, value in fields.items()]
    return tuple(name for part in keys for name in part)


def is_timed(name: str) -> bool:
    """Whether a metric differs between two runs that compute the same bits."""
    entry = metric(name)
    return entry is not None and (entry.kind == "time" or entry.name in ("attempt", "time"))


def table() -> str:
    """The schema as a table in Markdown."""
    rows = (f"| `{entry.name}` | {entry.unit} | {entry.kind} | {entry.doc} |" for entry in METRICS)
    return "\n".join(("| `metrics.rank0.jsonl` | unit | kind | meaning |", "|---|---|---|---|", *rows))
