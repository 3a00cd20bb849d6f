"""The last and the best validation of a run, and its last evaluation: saved and restored with its State."""

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
class Validations:
    """The last validation of a run and the one with the lowest loss; None before the first."""

    last: Validation | None = None
    best: Validation | None = None
    evaluated: int = 0  # step of the last evaluation; 0: none

    def at(self, step: int) -> bool:
        """Whether `step` is validated."""
        return self.last is not None and self.last.step == step


def validated(validations: Validations, step: int, loss: float, bits_per_byte: float) -> Validations:
    """`validations` after one more validation; the earlier one stays the best when they are equal, a NaN never is."""
    last = Validation(step=step, loss=loss, bits_per_byte=bits_per_byte)
    better = not math.isnan(loss) and (validations.best is None or loss < validations.best.loss)
    return attrs.evolve(validations, last=last, best=last if better else validations.best)


def dumped(validations: Validations) -> dict[str, Any]:
    """`validations` as JSON, with numbers that are not finite as strings."""

    def plain(validation: Validation | None) -> dict[str, Any] | None:
        if validation is None:
            return None
        return {key: value if math.isfinite(value) else str(value) for key, value in attrs.asdict(validation).items()}

    return {"last": plain(validations.last), "best": plain(validations.best), "evaluated": validations.evaluated}


def parse(where: str, values: Mapping[str, Any]) -> Validations:
    """Parse what `dumped` returned.

    Raises:  InputError for anything else.
    """

    def one(fields: Mapping[str, Any] | None) -> Validation | None:
        if fields is None:
            return None
        loss, bits_per_byte = float(fields["loss"]), float(fields["bits_per_byte"])
        return Validation(step=int(fields["step"]), loss=loss, bits_per_byte=bits_per_byte)

    try:
        evaluated = int(values.get("evaluated", 0))  # absent in checkpoints of before there were evaluations
        return Validations(last=one(values["last"]), best=one(values["best"]), evaluated=evaluated)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: expected the run's validations, got {values!r}; use another checkpoint") from error
