"""What a run knows besides its State: its validations. Saved and restored with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from nmoe.errors import InputError


@attrs.frozen(kw_only=True)
class Validation:
    """One validation of a run."""

    step: int
    loss: float  # nats a token
    bits_per_byte: float


@attrs.frozen(kw_only=True)
class Seen:
    """The last validation of a run and the one with the lowest loss; None before the first."""

    last: Validation | None = None
    best: Validation | None = None

    def at(self, step: int) -> bool:
        """Whether `step` is validated."""
        return self.last is not None and self.last.step == step


def validated(seen: Seen, step: int, loss: float, bits_per_byte: float) -> Seen:
    """`seen` after one more validation; the earlier one stays the best when they are equal, a NaN never is."""
    last = Validation(step=step, loss=loss, bits_per_byte=bits_per_byte)
    better = not math.isnan(loss) and (seen.best is None or loss < seen.best.loss)
    return Seen(last=last, best=last if better else seen.best)


def dumped(seen: Seen) -> dict[str, Any]:
    """`seen` as JSON, with numbers that are not finite as strings."""

    def plain(each: Validation | None) -> dict[str, Any] | None:
        if each is None:
            return None
        return {key: value if math.isfinite(value) else str(value) for key, value in attrs.asdict(each).items()}

    return {"last": plain(seen.last), "best": plain(seen.best)}


def parse(where: str, values: Mapping[str, Any]) -> Seen:
    """A `Seen` from what `dumped` made of one.

    Raises:  InputError when it is none.
    """

    def one(each: Mapping[str, Any] | None) -> Validation | None:
        if each is None:
            return None
        return Validation(step=int(each["step"]), loss=float(each["loss"]), bits_per_byte=float(each["bits_per_byte"]))

    try:
        return Seen(last=one(values["last"]), best=one(values["best"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a checkpoint holds the run's validations, got {values!r}; use another checkpoint"
        ) from error
