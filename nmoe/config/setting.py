"""What a section class says of a key: the one way to declare it."""

from __future__ import annotations

from typing import Any

import attrs

MOST_POSITIONS = 2**24
"""Positions are exact in fp32 up to here."""

MOST_TOKENS = 2**53
"""Counts of tokens are exact in fp64, as JSON is read, up to here."""

MOST_STEPS = 10**9

MOST_SECONDS = 7 * 86_400.0
"""Threads cannot wait longer than 292 years; who waits longer than a week for a rank waits in vain."""

WIDEST = 2**20
"""Channels, and whatever else is one side of a matrix: a hundred times what anybody trains."""


def setting(
    doc: str,
    *,
    default: Any = attrs.NOTHING,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    identity: bool = True,
    shapes: bool = False,
) -> Any:
    """One key of a section.

    doc       what the key means, one line
    default   value when the key is absent; without one the key is required
    unit      what the number counts
    low, high inclusive bounds; above: exclusive lower bound
    identity  whether a run with another value is another run (else it may change on resume)
    shapes    whether the tensors of a checkpoint are others with another value: no resume can accept it
    """
    about = {"doc": doc, "unit": unit, "low": low, "high": high, "above": above, "identity": identity, "shapes": shapes}
    return attrs.field(
        default=default, metadata={key: value for key, value in about.items() if value not in (None, "")}
    )


def divides(part: int, whole: int) -> bool:
    """Whether `whole` is a multiple of `part`; a part below one has broken its own bound, which is said already."""
    return part < 1 or whole % part == 0
