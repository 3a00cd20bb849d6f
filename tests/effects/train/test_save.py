"""When a state is due to be saved, and what a failed save does: with a writer that does as it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

from nmoe.config.sections import Checkpoint
from nmoe.effects.checkpoint.writer import Saved, SaveError
from nmoe.effects.record import log
from nmoe.effects.train import save
from nmoe.effects.train.save import Saver
from nmoe.effects.train.step import State
from nmoe.errors import InputError
from nmoe.pure.watch.validations import Validation, Validations, dumped, parse, validated


class Told:
    """A writer whose saves end as the test says, in order; those it does not speak of succeed."""

    def __init__(self, *ends: str | Saved) -> None:
        self.saves: list[tuple[int, float | None]] = []
        self.ends = [SaveError(end) if isinstance(end, str) else end for end in ends]
        self.flight: Saved | SaveError | None = None

    def save(self, pieces: Any, *, step: int, meta: Any, score: float | None) -> None:
        assert self.flight is None, "one save at a time"
        self.saves.append((step, score))
        self.flight = self.ends.pop(0) if self.ends else saved(step)

    def wait(self) -> Saved | None:
        flight, self.flight = self.flight, None
        if isinstance(flight, SaveError):
            raise flight
        return flight

    poll = wait


def saved(step: int) -> Saved:
    return Saved(name=f"step-{step}", step=step, bytes=7, seconds=2.0, removed=(), sha256="")


def at(step: int) -> State:
    zero = torch.zeros((), dtype=torch.int64)
    return State((), (), zero, zero, zero, zero, zero, zero, 2 * step, 32 * step, step)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[log.Log]:
    with log.open_log(tmp_path, attempt=1) as opened:
        yield opened


def saver(opened: log.Log, writer: Told, saved_step: int = 0, **settings: Any) -> Saver:
    return Saver(
        Checkpoint(**settings),
        writer,  # pyright: ignore[reportArgumentType]
        opened,
        pieces=lambda state: (),
        meta=lambda state, validations: {},
        saved_step=saved_step,
    )


def events(opened: log.Log) -> list[tuple[str, int]]:
    lines = map(json.loads, (opened.folder / "events.jsonl").read_text().splitlines())
    return [(line["event"], line["step"]) for line in lines]


def test_due_by_steps_and_by_time(opened: log.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    each = saver(opened, Told(), every=4, saved_step=8)
    assert [step for step in range(17) if each.due(step)] == [4, 12, 16], "what it goes on from is saved"
    each.save(at(12), Validations())
    assert not each.due(12) and each.due(16)
    assert not any(saver(opened, Told(), every=0).due(step) for step in range(99))
    clock = [100.0]
    monkeypatch.setattr(save, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    timed = saver(opened, Told(), every=0, minutes=3)
    clock[0] += 179
    assert not timed.due(5)
    clock[0] += 1
    assert timed.due(5) and not timed.due(0)
    timed.save(at(5), Validations())
    clock[0] += 179
    assert not timed.due(6)
    clock[0] += 1
    assert timed.due(6)


def test_a_failure_is_told_at_once_and_raised_at_the_next_save_point(opened: log.Log) -> None:
    writer = Told("the disk is full")
    each = saver(opened, writer, every=4)
    each.save(at(4), Validations())
    assert events(opened) == []
    each.poll()
    assert events(opened) == [("checkpoint_failed", 4)]
    each.poll()
    with pytest.raises(SaveError, match="full"):
        each.save(at(8), Validations())
    assert [step for step, _ in writer.saves] == [4]


def test_or_the_next_save_is_tried(opened: log.Log) -> None:
    writer = Told("the disk is full")
    each = saver(opened, writer, every=4, on_error="continue")
    each.save(at(4), Validations())
    each.save(at(8), Validations())
    each.poll()
    each.finish(at(8), Validations(), 10.0)
    assert [step for step, _ in writer.saves] == [4, 8]
    assert events(opened) == [("checkpoint_failed", 4), ("checkpoint", 8)]


def test_without_the_background_a_save_point_raises_its_own_failure(opened: log.Log) -> None:
    each = saver(opened, Told("the disk is full"), every=4, asynchronous=False)
    with pytest.raises(SaveError, match="full"):
        each.save(at(4), Validations())
    each.save(at(8), Validations())
    assert events(opened) == [("checkpoint_failed", 4), ("checkpoint", 8)]


def test_an_older_one_that_stays_is_no_failed_save(opened: log.Log) -> None:
    """With `on_error = "stop"`: neither the next save point nor the end stops for it, and nothing is saved twice."""
    writer = Told(*(attrs.evolve(saved(step), undeleted=("an old one stays",)) for step in (4, 8)))
    each = saver(opened, writer, every=4)
    each.save(at(4), Validations())
    each.save(at(8), Validations())
    each.finish(at(8), Validations(), 10.0)
    assert [step for step, _ in writer.saves] == [4, 8]
    assert events(opened) == [(name, step) for step in (4, 8) for name in ("checkpoint_undeleted", "checkpoint")]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_the_last_save_is_tried_again_and_then_raised(opened: log.Log, on_error: str) -> None:
    writer = Told("full", "still full", "full")
    each = saver(opened, writer, every=4, on_error=on_error)
    each.save(at(4), Validations())
    with pytest.raises(SaveError, match="still full"):
        each.finish(at(4), Validations(), 10.0)
    each = saver(opened, writer, every=4, on_error=on_error)
    each.save(at(8), Validations())
    each.finish(at(8), Validations(), 10.0)
    assert [step for step, _ in writer.saves] == [4, 4, 8, 8]


def test_with_too_little_time_nothing_is_begun(opened: log.Log) -> None:
    writer = Told()
    each = saver(opened, writer, every=4)
    each.save(at(4), Validations())
    each.finish(at(6), Validations(), 1.9)
    assert [step for step, _ in writer.saves] == [4]
    assert events(opened) == [("checkpoint", 4), ("checkpoint_skipped", 6)]
    each.finish(at(6), Validations(), 2.1)
    assert [step for step, _ in writer.saves] == [4, 6]


def test_only_the_validation_of_its_own_step_scores_a_checkpoint(opened: log.Log) -> None:
    writer = Told()
    each = saver(opened, writer, every=1)
    validations = validated(Validations(), 4, 3.5, 1.5)
    each.save(at(4), validations)
    each.save(at(5), validations)
    each.save(at(6), validated(validations, 6, float("nan"), 1.0))
    assert writer.saves == [(4, 3.5), (5, None), (6, None)]


def test_the_log_is_on_the_disk_before_the_checkpoint_is_begun(
    opened: log.Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(log.os, "fsync", lambda handle: order.append("sync"))
    writer = Told()
    monkeypatch.setattr(writer, "save", lambda pieces, **named: order.append("save"))
    saver(opened, writer, every=1).save(at(1), Validations())
    assert order == ["sync", "sync", "save"], "both files, then the copy"


def test_what_a_run_has_seen_comes_back() -> None:
    validations = validated(validated(validated(Validations(), 1, 3.0, 1.0), 2, 2.0, 0.9), 3, 2.0, 0.9)
    assert (
        validations.best == Validation(step=2, loss=2.0, bits_per_byte=0.9)
        and validations.at(3)
        and not validations.at(2)
    )
    assert parse("x", json.loads(json.dumps(dumped(validations), allow_nan=False))) == validations
    worse = validated(validations, 4, float("nan"), float("inf"))
    again = parse("x", json.loads(json.dumps(dumped(worse), allow_nan=False)))
    assert again.best == validations.best and attrs.asdict(again)["last"]["bits_per_byte"] == float("inf")
    assert validated(Validations(), 1, float("nan"), 1.0).best is None
    assert parse("x", dumped(Validations())) == Validations()
    for wrong in ({}, {"last": {"step": 1}, "best": None}, {"last": 3, "best": None}):
        with pytest.raises(InputError, match="x: expected the run's validations, got "):
            parse("x", wrong)
