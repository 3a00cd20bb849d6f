"""`nmoe run --profile`: every part is named, both passes are counted, and the times add up to the step's."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nmoe.config import dump
from nmoe.effects.train import profile
from nmoe.effects.train.profile import BACKWARD, FIRST, PARTS, STEPS, attribute, parts
from nmoe.errors import InputError
from nmoe.pure.model.model import Batch
from tests.effects.train.test_step import RT
from tests.effects.train.tiny import tiny
from tests.test_cli import nmoe, refused

REAL = Path(__file__).with_name("two_h200.trace.json.gz")
"""Rank 0 of two H200 with experts shared: three steps of two layers of `moonlet` in torch 2.11, without what nobody
reads, times from 0."""


@attrs.define
class Trace:
    """A trace made by hand: ranges of the host, and the launches in them."""

    events: list[dict[str, Any]] = attrs.field(factory=list)

    def range_(self, name: str, ts: int, dur: int, number: int | None = None, tid: int = 1) -> None:
        """An operator, or a named range where the name is a part's. Writes: `events`."""
        named = name in PARTS or name.startswith("exchange ")
        event = {"cat": "user_annotation" if named else "cpu_op", "name": name, "pid": 1, "tid": tid}
        args = {} if number is None else {"Sequence number": number}
        self.events.append(event | {"ts": ts, "dur": dur, "args": args})

    def launch_(self, ts: int, us: int, tid: int = 1, cat: str = "cuda_driver", kind: str = "kernel") -> None:
        """A launch of the host, and its kernel long after. Writes: `events`."""
        args = {"correlation": len(self.events)}
        self.events += [
            {"cat": kind, "name": "kernel", "pid": 0, "tid": 7, "ts": ts + 10**6, "dur": us, "args": args},
            {"cat": cat, "name": "launch", "pid": 1, "tid": tid, "ts": ts, "dur": 1, "args": args},
        ]


def test_a_kernel_belongs_to_the_innermost_name_around_its_launch() -> None:
    trace = Trace()
    trace.range_("route", 0, 100)
    trace.range_("aten::matmul", 10, 80)
    trace.launch_(20, 1, cat="cuda_runtime")  # inside an operator inside a name, as torch does
    trace.range_("attend", 100, 800)
    trace.range_("exchange plan", 110, 700)
    trace.range_("dispatch", 120, 300)
    trace.launch_(130, 2)  # straight inside the name, as Triton does
    trace.launch_(420, 4)  # as the range ends
    trace.launch_(130, 8, tid=2)  # in another thread
    assert attribute(trace.events, on_gpu=True) == {
        ("route", False): 1,
        ("dispatch", False): 2,
        ("exchange plan", False): 4,
        ("rest", False): 8,
    }


def test_a_name_inside_an_operator_has_what_is_launched_in_it_in_both_passes() -> None:
    trace = Trace()
    trace.range_("Mixture", 0, 100, number=4)
    trace.range_("experts", 10, 10)
    trace.launch_(12, 1)
    trace.range_("exchange dispatch", 30, 10)
    trace.launch_(32, 2, cat="cuda_runtime", kind="gpu_memset")
    trace.range_(f"{BACKWARD}: MixtureBackward", 200, 100, number=4, tid=2)
    trace.range_("MixtureBackward", 210, 80, number=4, tid=2)
    trace.range_("experts", 220, 10, tid=2)
    trace.launch_(222, 4, tid=2)
    trace.range_("exchange combine", 240, 10, tid=2)
    trace.launch_(242, 8, tid=2, kind="gpu_memcpy")
    assert attribute(trace.events, on_gpu=True) == {
        ("experts", False): 1,
        ("exchange dispatch", False): 2,
        ("experts", True): 4,
        ("exchange combine", True): 8,
    }


@pytest.mark.parametrize("maker", ["experts", None])
def test_a_node_belongs_to_the_op_that_made_it_not_to_the_first_of_its_number(maker: str | None) -> None:
    trace = Trace()
    trace.range_("route", 0, 100)
    trace.range_("aten::detach", 10, 10, number=4)  # makes no node: the number is still the next one's
    if maker is not None:
        trace.range_(maker, 200, 300)
    trace.range_("aten::linear", 210, 200, number=4)
    trace.range_("aten::mm", 220, 100, number=4)
    trace.range_("swiglu", 600, 300)
    trace.range_("aten::mul", 610, 100, number=5)
    trace.range_(f"{BACKWARD}: MulBackward0", 1000, 100, number=5, tid=2)
    trace.launch_(1010, 1, tid=2)
    trace.range_(f"{BACKWARD}: MmBackward0", 1100, 100, number=4, tid=2)
    trace.range_("MmBackward0", 1110, 80, number=4, tid=2)
    trace.launch_(1120, 2, tid=2)
    assert attribute(trace.events, on_gpu=True) == {("swiglu", True): 1, (maker or "rest", True): 2}


