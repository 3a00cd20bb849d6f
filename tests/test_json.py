"""`--json` of every verb that reads, and one address of a run for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmoe.cli import build_parser, main
from nmoe.cli.parser import under
from nmoe.effects.data import stdlib
from tests.effects.train import trainings


@pytest.fixture(scope="module")
def workplace(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs in runs/."""
    folder = tmp_path_factory.mktemp("json")
    for name, steps in (("one", 2), ("two", 3)):
        assert trainings.train(trainings.config(folder, name, sources, steps))[0] == 0
    (folder / "home").mkdir()
    return folder


@pytest.fixture
def printed(
    workplace: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """What a command line prints as JSON."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("NMOE_HOME", str(workplace / "home"))

    def call(command: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(command.replace("SHARDS", str(sources)).split()) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


READING = {
    "runs list": ("", 0, lambda x: {run["name"]: run["step"] for run in x}, {"one": 2, "two": 3}),
    "runs show": ("one", 0, lambda x: (x["name"], x["latest"]["step"]), ("one", 2)),
    "runs tail": ("one --lines 1", 0, lambda x: x["event"], "end"),
    "runs compare": ("one runs/two", 0, lambda x: [row for row in x if row["row"] == "step"][0]["two"], 3),
    "ckpt list": ("one", 0, lambda x: [(entry["step"], entry["whole"]) for entry in x], [(2, True), (1, True)]),
    "ckpt show": ("two", 0, lambda x: (x["step"], x["meta"]["cursor"], x["contents"]["router_bias"]["dtype"]),
                  (3, 6, "F32")),
    "ckpt verify": ("two --all", 0, lambda x: [entry["whole"] for entry in x], [True] * 3),
    "ckpt diff": ("one two", 1, lambda x: x["step"], [2, 3]),
    "config list": ("", 0, lambda x: [entry["device"] for entry in x if entry["preset"] == "quickstart"], ["cpu"]),
    "config show": (
        "quickstart --train.steps=7",
        0,
        lambda x: (x["config"]["train"]["steps"], x["sources"]["train.steps"]),
        (7, "command line --train.steps=7"),
    ),
    "config check": ("quickstart", 0, lambda x: (x["ranks"], len(x["fingerprint"]), x["remarks"]), (1, 64, [])),
    "config diff": ("quickstart quickstart-gqa", 1, lambda x: x["train.steps"], [740, 300]),
    "config explain": ("train.steps", 0, lambda x: x[0], {"what": "train.steps", "is": "optimizer steps"}),
    "data info": ("SHARDS", 0, lambda x: sorted(x["splits"]), ["test", "train", "validation"]),
    "data head": ("SHARDS --documents 2", 0, lambda x: [(doc["split"], doc["document"]) for doc in x],
                  [("train", 0), ("train", 1)]),
    "data verify": ("SHARDS", 0, lambda x: [folder["whole"] for folder in x], [True]),
    "data plan": (
        "quickstart --data.source.kind=shards --data.source.path=SHARDS --train.sequence_length=16",
        0,
        lambda x: x["reads"][0]["source"],
        "shards",
    ),
    "data tokenizer list": ("", 0, lambda x: x, []),
    "eval": ("one --suite probes --limit 2 --device cpu", 0, lambda x: x["probes/copy"]["count"], 2),
    "plan": ("quickstart", 0, lambda x: x["microbatches"], 1),
}  # fmt: skip


@pytest.mark.parametrize("verb", READING)
def test_a_verb_that_reads_prints_json(verb: str, printed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "held_out", lambda: ["def f(x):\n    return x\n"])
    arguments, code, value, expected = READING[verb]
    assert value(printed(f"{verb} {arguments} --json", code)) == expected


def test_json_is_an_option_of_these_verbs() -> None:
    """A new verb that reads is listed here, or it has no option that nobody tests."""

    def having(parser: Any, name: str = "") -> list[str]:
        own = [name] if "--json" in parser._option_string_actions else []
        return own + [verb for key, inner in under(parser).items() for verb in having(inner, f"{name} {key}".strip())]

    assert sorted(having(build_parser()[0])) == sorted([*READING, "doctor"])


@pytest.mark.parametrize(
    "command",
    [
        *("runs show RUN --json", "runs tail RUN --json --lines 1", "ckpt list RUN --json", "ckpt show RUN --json"),
        *("ckpt verify RUN --json", "eval RUN --suite probes --limit 2 --device cpu --json"),
    ],
)
def test_a_run_has_one_address(command: str, printed: Callable[..., Any], workplace: Path) -> None:
    def without_times(value: Any) -> Any:
        return json.loads(json.dumps(value).replace(str(workplace / "runs"), "runs"), object_pairs_hook=_timeless)

    addresses = ("one", "runs/one", str(workplace / "runs" / "one"))
    told = [without_times(printed(command.replace("RUN", run))) for run in addresses]
    assert told[0] == told[1] == told[2]


def _timeless(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key != "at"}


@pytest.mark.parametrize(
    "command",
    ["runs show", "ckpt list", "ckpt prune", "ckpt diff one", "generate --prompt x", "eval", "track --to tensorboard"],
)
def test_a_run_that_is_not_there_is_refused_with_a_near_name(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert main([*command.split(), "onne"]) == 2
    assert "expected the name of a run in runs, or a path, got 'onne'; did you mean one?" in capsys.readouterr().err


def test_a_run_starts_from_another_by_name(sources: Path, workplace: Path) -> None:
    for key in ("resume", "warm_start"):
        config = trainings.config(workplace, f"from-{key}", sources, 3)
        code, output = trainings.train(trainings.changed(config, steps=4, **{key: "two"}))
        assert code == 0, output
        assert [event["step"] for event in trainings.events(config, "resume")] == ([3] if key == "resume" else [])


def test_an_export_goes_by_its_suffix(printed: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "export", "one", "--to", "x.json"]) == 2
    assert "expected a file that ends in .csv or .parquet, got x.json" in capsys.readouterr().err
