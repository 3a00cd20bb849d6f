"""Stand-ins for other trackers: their functions, with the parameters of the real ones, over a store that stays.

Parameters as in wandb 0.31.0, trackio 0.43.0 and mlflow-skinny 3.17.2. What is kept of each is what a follower relies
on: W&B counts steps upward and drops one that it has passed; MLflow keeps every point and can be asked for them;
Trackio keeps what it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import attrs
import pytest

Told = list[tuple[int, int, dict[str, float]]]
"""Step, attempt and values of each line."""


@attrs.define
class Store:
    """What a service has, how many calls it will take, and how many it will fail after them."""

    runs: dict[str, Any] = attrs.field(factory=dict)
    take: int = 0
    fail: int = 0
    closed: int = 0
    opened_with: list[dict[str, Any]] = attrs.field(factory=list)

    def meet(self, error: Callable[[], Exception]) -> None:
        """Fail, when it is due."""
        if self.take:
            self.take -= 1
        elif self.fail:
            self.fail -= 1
            raise error()


def install(patch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    patch.setitem(__import__("sys").modules, name, module)


def wandb(patch: pytest.MonkeyPatch, store: Store) -> Callable[[], Told]:
    """Put W&B's stand-in in place; returns what tells its lines."""

    class Error(Exception):
        pass

    class Settings:
        def __init__(self, *, x_disable_stats: bool, x_disable_machine_info: bool, console: str) -> None:
            store.opened_with.append({"looks": not (x_disable_stats and x_disable_machine_info), "console": console})

    class Run:
        def __init__(self, rows: dict[int, dict[str, Any]], resumed: bool) -> None:
            self._rows, self.resumed = rows, resumed

        @property
        def step(self) -> int:
            return max(self._rows, default=-1) + 1

        def define_metric(
            self,
            name: str,
            step_metric: Any = None,
            step_sync: bool | None = None,
            hidden: bool | None = None,
            summary: str | None = None,
            overwrite: bool | None = None,
        ) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            store.meet(lambda: Error("429: too many requests"))
            assert step is not None
            if step >= self.step - 1:
                self._rows.setdefault(step, {}).update(data)

        def finish(self, exit_code: int | None = None) -> None:
            store.closed += 1

    def init(
        entity: str | None = None,
        project: str | None = None,
        dir: Any = None,
        id: str | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Any = None,
        config: Any = None,
        config_exclude_keys: Any = None,
        config_include_keys: Any = None,
        allow_val_change: bool | None = None,
        group: str | None = None,
        job_type: str | None = None,
        mode: str | None = None,
        force: bool | None = None,
        reinit: Any = None,
        resume: Any = None,
        resume_from: str | None = None,
        fork_from: str | None = None,
        save_code: bool | None = None,
        tensorboard: bool | None = None,
        sync_tensorboard: bool | None = None,
        monitor_gym: bool | None = None,
        settings: Any = None,
    ) -> Run:
        store.meet(lambda: Error("no API key"))
        assert resume == "allow" and id is not None
        resumed = id in store.runs
        return Run(store.runs.setdefault(id, {}), resumed)

    install(patch, "wandb", init=init, Error=Error, Settings=Settings)

    def told() -> Told:
        ((_, rows),) = store.runs.items()
        assert list(rows) == list(range(len(rows))), "a row a line"
        return [
            (row["step"], row["attempt"], {k: v for k, v in row.items() if k not in ("step", "attempt")})
            for row in rows.values()
        ]

    return told


def trackio(patch: pytest.MonkeyPatch, store: Store) -> Callable[[], Told]:
    """Put Trackio's stand-in in place; returns what tells its lines."""
    current: list[Told] = []

    def init(
        project: str,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
        dataset_id: str | None = None,
        bucket_id: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        settings: Any = None,
        private: bool | None = None,
        embed: bool = True,
        auto_log_gpu: bool | None = None,
        gpu_log_interval: float = 10.0,
        auto_log_cpu: bool | None = None,
        cpu_log_interval: float = 10.0,
        webhook_url: str | None = None,
        webhook_min_level: Any = None,
    ) -> None:
        store.meet(lambda: ConnectionError("no route"))
        assert resume == "allow" and name is not None
        store.opened_with.append({"looks": auto_log_gpu is not False or auto_log_cpu is not False})
        current.append(store.runs.setdefault(name, []))

    def log(metrics: dict[str, Any], step: int | None = None) -> None:
        store.meet(lambda: ConnectionError("no route"))
        assert step is not None
        values = {key: value for key, value in metrics.items() if key != "attempt"}
        current[-1].append((step, metrics["attempt"], values))

    def finish() -> None:
        current.pop()
        store.closed += 1

    install(patch, "trackio", init=init, log=log, finish=finish)
    return lambda: next(iter(store.runs.values()))


@attrs.frozen
class Metric:
    """A point of MLflow."""

    key: str
    value: float
    timestamp: int
    step: int


@attrs.frozen
class Info:
    """What MLflow knows of a run."""

    run_id: str


@attrs.frozen
class MlflowRun:
    """A run of MLflow."""

    info: Info
    tags: Mapping[str, str]


def mlflow(patch: pytest.MonkeyPatch, store: Store) -> Callable[[], Told]:
    """Put MLflow's stand-in in place; returns what tells its lines."""

    class MlflowException(Exception):
        pass

    @attrs.frozen
    class Experiment:
        experiment_id: str

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Experiment | None:
            store.meet(lambda: MlflowException("503"))
            return Experiment("7") if "experiment" in store.runs else None

        def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
            store.runs["experiment"] = name
            return "7"

        def search_runs(
            self,
            experiment_ids: list[str],
            filter_string: str = "",
            run_view_type: int = 1,
            max_results: int = 1000,
            order_by: list[str] | None = None,
            page_token: str | None = None,
        ) -> list[MlflowRun]:
            assert experiment_ids == ["7"]
            found = [store.runs["run"]] if "run" in store.runs else []
            return [run for run in found if filter_string == f"tags.`nmoe.run` = '{run.tags['nmoe.run']}'"]

        def create_run(
            self,
            experiment_id: str,
            start_time: int | None = None,
            tags: dict[str, Any] | None = None,
            run_name: str | None = None,
        ) -> MlflowRun:
            assert "run" not in store.runs
            store.runs["run"] = MlflowRun(Info("r1"), tags or {})
            return store.runs["run"]

        def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
            return [each for each in store.runs.get("points", []) if each.key == key]

        def log_batch(
            self,
            run_id: str,
            metrics: Sequence[Metric] = (),
            params: Sequence[Any] = (),
            tags: Sequence[Any] = (),
            synchronous: bool | None = None,
        ) -> None:
            store.meet(lambda: MlflowException("503"))
            assert run_id == "r1" and len(metrics) <= 1000
            store.runs.setdefault("points", []).extend(metrics)

    install(patch, "mlflow")
    install(patch, "mlflow.tracking", MlflowClient=MlflowClient)
    install(patch, "mlflow.entities", Metric=Metric)
    install(patch, "mlflow.exceptions", MlflowException=MlflowException)

    def told() -> Told:
        lines: Told = []
        values: dict[str, float] = {}
        for point in store.runs["points"]:
            assert point.key not in values, "once a line"
            values[point.key] = point.value
            if point.key == "line":
                assert values.pop("line") == len(lines)
                lines.append((point.step, int(values.pop("attempt")), values))
                values = {}
        assert not values
        return lines

    return told


TRACKERS = {"wandb": wandb, "trackio": trackio, "mlflow": mlflow}
