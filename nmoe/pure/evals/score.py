"""From the answers of a model to scores with their standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from nmoe.pure.units import decimals


@attrs.frozen(kw_only=True)
class Score:
    """A measured number: how far it would move by another choice of items is its standard error."""

    value: float
    error: float  # standard error; of one item it is not known, and infinite
    count: int  # items


def mean(values: Sequence[float]) -> Score:
    """The mean of independent items. Raises: ValueError for none."""
    return ratio(values, [1.0] * len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Score:
    """The sum of `above` over the sum of `below`, an item each: bits over bytes of texts, for example.

    Its error is that of the mean of above - ratio · below, over the mean of `below` (Cochran, Sampling Techniques,
    eq. 2.39). For equal `below` it is the standard error of the mean.

    Raises:  ValueError for no items.
    """
    count = len(above)
    if not count:
        raise ValueError("score: expected items, got none; leave the task out")
    total = math.fsum(below)
    value = math.fsum(above) / total
    squares = math.fsum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.inf
    return Score(value=value, error=error, count=count)


def chosen(costs: Sequence[float], answer: int) -> float:
    """1 when the answer costs least, 0 when another choice does; of n equal ones 1/n, which is what guessing gives."""
    best = min(costs)
    return (costs[answer] == best) / sum(cost == best for cost in costs)


def rows(scores: Mapping[str, Score]) -> list[tuple[str, str, str, str]]:
    """Scores as a person reads them: task, score, standard error, items."""
    return [(name, decimals(x.value), decimals(x.error), f"{x.count}") for name, x in scores.items()]


def same(got: Any, expected: Any) -> bool:
    """Whether two values are the same as JSON: 1 is neither true nor 1.0."""
    return json.dumps(got, sort_keys=True) == json.dumps(expected, sort_keys=True)
