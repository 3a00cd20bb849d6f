"""What a study came to: means, standard errors, differences and power laws, as a table and as numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from nmoe.bench.records.study import Comparison, Result, Study, of_variant


@attrs.frozen(kw_only=True)
class Row:
    """A variant in a comparison. None where too few seeds are trained."""

    variant: str
    seeds: int
    failed: int
    bits_per_byte: float | None
    error: float | None  # standard error of that mean
    difference: float | None  # to the baseline: below 0 is better
    difference_error: float | None  # of two independent means
    loss: float | None
    tokens: int
    active_parameters: int
    step_ms: float | None
    experts: float | None


@attrs.frozen(kw_only=True)
class Fit:
    """bits a byte = factor * x**-exponent, by least squares in the logarithms, a training a point."""

    of: str
    exponent: float
    error: float | None  # standard error of the exponent; None for two points
    points: int


def mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error: None without values, and of one."""
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def rows(study: Study, comparison: Comparison, results: Mapping[str, Result]) -> tuple[Row, ...]:
    """The baseline and the others."""
    first = _row(study, comparison.baseline, results)
    return (first, *(_against(first, _row(study, name, results)) for name in comparison.variants))


def _row(study: Study, name: str, results: Mapping[str, Result]) -> Row:
    found = list(of_variant(study, name, results).values())
    good = [result for result in found if result.code == 0]
    bits, error = mean([result.bits_per_byte for result in good])
    step_s, _ = mean([result.step_s for result in good])
    return Row(
        variant=name,
        seeds=len(good),
        failed=len(found) - len(good),
        bits_per_byte=bits,
        error=error,
        difference=None,
        difference_error=None,
        loss=mean([result.loss for result in good])[0],
        tokens=max((result.tokens for result in good), default=0),
        active_parameters=max((result.active_parameters for result in good), default=0),
        step_ms=None if step_s is None else 1000 * step_s,
        experts=mean([result.experts for result in good if result.experts is not None])[0],
    )


def _against(first: Row, row: Row) -> Row:
    if first.bits_per_byte is None or row.bits_per_byte is None:
        return row
    both = first.error is not None and row.error is not None
    return attrs.evolve(
        row,
        difference=row.bits_per_byte - first.bits_per_byte,
        difference_error=math.hypot(first.error or 0, row.error or 0) if both else None,
    )


def fit(study: Study, comparison: Comparison, results: Mapping[str, Result]) -> Fit | None:
    """The power law of a comparison; None where there is none, or it has fewer than two places to go through."""
    if comparison.fit is None:
        return None
    found = [
        result
        for name in (comparison.baseline, *comparison.variants)
        for result in of_variant(study, name, results).values()
        if result.code == 0
    ]
    return power_law(
        comparison.fit,
        [getattr(result, comparison.fit) for result in found],
        [result.bits_per_byte for result in found],
    )


def power_law(of: str, xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """y = factor * x**-exponent through points."""
    if len(set(xs)) < 2:
        return None
    x, y = np.log(np.asarray(xs, dtype=np.float64)), np.log(np.asarray(ys, dtype=np.float64))
    x -= x.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    rest = y - y.mean() - slope * x
    error = math.sqrt(float(rest @ rest) / (len(xs) - 2) / spread) if len(xs) > 2 else None
    return Fit(of=of, exponent=-slope, error=error, points=len(xs))


def numbers(study: Study, results: Mapping[str, Result]) -> dict[str, Any]:
    """All of it, for a program."""
    return {
        name: {
            "rows": [
                {
                    **attrs.asdict(row),
                    "by_seed": {
                        seed: result.bits_per_byte if result.code == 0 else None
                        for seed, result in of_variant(study, row.variant, results).items()
                    },
                }
                for row in rows(study, comparison, results)
            ],
            "fit": None if (law := fit(study, comparison, results)) is None else attrs.asdict(law),
        }
        for name, comparison in study.comparisons.items()
    }


def markdown(study: Study, results: Mapping[str, Result]) -> str:
    """All of it, for a person. What is not trained yet is left out."""
    parts: list[str] = []
    for name, comparison in study.comparisons.items():
        found = [row for row in rows(study, comparison, results) if row.seeds + row.failed]
        if not found:
            continue
        parts += [
            f"## {name}",
            "",
            "| variant | seeds | bits/byte | to the first | nats/token | tokens | active parameters | ms a step | "
            "busiest expert / mean |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in found),
            "",
        ]
        if (law := fit(study, comparison, results)) is not None:
            error = "" if law.error is None else f" ± {law.error:.3f}"
            parts += [
                f"bits/byte falls as {law.of} to the power of -{law.exponent:.3f}{error} ({law.points} trainings).",
                "",
            ]
    return "\n".join(parts)


def _line(row: Row) -> str:
    seeds = f"{row.seeds}" if not row.failed else f"{row.seeds}, {row.failed} failed"
    cells = (
        row.variant,
        seeds,
        _with_error(row.bits_per_byte, row.error, ".4f"),
        _with_error(row.difference, row.difference_error, "+.4f"),
        _with_error(row.loss, None, ".4f"),
        f"{row.tokens / 1e6:.2f} M",
        f"{row.active_parameters / 1e6:.2f} M",
        _with_error(row.step_ms, None, ".0f"),
        _with_error(row.experts, None, ".2f"),
    )
    return f"| {' | '.join(cells)} |"


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:.4f}"
