"""The metrics schema, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

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


EXPERTS = metrics.Experts(
    layer=[1, 2],
    max_over_mean=[1.5, 2.0],
    cv=[0.1, 0.2],
    dead=[0, 3],
    entropy=[1.0, 1.1],
    bias_min=[0.0, -1.0],
    bias_max=[0.0, 1.0],
)
RANK = metrics.Rank(
    step=3,
    elapsed_s=1.5,
    tokens_local=7,
    memory_bytes=2_500_000,
    step_s=0.5,
    times={"data": 0.1, "compute": 0.4},
    exchange_bytes=8.0,
    exchange_bandwidth=16.0,
)
STEP = metrics.Step(
    rank=RANK,
    tokens_global=14,
    loss=2.0,
    mtp_losses={"1": 3.0},
    auxiliary_loss=0.25,
    grad_norm=0.125,
    update_norm=1.0,
    rates={"dense": 0.001, "expert": 0.002},
    nonfinite_steps=0,
    spike_steps=0,
    tokens_per_s=4410.0,
    mfu=0.338,
    experts=EXPERTS,
)
VALIDATION = metrics.Validation(step=3, elapsed_s=1.5, loss=2.5, bits_per_byte=1.25)
EVALUATION = metrics.Evaluation(
    step=3, elapsed_s=1.5, bits={"code": 2.0}, shares={"probes/copy": 0.25}, errors={"bits/code": 0.1}
)


def test_what_is_logged_and_the_schema_have_the_same_names() -> None:
    lines = [metrics.fields(record) for record in (STEP, RANK, VALIDATION, EVALUATION)]
    logged = {name for line in lines for name in metrics.names(line)} | {"attempt", "time"}
    assert {name for name in logged if metrics.metric(name) is None} == set()
    assert {metrics.metric(name) for name in logged} == set(metrics.METRICS)
    assert len({entry.name for entry in metrics.METRICS}) == len(metrics.METRICS)


def test_a_line_holds_each_number_under_the_name_the_schema_gives_it() -> None:
    line = metrics.fields(STEP)
    assert (line["step"], line["loss"], line["lr/expert"], line["time/data_s"]) == (3, 2.0, 0.002, 0.1)
    assert line["exchange/bytes"] == 8.0 and line["experts"]["dead"] == [0, 3]
    assert metrics.fields(VALIDATION)["validation/bits_per_byte"] == 1.25


def test_a_line_reads_the_same_wherever_it_is_printed() -> None:
    assert metrics.summary(metrics.fields(STEP)) == (
        "loss 2.0000  mtp 3.0000  gnorm 0.125  lr 1.0e-03  4.41 k tok/s  mfu 33.8 %  mem 2.5 MB  max/mean 2.00  dead 3"
    )
    assert metrics.summary(metrics.fields(VALIDATION)) == "validation loss 2.5000 nats  1.2500 bits/byte"
    assert metrics.summary({"loss": "nan", "experts": {"layer": [], "dead": []}}) == "loss nan"


LINE = {
    **{"loss": 4.6, "grad_norm": 1.2, "lr/dense": 8e-3, "tokens_per_s": 4610.0, "mfu": 0.35, "memory_bytes": 623e6},
    "experts": {"layer": [1], "max_over_mean": [3.66], "dead": [2]},
}


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, "loss 4.6000  gnorm 1.200  lr 8.0e-03  4.61 k tok/s  mfu 35.0 %  mem 623 MB  max/mean 3.66  dead 2"),
        (97, "loss 4.6000  gnorm 1.200  lr 8.0e-03  4.61 k tok/s  mfu 35.0 %  mem 623 MB  max/mean 3.66  dead 2"),
        (96, "loss 4.6000  gnorm 1.200  lr 8.0e-03  4.61 k tok/s  mfu 35.0 %  max/mean 3.66  dead 2"),
        (60, "loss 4.6000  gnorm 1.200  lr 8.0e-03  4.61 k tok/s  dead 2"),
        (30, "loss 4.6000  4.61 k tok/s"),
        (5, "loss 4.6000"),
    ],
)
def test_a_narrow_screen_leaves_out_what_matters_least(width: int | None, expected: str) -> None:
    assert metrics.fitting(metrics.parts(LINE), width) == expected
