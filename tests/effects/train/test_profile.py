"""`nmoe run --profile`: every part is named, both passes are counted, and the times add up to the step's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config import dump
from nmoe.effects.train import profile
from nmoe.effects.train.profile import BACKWARD, FIRST, PARTS, STEPS, parts
from nmoe.errors import InputError
from tests.effects.train.test_step import RT
from tests.effects.train.tiny import tiny
from tests.test_cli import nmoe, refused


@attrs.frozen(kw_only=True, eq=False)
class Kernel:
    duration: float


@attrs.frozen(kw_only=True, eq=False)
class Event:
    """What the profiler tells of a call, as far as it is read."""

    name: str
    cpu_parent: Any = None
    sequence_nr: int = -1
    self_cpu_time_total: float = 0.0
    kernels: tuple[Kernel, ...] = ()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_time_goes_to_the_innermost_name_and_in_the_backward_pass_to_the_op_it_belongs_to(on_gpu: bool) -> None:
    def call(name: str, parent: Event | None = None, number: int = -1, us: float = 0.0) -> Event:
        cpu, gpu = (1.0, us) if on_gpu else (us, 1.0)
        return Event(
            name=name, cpu_parent=parent, sequence_nr=number, self_cpu_time_total=cpu, kernels=(Kernel(duration=gpu),)
        )

    router, attention = call("route"), call("attend")
    wide = call("aten::matmul", router, number=4, us=10)
    inner = call("dispatch", call("exchange plan", attention))
    node = call(f"{BACKWARD}: MmBackward0", number=4)
    unnamed = call(f"{BACKWARD}: SumBackward0", number=7)
    events = [
        wide,
        call("aten::mm", wide, us=100),
        call("aten::sort", inner, number=5, us=1000),
        call("aten::add", number=7, us=2000),
        call("aten::mm", call("MmBackward0", node, number=4), us=10_000),
        call("experts work", unnamed, us=20_000),
        call("aten::mm", call("experts", unnamed), us=100_000),
    ]
    found = {each.name: each for each in parts(events, tiny(), 2, 1e12, on_gpu=on_gpu)}
    assert {name for name, each in found.items() if each.total_s()} == {"route", "dispatch", "experts", "rest"}
    assert found["route"].forward_s == pytest.approx(110e-6 / 2)
    assert found["route"].backward_s == pytest.approx(10_000e-6 / 2)
    assert found["dispatch"].forward_s == pytest.approx(1000e-6 / 2)
    assert found["experts"].backward_s == pytest.approx(100_000e-6 / 2)
    assert found["rest"].forward_s == pytest.approx(2000e-6 / 2)
    assert found["rest"].backward_s == pytest.approx(20_000e-6 / 2)


def test_a_run_tells_where_its_time_goes(tmp_path: Path) -> None:
    config = tiny(vocab_size=4096, steps=FIRST + STEPS + 2)
    config = attrs.evolve(config, validation=attrs.evolve(config.validation, every=100))  # none while it is watched
    (tmp_path / "tiny.toml").write_text(dump(config))
    arguments = ("run", "tiny.toml", "--run.root=runs", "--run.name=one", "--profile")
    done = nmoe(*arguments, "trace.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "tiny.toml", "trace.json"]

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    count = {name: sum(each.get("name") == name and each.get("ph") == "X" for each in events) for name in PARTS}
    # three blocks, of which two are mixtures; the head's loss is one call a chunk or one for all
    assert [count[name] / STEPS for name in ("attend", "route", "dispatch", "experts", "combine")] == [
        3,
        2,
        2,
        2,
        2,
    ]
    assert count["linear_cross_entropy"] >= STEPS and count["adamw_"] >= STEPS

    table = done.stdout[done.stdout.index("profile ") :]
    rows = re.findall(r"^([a-z_]+) +([\d.]+) ms +([\d.]+) ms +([\d.]+) %", table, re.MULTILINE)
    times = {name: (float(forward), float(backward)) for name, forward, backward, _ in rows}
    assert set(times) == {*PARTS, "rest"}
    # the tiny model's query has no low rank; its norms are quicker than the table's last digit
    assert all(times[name][0] > 0 for name in ("attend", "experts", "linear_cross_entropy", "adamw_"))
    assert all(times[name][1] > 0 for name in ("project", "attend", "experts", "linear_cross_entropy")), (
        "the backward pass is counted too"
    )
    assert times["adamw_"][1] == 0
    step = re.search(r"a step took ([\d.]+) ms", table)
    idle = re.search(r"nothing runs +([\d.]+) ms", table)
    assert step is not None and idle is not None
    assert sum(map(sum, times.values())) + float(idle[1]) == pytest.approx(float(step[1]), rel=0.02)
    assert float(idle[1]) < 0.5 * float(step[1])

    refused(
        nmoe(*arguments, "trace.json", "--train.steps=3", cwd=tmp_path),
        "--profile: expected a file that is not there yet, got trace.json; .*",
        "--profile: expected a run of more than 3 steps, got 3; .*",
    )


def test_two_ranks_are_profiled_and_the_slowest_is_named(tmp_path: Path) -> None:
    config = tiny(vocab_size=4096, steps=FIRST + STEPS + 2)
    config = attrs.evolve(config, validation=attrs.evolve(config.validation, every=100))
    (tmp_path / "tiny.toml").write_text(dump(config))
    options = ("--gpus", "2", "--train.batch_size=4", "--train.microbatch_size=1", "--run.root=runs", "--run.name=two")
    done = nmoe("run", "tiny.toml", *options, "--profile", "trace.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.json")} == {"trace.json", "trace.rank1.json"}
    assert [line.startswith("slowest rank: ") for line in done.stdout.splitlines()].count(True) == 1
    table = done.stdout[done.stdout.index("profile ") :]
    cells = r"^([a-z_ ]+?) +([\d.]+) ms +([\d.]+) ms +([\d.]+) %.* ([01]): ([\d.]+) ms$"
    rows = {row[0]: [*map(float, row[1:])] for row in re.findall(cells, table, re.MULTILINE)}
    assert {*PARTS, "rest", "exchange dispatch", "exchange return"} <= set(rows)
    assert all(rows[name][0] > 0 for name in ("reduce", "gather", "exchange dispatch", "experts"))
    assert all(row[4] >= row[0] + row[1] - 0.02 for row in rows.values()), "the slowest is no quicker than the mean"
    step, beyond = (
        re.search(r"a step took ([\d.]+) ms", table),
        re.search(r"(nothing runs|in overlap) +([\d.]+)", table),
    )
    assert step is not None and beyond is not None
    spent = sum(row[0] + row[1] for row in rows.values())
    sign = 1 if beyond[1] == "nothing runs" else -1
    assert spent + sign * float(beyond[2]) == pytest.approx(float(step[1]), rel=0.02)


def test_the_slowest_rank_has_most_work_beside_waiting() -> None:
    def rank(attend: float, reduce: float) -> profile.Profile:
        times = {"attend": attend, "reduce": reduce}
        parts = [profile.Part(name=name, forward_s=s, backward_s=0.0, floor_s=None) for name, s in times.items()]
        return profile.Profile(step_s=0.010, parts=tuple(parts))

    text = profile.breakdown([rank(0.002, 0.007), rank(0.006, 0.003)])
    assert "slowest rank: 1, 6.00 ms of its own work a step, 4.00 ms in the mean" in text
    assert re.search(r"attend +4.00 ms +0.00 ms +40.0 % +1: 6.00 ms", text)
    assert re.search(r"reduce +5.00 ms +0.00 ms +50.0 % +0: 7.00 ms", text)
    assert re.search(r"nothing runs +1.00 ms +10.0 %", text)
    assert re.search(r"in overlap +2.00 ms +20.0 %", profile.breakdown([rank(0.005, 0.007)]))


def test_what_would_not_end_in_a_trace_is_refused(tmp_path: Path) -> None:
    replayed = attrs.evolve(tiny(), train=attrs.evolve(tiny().train, graph=True))
    with pytest.raises(InputError) as error, profile.profiling(tmp_path / "absent" / "trace.json", replayed):
        raise RuntimeError("it has begun")
    folder, graph = error.value.problems
    assert re.fullmatch(r"--profile: expected a file in an existing folder, got .*; make .*/absent", folder)
    assert re.fullmatch(r"--profile: .* not replayed, got train.graph = true; add --train.graph=false", graph)
    with (
        pytest.raises(InputError, match="a run of more than 3 steps, got 0; raise train.steps"),
        profile.profiling(tmp_path / "trace.json", tiny()) as world,
    ):
        world.ended(RT)  # of a run that was resumed where nothing is left to do
    assert not list(tmp_path.iterdir())
