"""Followers to services, held against stand-ins with the real parameters: each line once, failures told."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from nmoe.effects.runs.track import sinks
from nmoe.effects.runs.track.follow import TRIES, follow
from nmoe.errors import InputError
from tests.effects.runs.test_track import line
from tests.effects.runs.trackers import TRACKERS, Store, Told


@attrs.frozen
class Service:
    """A tracker and a run that is followed to it."""

    name: str
    folder: Path
    store: Store
    told: Callable[[], Told]

    def append(self, *lines: str) -> None:
        with open(self.folder / "metrics.rank0.jsonl", "a") as file:
            file.writelines(lines)

    def once(self, said: list[str] | None = None) -> None:
        """Follow to the last line there is."""
        say = (lambda text: None) if said is None else said.append
        follow(self.folder, self.name, sinks.opener(self.name), every_s=0.0005, once=True, say=say)

    def digest(self) -> str:
        """Of every file of the run but what the follower keeps."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and "track" not in path.parts]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(params=sorted(TRACKERS))
def service(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    store = Store()
    return Service(request.param, folder, store, TRACKERS[request.param](monkeypatch, store))


def test_every_number_comes_with_its_step_and_attempt(service: Service) -> None:
    experts = {"layer": [3, 5], "cv": [0.5, "inf"]}
    service.append(line(7, loss=2.5, experts=experts), line(8, loss="nan"), line(8, attempt=2, loss=2.25, flag=True))
    before = service.digest()
    service.once()
    first, second, third = service.told()
    assert first == (7, 1, {"loss": 2.5, "experts/cv/3": 0.5, "experts/cv/5": math.inf})
    assert second[:2] == (8, 1) and math.isnan(second[2]["loss"])
    assert third == (8, 2, {"loss": 2.25})
    assert service.digest() == before
    assert all(not options["looks"] for options in service.store.opened_with), "the follower's machine is not the run's"


def test_a_follower_that_starts_again_goes_on(service: Service) -> None:
    service.append(*(line(step, loss=float(step)) for step in range(5)))
    service.once()
    service.once()
    service.append(*(line(step, loss=float(step)) for step in range(5, 9)))
    service.once()
    assert service.told() == [(step, 1, {"loss": float(step)}) for step in range(9)]


def test_what_was_told_after_the_last_position(service: Service) -> None:
    service.append(line(0, loss=0.0))
    service.once()
    record = service.folder / "track" / f"{service.name}.json"
    kept = record.read_text()
    service.append(line(1, loss=1.0))
    service.once()
    record.write_text(kept)  # as if killed before the position was written
    service.once()
    steps = [step for step, _, _ in service.told()]
    assert steps == ([0, 1, 1] if service.name == "trackio" else [0, 1]), "Trackio alone cannot be asked"


@pytest.mark.parametrize("reached", [2, 3, 5])
@pytest.mark.parametrize("cuts", [(2, 4), (4, 2), (2, 2)])
def test_a_resumed_run_that_cut_its_file_goes_on(service: Service, cuts: tuple[int, int], reached: int) -> None:
    """Told to step 5, then cut and resumed twice: all is told, though the file has fewer lines than were."""
    metrics = service.folder / "metrics.rank0.jsonl"
    at, again = cuts
    attempts = [range(6), range(at, at + reached), range(again, 9)]
    told = [
        [(step, attempt, {"loss": 10.0 * attempt + step}) for step in steps]
        for attempt, steps in enumerate(attempts, 1)
    ]
    file: Told = []
    for steps, new in zip(attempts, told, strict=True):
        file = file[: steps[0]] + new
        metrics.write_text("".join(line(step, attempt=attempt, **values) for step, attempt, values in file))
        service.once()
        service.once()
    assert service.told() == told[0] + told[1] + told[2]


@pytest.mark.parametrize("failures", [1, TRIES - 1])
def test_a_service_that_fails_for_a_while_is_tried_again(service: Service, failures: int) -> None:
    service.append(*(line(step, loss=float(step)) for step in range(3)))
    service.once()
    service.append(*(line(step, loss=float(step)) for step in range(3, 6)))
    said: list[str] = []
    service.store.take, service.store.fail = 2, failures  # opened, and one line taken
    service.once(said)
    assert len([text for text in said if "failed with" in text and "tries again in" in text]) == failures
    assert service.told() == [(step, 1, {"loss": float(step)}) for step in range(6)]


def test_a_service_that_goes_on_failing_ends_the_follower_and_not_the_run(service: Service) -> None:
    service.append(line(0, loss=0.0))
    service.once()
    service.append(line(1, loss=1.0))
    before = service.digest()
    service.store.take, service.store.fail = 1, TRIES
    with pytest.raises(InputError) as caught:
        service.once()
    (problem,) = caught.value.problems
    assert (
        problem.startswith(f"--to {service.name}: expected a target that takes lines, got ")
        and f"{TRIES} times" in problem
    )
    assert service.digest() == before
    assert json.loads((service.folder / "track" / f"{service.name}.json").read_text())["line"] == 1
    assert service.name == "mlflow" or service.store.closed == 2, "closed all the same"
    service.once()
    assert service.told() == [(0, 1, {"loss": 0.0}), (1, 1, {"loss": 1.0})]


def test_a_service_that_cannot_be_opened_is_told(service: Service) -> None:
    service.append(line(0, loss=0.0))
    service.store.fail = 1
    with pytest.raises(InputError, match=f"--to {service.name}: expected a target that can be opened and closed, got "):
        service.once()
    service.once()
    assert service.told() == [(0, 1, {"loss": 0.0})]


def test_an_absent_package_names_its_extra(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (service.name, f"{service.name}.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    expected = rf"--to: expected the package {service.name} to be installed, got none; "
    with pytest.raises(InputError, match=rf"{expected}install it with: .* -m pip install 'nmoe\[{service.name}\]'"):
        service.once()
