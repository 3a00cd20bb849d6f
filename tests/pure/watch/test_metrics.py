"""The metrics schema, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

from nmoe.pure.watch import metrics


def test_the_page_shows_the_schema() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert metrics.table() in page.read_text(encoding="utf-8")


def test_names_and_patterns_are_known_and_others_are_not() -> None:
    assert metrics.metric("time/data_s") == metrics.metric("time/step_s")
    assert metrics.metric("time") != metrics.metric("time/data_s")
    assert metrics.metric("losss") is None
    assert metrics.names({"loss": 1.0, "experts": {"cv": [1.0]}}) == ("loss", "experts/cv")


def test_what_a_clock_measured_is_told_from_what_was_computed() -> None:
    assert all(map(metrics.is_timed, ("time", "attempt", "time/data_s", "step_s", "mfu", "exchange/bandwidth")))
    assert not any(map(metrics.is_timed, ("loss", "step", "experts", "exchange/bytes", "validation/loss")))
