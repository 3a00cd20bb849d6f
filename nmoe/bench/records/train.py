"""The trainings of a study as processes, several at once, and their results as they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import cattrs

from nmoe.bench.records.report import markdown, numbers
from nmoe.bench.records.study import Job, Result, Study, config_of, jobs, load_study
from nmoe.config import dump
from nmoe.effects import files
from nmoe.effects.device import signals
from nmoe.effects.record import lines
from nmoe.effects.record.names import CHECKPOINTS, EVENTS, METRICS, WEIGHTS
from nmoe.effects.terminal import say
from nmoe.errors import InputError, printable
from nmoe.pure.units import duration

RESULT = "result.json"
OUTPUT = "output.txt"
UNFINISHED = "unfinished"
"""Folder of the trainings that are running, or were stopped and continue when the study does."""
POLL_S = 0.2
GRACE_S = 20.0

LASTING = (0, 5)
"""Exit codes of a training that ended, or whose steps were not finite. What ends another way, as for want of data or of
a GPU, is trained again by the next call: what was wrong is not the variant's."""


@attrs.frozen(kw_only=True)
class Started:
    """A training that runs."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    began: float


def main(
    path: Path, out: Path, *, jobs_at_once: int, threads: int, gpus: int, minutes: float, more: tuple[str, ...]
) -> int:
    """Train what has no result yet, and write the table after each training.

    A training that was refused or that broke is tried again by the next call.

    out      folder of a run folder and result a training, without weights and checkpoints
    gpus     GPUs of which each training has one, one training a GPU; 0: `jobs_at_once` on the CPU
    minutes  after which trainings are stopped; the same command continues with them
    more     keys of all variants

    Writes:  `out`: results as they come, table.md, table.json.
    returns  exit code 1 when a training failed
    Raises:  InputError for a study or arguments that are wrong.
    """
    if min(jobs_at_once, threads) < 1 or gpus < 0 or minutes <= 0:
        raise InputError(
            f"--jobs, --threads, --gpus, --minutes: expected at least 1, 1, 0 and above 0, got {jobs_at_once}, "
            f"{threads}, {gpus} and {minutes}; correct them"
        )
    study, seen = load_study(path, more), _gpus(gpus)
    with files.refusing(out, "a folder one may write"):
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    results = read_results(out)
    began = time.monotonic()
    with signals.exit_on_signals(), _trainings() as running:
        while True:
            ended = [x for x in running if x.process.poll() is not None]
            for training in ended:
                running.remove(training)
                result = _collect(out, training)
                results[training.job.key] = result
                _write_tables(out, study, results)
                say(_line(out, study, results, len(running), time.monotonic() - began, training.job, result))
            free = sorted(set(range(gpus or jobs_at_once)) - {x.slot for x in running})
            over = time.monotonic() - began >= 60 * minutes
            if ended or not running:
                taken = {x.job.key for x in running}
                waiting = [] if over else [job for job in jobs(study, results) if job.key not in taken]
                for job, slot in zip(waiting, free, strict=False):
                    running.append(_start(out, study, job, slot, threads, gpu=seen[slot] if gpus else None))
            if over or not running:
                break
            time.sleep(POLL_S)
    _write_tables(out, study, results)
    left = sum(1 for _ in jobs(study, results))
    say(markdown(study, results))
    say(f"records        {len(results)} results, {left} trainings known and left  {out}")
    return int(any(result.code for result in results.values()))


def read_results(out: Path) -> dict[str, Result]:
    """The results in a folder that last, by the hash of their config.

    Raises:  InputError for one that is damaged.
    """
    found = [_result(path) for path in sorted(out.glob(f"*/{RESULT}"))]
    return {result.key: result for result in found if result.code in LASTING}


def _result(path: Path) -> Result:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cattrs.Converter(forbid_extra_keys=True).structure(fields, Result)
    except (OSError, TypeError, ValueError, cattrs.BaseValidationError) as error:
        problem = printable(str(error).partition("\n")[0])
        raise InputError(
            f"{path}: expected the result of a training, got {problem}; delete its folder, and it is trained again"
        ) from error


@contextmanager
def _trainings() -> Iterator[list[Started]]:
    """The trainings that run; those that still do at the end are stopped, and save what they have."""
    running: list[Started] = []
    try:
        yield running
    finally:
        for training in running:
            training.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        for training in running:
            try:
                training.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                training.process.kill()
                training.process.wait()


def _gpus(count: int) -> Sequence[str]:
    """The first GPUs of those that CUDA_VISIBLE_DEVICES leaves to this process. Raises: InputError for fewer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(count)]
    named = [name.strip() for name in visible.split(",") if name.strip()]
    if count > len(named):
        raise InputError(
            f"--gpus: expected at most the {len(named)} of CUDA_VISIBLE_DEVICES={visible}, got {count}; ask for fewer, "
            "or name more there"
        )
    return named[:count]