def test_on_a_cpu_an_operator_counts_without_those_inside_it() -> None:
    trace = Trace()
    trace.range_("attend", 0, 100)
    trace.range_("aten::matmul", 10, 80, number=4)
    trace.range_("aten::mm", 20, 60, number=4)
    trace.range_("exchange dispatch", 30, 40)
    trace.range_("aten::add", 100, 7)
    trace.range_(f"{BACKWARD}: MmBackward0", 200, 1000, number=4)
    trace.range_("MmBackward0", 210, 900, number=4)
    trace.range_("experts", 220, 800)
    assert attribute(trace.events, on_gpu=False) == {
        ("attend", False): 60,
        ("exchange dispatch", False): 40,
        ("rest", False): 7,
        ("attend", True): 200,
        ("experts", True): 800,
    }


def test_a_kernel_whose_launch_was_not_traced_is_counted() -> None:
    trace = Trace()
    trace.range_("attend", 0, 100)
    trace.launch_(10, 3_000)
    trace.events.pop()
    assert attribute(trace.events, on_gpu=True) == {("rest", False): 3_000}


def test_times_of_parts_are_a_step_s() -> None:
    trace = Trace()
    trace.range_("attend", 0, 100)
    trace.launch_(10, 3_000)
    found = {part.name: part for part in parts(trace.events, tiny(), 2, 1e12, on_gpu=True)}
    assert set(found) == {*PARTS, "rest"}
    assert {name: part.total_s() for name, part in found.items() if part.total_s()} == {"attend": pytest.approx(1.5e-3)}


def test_a_real_trace_is_split_as_the_names_of_its_kernels_say() -> None:
    events = json.loads(gzip.decompress(REAL.read_bytes()))["traceEvents"]
    ran = [event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]

    def of(*names: str) -> float:
        return sum(event["dur"] for event in ran if event["name"].startswith(names))

    spent = attribute(events, on_gpu=True)
    assert len(ran) == 1890
    assert sum(spent.values()) == pytest.approx(of(""), rel=1e-9)
    assert spent["route", True] < 0.05 * spent["experts", True]
    assert spent["experts", True] > 1.5 * spent["experts", False] > 0
    gemms = of("grouped_", "gather_gemm_swiglu_kernel", "swiglu_backward_gemm_kernel")
    assert gemms < profile.total(spent, "experts") < 1.3 * gemms
    both = ("exchange dispatch", "exchange return", "exchange combine", "exchange wait")
    assert all(spent[name, backward] > 100 for name in both for backward in (False, True))
    assert spent["exchange plan", False] > 100
    assert profile.total(spent, "exchange wait") == pytest.approx(of("barrier_kernel"), rel=1e-9)
    pushed = profile.total(spent, "exchange dispatch") + profile.total(spent, "exchange return")
    assert of("push_kernel") < pushed < 1.3 * of("push_kernel")
    assert spent["gather", False] == pytest.approx(of("ncclDevKernel_AllGather"), rel=1e-9)
    assert spent["reduce", True] == pytest.approx(of("ncclDevKernel_ReduceScatter"), rel=1e-9)
    assert of("ncclDevKernel_AllReduce") < spent["reduce", False] < 1.01 * of("ncclDevKernel_AllReduce")


def test_all_ranges_of_the_package_are_parts() -> None:
    """A range whose name is no part would count as what is around it."""
    sources = Path(profile.__file__).parents[2].rglob("*.py")
    names = {name for path in sources for name in re.findall(r'record_function\("([^"]+)"\)', path.read_text())}
    assert "experts" in names
    assert {name for name in names if not name.startswith("exchange ")} <= set(PARTS)


@pytest.mark.parametrize(
    ("reads", "calls", "steps"),
    [
        (2, [], 0),
        (3, ["start at 2", "stop at 3"], 0),
        (5, ["start at 2", "step at 3", "stop at 5"], 2),
        (9, ["start at 2", "step at 3", "stop at 6"], 3),
    ],
)
def test_the_profiler_is_loaded_a_step_before_the_trace(reads: int, calls: list[str], steps: int) -> None:
    seen: list[str] = []

    class Profiler:
        def __getattr__(self, name: str) -> Any:
            return lambda: seen.append(f"{name} at {watch.reads}")

    watch = profile.Watch(profiler=Profiler(), on_gpu=False)
    read = watch.reading(lambda cursor: Batch(tokens=torch.zeros(1), targets=torch.zeros(1), start=()))
    for cursor in range(reads):
        read(cursor)
    watch.end()
    watch.end()
    assert seen == calls
    assert watch.steps == steps


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
