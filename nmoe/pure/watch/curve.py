"""Curves for the eye: smoothed first, then thinned in a way that hides no spike."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nmoe.pure.core.shape import expect_shape

Floats = NDArray[np.floating[Any]]

SAFE_EXPONENT = 200.0


@attrs.frozen(kw_only=True, eq=False)
class Thinned:
    """A curve on a grid of cells; NaN in cells without a finite point."""

    mean: Floats
    low: Floats
    high: Floats
    smooth: Floats
    nonfinite: Floats  # places of the points that are not finite


def smooth(x: Floats, y: Floats, span: float) -> Floats:
    """Mean of what came before, weighted by exp(-distance / span), over finite points only.

    Distance is in units of `x`, so runs that log more or less often smooth alike. The weights are normalised: there is
    no bias towards zero at the start.

    x        [N] f64   ascending
    y        [N] f64   NaN and infinities are left out
    span     in units of x; 0: nothing is smoothed
    returns  [N] f64   NaN where y is not finite
    Raises:  ValueError when x and y differ in length.
    Cost:    linear in N, plus the range of x in units of 200 spans.
    """
    expect_shape("smooth: expected y", y.shape, x.shape, "pass a value for each place")
    finite = np.isfinite(y)
    if span <= 0 or len(x) == 0:
        return np.where(finite, y, np.nan)
    value, weight = np.where(finite, y, 0.0), finite.astype(np.float64)
    top, bottom = np.empty_like(value), np.empty_like(value)
    # exp(x / span) overflows over a long range: cut it where the exponent has grown too far, and carry the sums on.
    cell = ((x - x[0]) / (SAFE_EXPONENT * span)).astype(np.int64)
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    carried = (0.0, 0.0)
    last = float(x[0])
    for start, stop in zip(starts, (*starts[1:], len(x)), strict=True):
        part = slice(int(start), int(stop))
        fade = np.exp(-(x[part] - x[start]) / span)
        faded = float(np.exp(-(x[start] - last) / span))
        top[part] = fade * (np.cumsum(value[part] / fade) + carried[0] * faded)
        bottom[part] = fade * (np.cumsum(weight[part] / fade) + carried[1] * faded)
        carried, last = (float(top[stop - 1]), float(bottom[stop - 1])), float(x[stop - 1])
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=finite)


def edges(low: float, high: float, cells: int, *, log: bool) -> Floats:
    """[cells + 1] borders of equal cells from `low` to `high`, equal in their logarithm when `log` (then 0 < low)."""
    return np.geomspace(low, high, cells + 1) if log else np.linspace(low, high, cells + 1)


def thin(x: Floats, y: Floats, smoothed: Floats, borders: Floats) -> Thinned:
    """Mean, extremes and mean of the smoothed curve in each cell of a grid.

    x        [N] f64   ascending; points outside the borders are left out
    borders  [C + 1]   ascending; the last cell includes its upper border
    """
    cells = len(borders) - 1
    inside = (x >= borders[0]) & (x <= borders[-1])
    x, y, smoothed = x[inside], y[inside], smoothed[inside]
    cell = np.minimum(np.searchsorted(borders, x, side="right") - 1, cells - 1)
    finite = np.isfinite(y)
    empty = np.full(cells, np.nan)
    low, high, mean, soft = empty.copy(), empty.copy(), empty.copy(), empty.copy()
    for points, out, values in ((finite, (mean, low, high), y), (np.isfinite(smoothed), (soft,), smoothed)):
        where, kept = cell[points], values[points]
        if len(where) == 0:
            continue
        starts = np.flatnonzero(np.diff(where, prepend=-1))
        counts = np.diff(np.append(starts, len(where)))
        out[0][where[starts]] = np.add.reduceat(kept, starts) / counts
        if len(out) == 3:
            out[1][where[starts]] = np.minimum.reduceat(kept, starts)
            out[2][where[starts]] = np.maximum.reduceat(kept, starts)
    return Thinned(mean=mean, low=low, high=high, smooth=soft, nonfinite=x[~finite])
