"""Numbers with a unit, and times, as text; values as JSON holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(value: Any) -> Any:
    """`value` with every number that JSON cannot hold as a string: nan, inf or -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def quantity(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix, as in `6.93 GB`; a bare count of billions is `6.93 B`."""
    for limit, prefix in PREFIXES:
        if abs(number) >= limit:
            scaled = number / limit
            digits = f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"
            return f"{digits} {'B' if prefix == 'G' and not unit else prefix + unit}"
    return f"{number:.3g} {unit}".rstrip()


def decimals(number: float) -> str:
    """A score or a loss: four digits after the point; from a million on four in all, as in `5.402e+55`."""
    return f"{number:.4g}" if abs(number) >= 1e6 else f"{number:.4f}"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else ending}"


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`, with days in front where there are any."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def time_of(seconds: float) -> str:
    """A time of three digits in s, ms or us."""
    if seconds == 0:
        return "0 s"
    for limit, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
