"""`nmoe bench records`: what is trained in which order, what comes of it, and what goes on after a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from nmoe.bench.records.report import markdown, numbers, power_law
from nmoe.bench.records.study import Result, Study, config_of, job_of, jobs, keys_of, load_study
from nmoe.bench.records.train import main
from nmoe.cli import main as nmoe
from nmoe.errors import InputError

ROOT = Path(__file__).parents[2]

STUDY = """
base = "quickstart"
seeds = 2

[set]
train.steps = 100
schedule = { warmup = 0.1, decay = 0.5 }

[variants]
low = { seeds = 1, set.optim.dense.lr = 1e-3 }
high = { seeds = 1, set.optim.dense.lr = 4e-3 }
best = { best_of = ["low", "high"] }
dense = { set.model.num_dense_layers = 3 }
dense-as-long = { like = "dense", time_of = "high" }

[comparisons]
rates = { baseline = "low", variants = ["best"] }
dense = { baseline = "best", variants = ["dense", "dense-as-long"], fit = "active_parameters" }
"""


def study_of(folder: Path, text: str = STUDY, more: tuple[str, ...] = ()) -> Study:
    (folder / "study.toml").write_text(text, encoding="utf-8")
    return load_study(folder / "study.toml", more)


def trained(study: Study, given: dict[tuple[str, int], float], **more: float) -> dict[str, Result]:
    """Results of variants and seeds with these bits a byte, as if they had been trained in this order."""
    results: dict[str, Result] = {}
    for (name, seed), bits in given.items():
        keys = keys_of(study, name, results)
        assert keys is not None
        key = job_of(study, name, keys, seed).key
        known = {"step_s": 0.4 if name == "high" else 0.3, "steps": 100, "active_parameters": 1000, **more}
        results[key] = Result(key=key, code=0, seconds=60.0, bits_per_byte=bits, loss=bits, **known)  # pyright: ignore[reportArgumentType]
    return results


def waiting(study: Study, results: dict[str, Result]) -> list[tuple[str, int]]:
    return [(job.variant, job.seed) for job in jobs(study, results)]


def test_what_depends_on_others_waits_for_them_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert waiting(study, {}) == [("low", 0), ("high", 0), ("dense", 0), ("dense", 1)]
    results = trained(study, {("low", 0): 1.5, ("high", 0): 1.4, ("dense", 0): 1.6})
    # The best is `high`, whose seed 0 is there; as long as `high` is 400 / 3 steps of `dense`.
    assert waiting(study, results) == [("best", 1), ("dense-as-long", 0), ("dense", 1), ("dense-as-long", 1)]
    keys = keys_of(study, "dense-as-long", results)
    assert keys is not None and keys["train.steps"] == 133
    best, dense = (job for job in jobs(study, results) if job.variant in ("best", "dense"))
    assert config_of(study, best).optim.dense.lr == 4e-3 and config_of(study, best).run.seed == 1
    assert config_of(study, dense).model.num_dense_layers == 3


def test_a_failed_training_is_never_the_best(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    results = trained(study, {("low", 0): 1.5, ("high", 0): 1.4})
    high = job_of(study, "high", keys_of(study, "high", {}) or {}, 0).key
    results[high] = Result(key=high, code=5, seconds=1.0)
    best = keys_of(study, "best", results)
    assert best is not None and best["optim.dense.lr"] == 1e-3
    assert "| low | 1 | 1.5000 |" in markdown(study, results)


def test_keys_of_the_command_line_hold_for_every_variant(tmp_path: Path) -> None:
    study = study_of(tmp_path, more=("--data.source.kind=shards", "--data.source.path=there", "--train.steps=7"))
    for job in jobs(study, {}):
        config = config_of(study, job)
        assert config.train.steps == 7 and attrs.asdict(config.data.source) == {"path": "there"}


def test_means_errors_and_differences(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    results = trained(
        study, {("low", 0): 1.5, ("high", 0): 1.4, ("best", 1): 1.2, ("dense", 0): 1.6, ("dense", 1): 1.8}
    )
    best, dense, later = numbers(study, results)["dense"]["rows"]
    # standard deviations of two values are |a - b| / sqrt 2, their standard errors |a - b| / 2
    assert best["bits_per_byte"] == pytest.approx(1.3) and best["error"] == pytest.approx(0.1)
    assert dense["difference"] == pytest.approx(0.4)
    assert dense["difference_error"] == pytest.approx((0.1**2 + 0.1**2) ** 0.5)
    assert dense["by_seed"] == {0: 1.6, 1: 1.8} and later["seeds"] == 0
    assert "| dense | 2 | 1.7000 ± 0.1000 | +0.4000 ± 0.1414 |" in markdown(study, results)


def test_a_power_law_and_its_error() -> None:
    exact = power_law("parameters", [1e3, 1e4, 1e6], [2 * x**-0.07 for x in (1e3, 1e4, 1e6)])
    assert exact is not None and exact.exponent == pytest.approx(0.07) and exact.error == pytest.approx(0, abs=1e-9)
    # ln y = 0, 0, 1 at ln x = 0, 1, 2: slope 1/2, residuals 1/6, -1/3, 1/6, error sqrt(1/6 / 1 / 2)
    e = 2.718281828459045
    rough = power_law("tokens", [1, e, e * e], [1, 1, e])
    assert rough is not None and rough.exponent == pytest.approx(-0.5)
    assert rough.error == pytest.approx((1 / 12) ** 0.5)
    assert power_law("tokens", [5, 5], [1, 2]) is None


@pytest.mark.parametrize(
    ("line", "wrong", "says"),
    [
        ("seeds = 2", "seeds = 0", "study.toml:3: seeds: expected at least 1"),
        ("seeds = 2", "sedes = 2", 'expected a known key, got "sedes"'),
        ('like = "dense"', 'like = "later"', 'dense-as-long.like: expected a variant before it, got "later"'),
        ('like = "dense"', 'like = "dense-as-long"', "expected a variant before it"),
        ('variants = ["best"]', 'variants = ["bset"]', "comparisons.rates.variants: expected one of low, high"),
        ('fit = "active_parameters"', 'fit = "loss"', "expected one of active_parameters, parameters, tokens"),
        ("num_dense_layers = 3", "num_dense_layers = 4", "model.num_dense_layers"),
        ("num_dense_layers = 3", "num_dens_layers = 3", "model.num_dens_layers"),
        ('["low", "high"]', '["low", "high"], set.train.steps = 5', "expected nothing beside it but seeds"),
        ("train.steps = 100", "train.stepz = 100", "train.stepz"),
        ("[variants]", "[variants.'a/b']\n[variants]", "expected a name of letters, digits, _ and -"),
        ("dense = { set.model.num_dense_layers = 3 }", "dense = 3", "variants.dense: expected a table, got 3"),
    ],
)  # fmt: skip
def test_a_study_that_is_wrong_is_refused(tmp_path: Path, line: str, wrong: str, says: str) -> None:
    assert line in STUDY
    with pytest.raises(InputError) as caught:
        study_of(tmp_path, STUDY.replace(line, wrong, 1))
    assert says in str(caught.value)


def test_a_study_without_variants_and_arguments_out_of_range_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="variants: expected a table each, got a table; write"):
        study_of(tmp_path, 'base = "quickstart"\n[variants]\n')
    study_of(tmp_path)
    assert nmoe(["bench", "records", str(tmp_path / "study.toml"), str(tmp_path / "out"), "--jobs", "0"]) == 2
    assert "--jobs, --threads, --gpus, --minutes: expected at least 1" in capsys.readouterr().err


def test_trainings_get_the_gpus_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(tmp_path)
    command = ["bench", "records", str(tmp_path / "study.toml"), str(tmp_path / "out")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 5,6")
    assert nmoe([*command, "--gpus", "4"]) == 2
    said = capsys.readouterr().err
    assert "--gpus: expected at most the 3 of CUDA_VISIBLE_DEVICES=7, 5,6, got 4" in said
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >> {seen}\nsleep 0.3\nexit 3\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert nmoe([*command, "--gpus", "2"]) == 1
    assert set(seen.read_text(encoding="utf-8").split()) == {"7", "5"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen.unlink()
    assert nmoe([*command[:-1], str(tmp_path / "again"), "--gpus", "2"]) == 1
    assert set(seen.read_text(encoding="utf-8").split()) == {"0", "1"}


def test_trainings_are_kept_and_a_study_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        'base = "quickstart"\nseeds = 1\n'
        "[set]\ntrain = { steps = 2, batch_size = 2, microbatch_size = 2, sequence_length = 32 }\n"
        "validation.tokens = 256\nmodel.hidden_size = 16\n"
        "[variants]\nfirst = {}\nfails = { set.optim.dense.lr = 1e30 }\n"
        '[comparisons.both]\nbaseline = "first"\nvariants = ["fails"]\n'
    )
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    steps = ("--train.steps=5",)

    def once(minutes: float) -> int:
        return main(tmp_path / "study.toml", out, jobs_at_once=2, threads=1, gpus=0, minutes=minutes, more=steps)

    assert once(1e-9) == 0  # no time at all: nothing is begun
    assert "0 results, 2 trainings known and left" in capsys.readouterr().out
    assert once(10.0) == 1
    said = capsys.readouterr().out
    first, failed = (next(out.glob(f"{name}-s0-*")) for name in ("first", "fails"))
    result = json.loads((first / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (first / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [event for event in events if event["event"] == "validation"][-1]
    assert (result["bits_per_byte"], result["steps"]) == (last["bits_per_byte"], 5)
    assert not list(out.glob("*/checkpoints")) and not list(out.glob("*/*.safetensors"))
    assert not list((out / "unfinished").iterdir())
    assert json.loads((failed / "result.json").read_text(encoding="utf-8"))["code"] == 5
    assert "| fails | 0, 1 failed |" in said and "2 results, 0 trainings known and left" in said
    assert (out / "table.md").read_text(encoding="utf-8") in said
    assert once(10.0) == 1 and "done" not in capsys.readouterr().out  # nothing is trained again


def test_what_is_refused_is_told_and_tried_again_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that is not prepared yet is no result of any variant; steps that are not finite are one."""
    text = 'base = "quickstart"\nseeds = 1\n[variants]\na = {}\n[comparisons.it]\nbaseline = "a"\nvariants = []\n'
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    command = ["bench", "records", str(tmp_path / "study.toml"), str(tmp_path / "out")]
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for code, done in ((2, 1), (1, 1), (-9, 1), (5, 1), (5, 0)):
        end = f"exit {code}" if code > 0 else f"kill {code} $$"
        python.write_text(f"#!/bin/sh\necho one; echo nmoe: data: expected {code}\n{end}\n", encoding="utf-8")
        python.chmod(0o755)
        assert nmoe(command) == 1
        said = capsys.readouterr().out
        assert said.count(f"ended with {code}, see output.txt: nmoe: data: expected {code}\n") == done, said
        assert "1 results, 0 trainings known and left" in said and not list(tmp_path.glob("out/unfinished/*"))