def _start(out: Path, study: Study, job: Job, slot: int, threads: int, *, gpu: str | None) -> Started:
    """Start a training, or continue with it. Writes: its folder among the unfinished."""
    root = out / UNFINISHED
    config = root / f"{job.name}.toml"
    whole = config_of(study, job)
    files.write_text(config, dump(attrs.evolve(whole, run=attrs.evolve(whole.run, root=str(root), name=job.name))))
    # A variable NMOE_A__B would be another key of the config.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NMOE_") or "__" not in name}
    environ |= {"OMP_NUM_THREADS": str(threads)} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with open(root / f"{job.name}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nmoe", "run", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # a Ctrl-C is for this process, which ends the trainings
        )
    return Started(job=job, process=process, slot=slot, began=time.monotonic())


def _collect(out: Path, training: Started) -> Result:
    """What an ended training came to. Writes: its folder and result into `out`; weights and checkpoints go."""
    job, code = training.job, training.process.returncode
    root = out / UNFINISHED
    result = Result(key=job.key, code=code, seconds=time.monotonic() - training.began)
    folder = root / job.name
    if code == 0:
        result = _finished(folder, result)
    folder.mkdir(exist_ok=True)  # one that was refused has none
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)
    (folder / WEIGHTS).unlink(missing_ok=True)
    shutil.move(root / f"{job.name}.log", folder / OUTPUT)
    (root / f"{job.name}.toml").unlink()
    files.write_text(folder / RESULT, json.dumps(attrs.asdict(result), indent=2) + "\n")
    if (out / job.name).exists():  # of an attempt that did not last
        shutil.rmtree(out / job.name)
    os.rename(folder, out / job.name)
    return result


def _finished(folder: Path, result: Result) -> Result:
    """A result with what the run folder says."""
    start = [line.fields for line in lines.read(folder / EVENTS) if line.fields["event"] == "start"][-1]
    metrics = [line.fields for line in lines.read(folder / METRICS)]
    steps = [fields for fields in metrics if "loss" in fields]
    last = next(fields for fields in reversed(metrics) if "validation/loss" in fields)
    layers = [x["experts"]["max_over_mean"] for x in steps[-max(1, len(steps) // 4) :]]
    late = [max(layer) for layer in layers if layer]
    return attrs.evolve(
        result,
        bits_per_byte=float(last["validation/bits_per_byte"]),
        loss=float(last["validation/loss"]),
        tokens=steps[-1]["tokens_global"],
        steps=steps[-1]["step"],
        step_s=statistics.median(fields["step_s"] for fields in steps),
        parameters=start["parameters"],
        active_parameters=start["active_parameters"],
        experts=statistics.fmean(late) if late else None,
    )


def _write_tables(out: Path, study: Study, results: Mapping[str, Result]) -> None:
    """Write the table for a person and for a program."""
    files.write_text(out / "table.md", markdown(study, results))
    files.write_text(out / "table.json", json.dumps(numbers(study, results), indent=2) + "\n")


def _line(
    out: Path,
    study: Study,
    results: Mapping[str, Result],
    running: int,
    elapsed_s: float,
    job: Job,
    result: Result,
) -> str:
    """How far the study is: an estimate by the trainings so far, of the same time each."""
    left = sum(1 for _ in jobs(study, results))
    each = statistics.fmean(x.seconds for x in results.values())
    about = duration(left * each / max(1, running))
    came = f"{result.bits_per_byte:.4f} bits/byte"
    if result.code != 0:
        said = (out / job.name / OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"]
        came = f"ended with {result.code}, see {OUTPUT}: {printable(said[-1])}"
    return f"{duration(elapsed_s)}  {len(results)} done, {left} left, about {about}  {job.name}  {came}"
