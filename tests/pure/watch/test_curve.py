"""Curves for the eye: against the sums they stand for, with spikes and holes that must survive."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.watch import curve

values = st.lists(
    st.one_of(st.floats(-1e3, 1e3), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=60
)


def by_definition(x: list[float], y: list[float], span: float) -> list[float]:
    """Each point's weighted mean of what came before, summed in full."""
    found: list[float] = []
    for here, own in zip(x, y, strict=True):
        pairs = [(math.exp(-(here - a) / span), b) for a, b in zip(x, y, strict=True) if a <= here and math.isfinite(b)]
        total = math.fsum(weight for weight, _ in pairs)
        usable = math.isfinite(own) and total > 0
        found.append(math.fsum(weight * b for weight, b in pairs) / total if usable else math.nan)
    return found


@given(values, st.floats(0.5, 1e4), st.lists(st.integers(1, 3000), min_size=60, max_size=60))
def test_smoothing_is_the_weighted_mean_of_the_past(y: list[float], span: float, gaps: list[int]) -> None:
    x = np.cumsum(gaps[: len(y)]).astype(np.float64)
    got = curve.smooth(x, np.array(y), span)
    np.testing.assert_allclose(got, by_definition(x.tolist(), y, span), rtol=1e-6, atol=1e-6)


def test_without_a_span_nothing_is_smoothed() -> None:
    y = np.array([3.0, math.inf, 5.0])
    np.testing.assert_array_equal(curve.smooth(np.arange(3.0), y, 0), [3.0, math.nan, 5.0])


def test_a_run_that_logs_less_often_smooths_alike() -> None:
    """A straight line, logged each step and each tenth: the lag behind it is the same within a step."""
    fine, coarse = np.arange(0, 5000.0), np.arange(0, 5000.0, 10)
    assert curve.smooth(fine, fine, 100)[-10] == pytest.approx(curve.smooth(coarse, coarse, 100)[-1], abs=6)


@given(values, st.integers(1, 30))
def test_extremes_and_what_is_not_finite_survive_thinning(y: list[float], cells: int) -> None:
    x, points = np.arange(len(y), dtype=np.float64), np.array(y)
    thinned = curve.thin(x, points, points, curve.edges(0, max(len(y) - 1, 1), cells, log=False))
    finite = points[np.isfinite(points)]
    assert len(thinned.nonfinite) == len(points) - len(finite)
    if len(finite):
        assert np.nanmax(thinned.high) == finite.max()
        assert np.nanmin(thinned.low) == finite.min()
        filled = ~np.isnan(thinned.mean)
        assert (thinned.low[filled] <= thinned.mean[filled] + 1e-9).all()
        assert (thinned.mean[filled] <= thinned.high[filled] + 1e-9).all()


def test_each_point_lies_in_its_cell_and_those_outside_in_none() -> None:
    x = np.array([0.5, 1.0, 2.0, 3.0, 9.0])
    thinned = curve.thin(x, x * 10, x * 10, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(thinned.mean, [10.0, 25.0])
    np.testing.assert_array_equal(thinned.high, [10.0, 30.0])


def test_logarithmic_cells_grow() -> None:
    np.testing.assert_allclose(curve.edges(1, 1000, 3, log=True), [1, 10, 100, 1000])