@pytest.mark.parametrize("text", ['{"key":', '{"kay": 1}', "7", '{"key": "a", "code": "x", "seconds": 1}'])
def test_a_damaged_result_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    study_of(tmp_path)
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "result.json").write_text(text, encoding="utf-8")
    assert nmoe(["bench", "records", str(tmp_path / "study.toml"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "result.json: expected the result of a training, got " in said and said.count("\n") == 1, said


def test_a_study_that_is_ended_ends_its_trainings_and_goes_on_with_them(tmp_path: Path) -> None:
    text = (
        'base = "quickstart"\nseeds = 1\n'
        "[set]\ntrain = { steps = 1000000, batch_size = 2, microbatch_size = 2, sequence_length = 32 }\n"
        "validation.tokens = 256\nmodel.hidden_size = 16\nlog.every = 1\n"
        '[variants]\nlong = {}\nlike-it = { like = "long" }\n'
        '[comparisons.both]\nbaseline = "long"\nvariants = ["like-it"]\n'
    )
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nmoe", "bench", "records", str(tmp_path / "study.toml"), str(out)]
    with subprocess.Popen([*command, "--threads", "1"]) as study:
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(
            path.stat().st_size for path in out.glob("unfinished/*/metrics.rank0.jsonl")
        ):
            time.sleep(0.1)
        study.send_signal(signal.SIGTERM)
        assert study.wait(60) == 75
    (run,) = (path for path in (out / "unfinished").iterdir() if path.is_dir())
    end = json.loads((run / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (end["event"], end["exit_code"]) == ("end", 75) and list((run / "checkpoints").glob("step-*"))


def test_the_shipped_studies_can_be_trained() -> None:
    for path in sorted((ROOT / "docs" / "records").glob("*-study.toml")):
        assert list(jobs(load_study(path), {}))
