"""The soak is a judge: each kind of difference it is there to find, it finds."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmoe.effects.checkpoint.manifest import FILE
from nmoe.effects.record.names import WEIGHTS
from nmoe.soak import soak
from nmoe.soak.faults import Journal
from tests.effects.train import trainings


@pytest.fixture(scope="module")
def calm(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training."""
    config = trainings.config(tmp_path_factory.mktemp("calm"), "calm", sources, 4)
    code, told = trainings.train(config)
    assert code == 0, told
    return trainings.folder(config)


@pytest.fixture
def rough(calm: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(calm, tmp_path / "rough"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the newest checkpoint says, with the digest that then is right."""
    path = max((folder / "checkpoints").glob("step-*")) / FILE
    fields = json.loads(path.read_bytes().partition(b"\n")[0])
    change(fields)
    line = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n")


def lines(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the lines of metrics."""
    path = folder / "metrics.rank0.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    path.write_text("".join(json.dumps(line) + "\n" for line in found))


def test_a_copy_is_the_same(calm: Path, rough: Path) -> None:
    assert soak.differences(calm, rough) == []


def test_another_tensor_is_seen(calm: Path, rough: Path) -> None:
    edit(rough, lambda m: m["tensors"]["router_bias"].update(digest="0" * 16))
    (problem,) = soak.differences(calm, rough)
    assert problem.startswith("tensor router_bias: expected the digest ") and problem.endswith(f"got {'0' * 16}")


def test_another_position_is_seen(calm: Path, rough: Path) -> None:
    edit(rough, lambda m: m["meta"].update(cursor=7))
    (problem,) = soak.differences(calm, rough)
    assert problem.startswith("expected checkpoints with the same meta, got ")


def test_other_weights_are_seen(calm: Path, rough: Path) -> None:
    content = bytearray((rough / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (rough / WEIGHTS).write_bytes(content)
    assert soak.differences(calm, rough) == [f"expected the same {WEIGHTS}, got other bytes"]


def test_a_line_twice_or_never_is_seen(calm: Path, rough: Path) -> None:
    lines(rough, lambda found: found.insert(1, found[1]))
    assert soak.differences(calm, rough) == [
        "expected every step once in the metrics, got [2] more than once and [] never"
    ]
    lines(rough, lambda found: [found.remove(found[1]), found.remove(found[1])])
    assert soak.differences(calm, rough) == [
        "expected every step once in the metrics, got [] more than once and [2] never"
    ]


def test_another_loss_is_seen(calm: Path, rough: Path) -> None:
    lines(rough, lambda found: found[2].update(loss=1.0))
    (problem,) = soak.differences(calm, rough)
    assert problem.startswith("expected the same metrics, got at step 3: loss ") and problem.endswith(" and 1.0")


def test_what_is_left_beside_the_checkpoints_is_seen(calm: Path, rough: Path) -> None:
    (rough / "checkpoints" / ".tmp-step-00000009.0001-0009").mkdir()
    (problem,) = soak.differences(calm, rough)
    assert problem.startswith("expected nothing beside the checkpoints, got ")


def test_an_end_that_no_fault_explains_is_told(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt ends as none may, the second one well: it is not taken for a success."""

    def train(config: Any, planned: Any, journal: Path) -> int:
        first = not (tmp_path / "again").exists()
        (tmp_path / "again").touch()
        return 3 if first else 0

    monkeypatch.setattr(soak, "_train", train)
    config = soak.training(tmp_path, "x", sources, 4)
    attempts, problems = soak.weather(config, (), Journal(path=tmp_path / "journal"), tmp_path, random.Random(0))
    assert attempts == 1 and problems[0].startswith("attempt 1 ended with 3 after no fault")
