"""What a run has measured, for a script: `nmoe.metrics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmoe.effects.record import address
from nmoe.effects.record.names import METRICS
from nmoe.effects.runs.show import flatten, read_lines


def metrics(run: str | Path, *, root: str | Path = address.ROOT) -> list[dict[str, Any]]:
    """The metrics of a run, a record a line in the order of the steps, each step once; also of a run that still trains.

    Names are those of docs/metrics.md; a value of each layer has a name of its own, `experts/cv/layer_03`. Numbers that
    are not finite are floats as well. A validation is a record of its own.

    run      name of a run under `root`, or its path

    Raises:  InputError when there is no such run, or a line cannot be read.
    """
    folder = address.find_run(str(run), Path(root))
    return [
        {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in flatten(line).items()}
        for line in read_lines(folder / METRICS)
    ]
