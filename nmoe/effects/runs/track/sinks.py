"""The targets of `nmoe track`: each takes lines in order and keeps none twice, also when it was killed between two.

TensorBoard's file is cut to the length the position holds. W&B drops a step it has, so a line's number is its step.
MLflow is asked which line it has last. Trackio cannot be asked, and stores in a thread of its own: a follower killed
between two positions tells it the lines between them once more, and what that thread held is lost.

None of them may look at the machine: what they would see is the follower's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nmoe.effects.runs.track.follow import Line, Open, Position, Sink
from nmoe.errors import InputError, pip_install

EVENTS = "track/tensorboard/events.out.tfevents.0.nmoe"


def opener(name: str) -> Open:
    """How a target is opened.

    Raises:  InputError when its extra is not installed.
    """
    return {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio, "mlflow": mlflow}[name]


@contextmanager
def _sent(name: str, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """What a target refuses while it is opened or closed, as one line."""
    try:
        yield
    except failures as error:
        raise InputError(
            f"--to {name}: expected a target that can be opened and closed, got {type(error).__name__}: "
            f"{error}; fix that and "
            "start `nmoe track` again, it resumes where it was"
        ) from error


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        got = "none" if isinstance(error, ModuleNotFoundError) else error  # a broken one says what it lacks
        raise InputError(
            f"--to: expected the package {extra} to be installed, got {got}; install it with: {pip_install(extra)}"
        ) from error


class TensorBoard:
    """One event file in the run folder. A new attempt is a session start: the reader drops the steps it repeats."""

    remembers = False
    failures = ()

    def __init__(self, file: Any, record: Any, event: Any, summary: Any) -> None:
        self._file, self._record, self._event, self._summary = file, record, event, summary

    def write(self, lines: list[Line]) -> int:
        for line in lines:
            if line.new_attempt:
                start = self._event.SessionLog(status=self._event.SessionLog.START)
                self._put(self._event.Event(wall_time=line.time, step=line.step, session_log=start))
            values = [self._summary.Summary.Value(tag=tag, simple_value=v) for tag, v in line.values.items()]
            self._put(
                self._event.Event(wall_time=line.time, step=line.step, summary=self._summary.Summary(value=values))
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _put(self, event: Any) -> None:
        self._record.write(event.SerializeToString())


@contextmanager
def tensorboard(folder: Path, position: Position) -> Iterator[Sink]:
    """Open the event file, cut to what the position knows of it."""
    records = _module("tensorboard.summary.writer.record_writer", "tensorboard")
    event = _module("tensorboard.compat.proto.event_pb2", "tensorboard")
    summary = _module("tensorboard.compat.proto.summary_pb2", "tensorboard")
    path = folder / EVENTS
    path.parent.mkdir(parents=True, exist_ok=True)
    if position.target and (not path.exists() or path.stat().st_size < position.target):
        raise InputError(
            f"{path}: expected the length in track/tensorboard.json, got less; remove the track folder to begin anew"
        )
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(position.target)
        file.seek(position.target)
        sink = TensorBoard(file, records.RecordWriter(file), event, summary)
        if position.target == 0:
            sink._put(event.Event(wall_time=0.0, file_version="brain.Event:2"))
        yield sink


class Wandb:
    """A run of W&B whose step is the number of the line; `step` is a metric and the axis of the others."""

    remembers = True

    def __init__(self, run: Any, first: int, failures: tuple[type[Exception], ...]) -> None:
        self._run, self._next, self.failures = run, first, failures

    def write(self, lines: list[Line]) -> int:
        for line in lines:
            if line.index >= self._next:
                self._run.log({**line.values, "step": line.step, "attempt": line.attempt}, step=line.index)
                self._next = line.index + 1
        return 0


@contextmanager
def wandb(folder: Path, position: Position) -> Iterator[Sink]:
    """Open, or continue with, the run that has the folder's name."""
    module = _module("wandb", "wandb")
    failures = (module.Error, OSError)
    settings = module.Settings(x_disable_stats=True, x_disable_machine_info=True, console="off")
    with _sent("wandb", failures):
        run = module.init(
            project="nmoe",
            id=folder.name,
            name=folder.name,
            resume="allow",
            dir=str(folder / "track"),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        first = run.step if run.resumed else 0
    try:
        yield Wandb(run, first, failures)
    finally:
        with _sent("wandb", failures):
            run.finish()


class Trackio:
    """A run of Trackio: it takes what comes, by step, and tells of no failure."""

    remembers = False
    failures = (OSError,)

    def __init__(self, module: Any) -> None:
        self._module, self._next = module, 0

    def write(self, lines: list[Line]) -> int:
        for line in lines:
            if line.index >= self._next:
                self._module.log({**line.values, "attempt": line.attempt}, step=line.step)
                self._next = line.index + 1
        return 0


@contextmanager
def trackio(folder: Path, position: Position) -> Iterator[Sink]:
    """Open, or continue with, the run that has the folder's name."""
    module = _module("trackio", "trackio")
    with _sent("trackio", (OSError, ValueError)):
        module.init(
            project="nmoe", name=folder.name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
    try:
        yield Trackio(module)
    finally:
        with _sent("trackio", Trackio.failures):
            module.finish()


class Mlflow:
    """A run of MLflow. The line's number is one of its metrics, the last of each line to be written."""

    remembers = True

    def __init__(
        self, client: Any, run_id: str, metric: Any, first: int, failures: tuple[type[Exception], ...]
    ) -> None:
        self._client, self._run_id, self._metric, self._next, self.failures = client, run_id, metric, first, failures

    def write(self, lines: list[Line]) -> int:
        for line in lines:
            if line.index < self._next:
                continue
            stamp = round(1000 * line.time)
            values = {**line.values, "attempt": float(line.attempt), "line": float(line.index)}
            metrics = [self._metric(k, v, stamp, line.step) for k, v in values.items()]
            for begin in range(0, len(metrics), 1000):  # the most that one call may hold
                self._client.log_batch(self._run_id, metrics=metrics[begin : begin + 1000])
            self._next = line.index + 1
        return 0


@contextmanager
def mlflow(folder: Path, position: Position) -> Iterator[Sink]:
    """Open, or continue with, the run whose tag `nmoe.run` is the folder's name, in the experiment "nmoe"."""
    tracking = _module("mlflow.tracking", "mlflow")
    entities = _module("mlflow.entities", "mlflow")
    failures = (_module("mlflow.exceptions", "mlflow").MlflowException, OSError)
    with _sent("mlflow", failures):
        client = tracking.MlflowClient()
        experiment = client.get_experiment_by_name("nmoe")
        where = client.create_experiment("nmoe") if experiment is None else experiment.experiment_id
        earlier = client.search_runs([where], f"tags.`nmoe.run` = '{folder.name}'")
        run = earlier[0] if earlier else client.create_run(where, tags={"nmoe.run": folder.name}, run_name=folder.name)
        first = max((round(m.value) + 1 for m in client.get_metric_history(run.info.run_id, "line")), default=0)
    yield Mlflow(client, run.info.run_id, entities.Metric, first, failures)
