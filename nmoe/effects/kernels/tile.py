"""How a kernel cuts its work up."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Tile:
    """Block sizes and launch options of one kernel; which axis each one cuts is said where it is used."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
