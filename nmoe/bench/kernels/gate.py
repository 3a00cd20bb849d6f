"""`nmoe bench gate`: each kernel's speed beside its peer, compared with what was shipped for this GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe.effects import files
from nmoe.errors import InputError

FALL = 0.05
"""Part of its ratio that a kernel may lose before it is named."""

SHIPPED = Path(__file__).with_name("ratios.jsonl")
"""Rows as `nmoe bench kernels --jsonl` writes them, only the fields that `by_gpu` reads."""

Kernel = tuple[str, str, str, str]
"""What, case, variant, and the peer beside it."""


def ratios(path: Path) -> dict[str, dict[Kernel, float]]:
    """`by_gpu` of a file of JSON lines.

    Raises:  InputError for a file that cannot be read, a line of another form, or no kernel at all: of a measurement
             that ended before its first row nothing fell.
    """
    with files.refusing(path, "a file one may read", "name another"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            by_gpu([row])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number}: expected a row of `nmoe bench kernels --jsonl`, got {line[:60]!r} ({error}); remove "
                "the line or measure anew"
            ) from error
        rows.append(row)
    if not (found := by_gpu(rows)):
        raise InputError(
            f"{path}: expected rows of `nmoe bench kernels --jsonl` with a ratio, got none; measure anew or name "
            "another"
        )
    return found


def by_gpu(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[Kernel, float]]:
    """How many times as fast as its peer each kernel is, by GPU; of rows of several runs the last.

    rows     `machine`, which begins with the GPU's name, `what`, `case`, `variant`, `beside`, `ratio`
    Raises:  KeyError, TypeError, AttributeError or ValueError for other rows.
    """
    found: dict[str, dict[Kernel, float]] = {}
    for row in rows:
        ratio = row["ratio"]
        if ratio is None:  # the peer itself
            continue
        if type(ratio) not in (int, float) or not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"a ratio of {ratio!r}")
        kernel = (str(row["what"]), str(row["case"]), str(row["variant"]), str(row["beside"]))
        found.setdefault(row["machine"].partition(",")[0], {})[kernel] = float(ratio)
    return found


def slower(shipped: Mapping[Kernel, float], measured: Mapping[Kernel, float]) -> tuple[str, ...]:
    """A line for each kernel that fell by more than `FALL`, or was shipped and is not measured any more."""
    lines: list[str] = []
    for kernel, before in shipped.items():
        what, case, variant, beside = kernel
        now = measured.get(kernel)
        if now is None:
            lines.append(f"{what}  {case}  {variant}: shipped at {before:.2f} x {beside}, not measured")
        elif now < before * (1 - FALL):
            lines.append(
                f"{what}  {case}  {variant}: {now:.2f} x {beside}, shipped at {before:.2f} x: fell by "
                f"{100 * (1 - now / before):.0f} %"
            )
    return tuple(lines)


def shipped_for(gpu: str, shipped: Mapping[str, Mapping[Kernel, float]]) -> Mapping[Kernel, float]:
    """The ratios of this GPU.

    Raises:  InputError when nothing was shipped for it.
    """
    if gpu not in shipped:
        raise InputError(
            f"bench gate: expected a GPU of which ratios are known ({', '.join(sorted(shipped))}), got {gpu}; "
            "measure it with `nmoe bench kernels --jsonl FILE` and pass --against FILE"
        )
    return shipped[gpu]
