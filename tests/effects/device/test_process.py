"""The process: what it is told, which devices it takes, how it is stopped, how it keeps time."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch

import nmoe
from nmoe.cli import main
from nmoe.config.sections import Gqa, Memory
from nmoe.effects.device import gpu, ops, signals
from nmoe.effects.parallel import launch
from nmoe.effects.parallel.launch import from_environment
from nmoe.errors import InputError
from nmoe.pure.model.low_precision import RECIPES, emulated
from nmoe.pure.model.route import Routing
from tests.effects.train.tiny import tiny


def test_launch_reads_the_environment_it_is_given() -> None:
    meeting = {"MASTER_ADDR": "host", "MASTER_PORT": "7"}
    told = from_environment({"RANK": "3", "WORLD_SIZE": "8", "NMOE_HOME": "/somewhere", **meeting})
    assert (told.rank, told.world, told.home) == (3, 8, Path("/somewhere"))
    alone = from_environment({"HOME": "/home/a"})
    assert (alone.rank, alone.world, alone.home) == (0, 1, Path("/home/a/.cache/nmoe"))
    assert from_environment({"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}).home == Path("/x/nmoe")
    with pytest.raises(InputError, match=r"^WORLD_SIZE: expected a number from a launcher, got 'two'; "):
        from_environment({"WORLD_SIZE": "two"})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="^run.device: .*got none"):
        gpu.device("cuda")
    assert gpu.device("cpu") == torch.device("cpu")


def test_an_unsupported_gpu_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    advice = r"\(9\.0, 10\.0\), got 8\.0 \(Old GPU\); use one of those, write run\.kernels = \"torch\" from 8\.0 on, "
    with pytest.raises(InputError, match=advice):
        gpu.device("cuda")
    assert gpu.device("cuda", kernels="torch") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(InputError, match=r"got 7\.5 \(Old GPU\); "):
        gpu.device("cuda", kernels="torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert gpu.device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_plain_torch_is_what_a_cpu_runs(attention: str) -> None:
    """The record of a GPU that computes in plain torch holds the CPU's functions: no kernel, and the same numbers."""
    c = tiny().model
    if attention == "gqa":
        c = attrs.evolve(c, attention=Gqa(num_heads=2, num_kv_heads=1, head_dim=8))
    on_cpu, on_gpu = ops.build(torch.device("cpu"), c), ops.build(torch.device("cuda"), c, kernels="torch")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_gpu.norm(x, torch.ones(32), eps=1e-6), on_cpu.norm(x, torch.ones(32), eps=1e-6))
    assert type(on_gpu.attention) is type(on_cpu.attention)
    params = nmoe.init(nmoe.Key(0), nmoe.specs(c), nmoe.dims(c))
    tokens, bias = torch.arange(6)[None], torch.zeros(2, 8)
    hidden = [nmoe.forward(params, tokens, bias, nmoe.environment(c, 8, each), c)[0] for each in (on_cpu, on_gpu)]
    assert torch.equal(*hidden)
    passes = ops.arena_ops(torch.device("cuda"), "torch")
    assert passes.chunk == ops.PLAIN_CHUNK and passes.global_norm([x]) == x.norm()
    (line,) = ops.unmeasured(torch.device("cuda"), c, kernels="torch")
    assert line.startswith('kernels        none, run.kernels is "torch": ') and "slower" in line


def test_emulation_is_of_routed_and_shared_experts_wherever_it_runs() -> None:
    """On a CPU, and on a GPU in plain torch: not one of them falls back to the format of the weights."""
    low = emulated(RECIPES["mxfp8"], nmoe.Key(0))
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*size, generator=generator) for size in ((6, 128), (128, 2, 128), (128, 128)))
    routing = Routing(torch.arange(12).view(6, 2) % 3, torch.ones(6, 2))
    for device in map(torch.device, ("cpu", "cuda")):
        built = ops.build(device, tiny().model, kernels="torch", low=low)
        wide = ops.build(device, tiny().model, kernels="torch")
        assert torch.equal(built.shared(x, up, down), low.shared(x, up, down))
        assert not torch.equal(wide.shared(x, up, down), low.shared(x, up, down))
        y, exact = (each.experts(x, routing, up.repeat(3, 1, 1, 1), down.repeat(3, 1, 1))[0] for each in (built, wide))
        torch.testing.assert_close(y, 2 * low.shared(x, up, down))
        assert not torch.equal(y, exact)


def test_the_peak_of_a_cpu_is_the_fastest_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept by machine, threads and torch; a file that holds something else is named."""
    left = iter((2e9, 1e9, 3e9, 4e9, 1e9, 1e9, 1e9, 1e9, 5e9))

    def measure(where: torch.device) -> float:
        return next(left)

    monkeypatch.setattr(gpu, "_measured_flops", measure)
    cpu, home = torch.device("cpu"), tmp_path / "home"
    assert [gpu.peak_flops(cpu, home) for _ in range(3)] == [2e9, 2e9, 3e9], "a start beside other work is slower"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert gpu.peak_flops(cpu, home) == 4e9
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "_measured_flops", measure)
    assert gpu.peak_flops(cpu, home) == 3e9, "what another number of threads reaches is beside it"
    for text in ("", "[1]", '{"a": "b"}'):
        (home / "peak-flops.json").write_text(text)
        with pytest.raises(InputError, match=r"peak-flops.json: expected FLOP/s by machine, got .*; delete the file"):
            gpu.peak_flops(cpu, home)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gpu, "_measured_flops", lambda where: 5e9)
    assert gpu.peak_flops(cpu, tmp_path / "file" / "home") == 5e9
    assert "measured for this start alone: " in capsys.readouterr().out


ROOT = Path(__file__).parents[3]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.parametrize(
    ("first", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_signals_are_noted_and_the_second_interrupt_is_at_once(first: signal.Signals, code: int) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.stop_on_signals(60, lambda: None) as stop:
        assert stop.signal is None and stop.exit_code() == 0 and not stop.preempted()
        os.kill(os.getpid(), first)
        assert stop.signal is first and stop.exit_code() == code and stop.preempted() == (code == 75)
        for again in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), again)
        assert stop.signal is first and stop.exit_code() == code, "the first one counts"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert [each.name for each in threading.enumerate() if isinstance(each, threading.Timer)] == [], "no alarm is left"


STUCK = """
import os, signal, sys, time
import torch
from nmoe.effects.device import signals

with signals.stop_on_signals(0.5, lambda: os.write(1, b"overdue")):
    os.kill(os.getpid(), signal.SIGTERM)
    a = torch.ones(3000, 3000)
    begin = time.monotonic()
    while time.monotonic() - begin < 600:
        a @ a
"""


def test_when_the_grace_time_is_over_the_process_ends_whatever_it_does() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (75, b"overdue", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_with_nothing_to_save_a_signal_ends_it_at_once(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SystemExit) as caught, signals.exit_on_signals():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert caught.value.code == 75
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signals(60, lambda: None) as stop, signals.exit_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_clock_splits_time_by_name_and_starts_anew() -> None:
    clock = gpu.Clock(torch.device("cpu"))
    clock.mark("start")
    for name, seconds in (("a", 0.02), ("b", 0.05), ("a", 0.02)):
        time.sleep(seconds)
        clock.mark(name)
    first = clock.split()
    assert set(first) == {"a", "b"} and first["a"] >= 0.04 and first["b"] >= 0.05
    assert clock.split() == {}
    clock.mark("c")
    assert set(clock.split()) == {"c"}


def test_a_part_within_another_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 1 + 4 + 16, gather 2 + 8; all of the validation, 32 + 64 + 128, is one part."""
    times = list(itertools.accumulate((0, 1, 2, 4, 8, 16, 32, 64, 128, 256), initial=0))
    monkeypatch.setattr(time, "perf_counter", lambda: float(times.pop(0)))
    clock = gpu.Clock(torch.device("cpu"))
    times.pop(0)
    clock.mark("start")
    for _ in range(2):
        with clock.within("gather"):
            pass
    clock.mark("forward")
    with clock.within("exchange"):
        pass
    clock.mark(gpu.APART)
    clock.mark("log")
    assert clock.split() == {"forward": 21.0, "gather": 10.0, gpu.APART: 224.0, "log": 256.0}


@attrs.define
class FakeEvent:
    """An event of a GPU that is not there: `record` takes the time of the test's clock."""

    times: list[float]
    external: bool
    at_s: float = 0.0

    def record(self) -> None:
        self.at_s = self.times.pop(0)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at_s - self.at_s)


def test_a_replayed_step_is_divided_as_the_marks_in_its_graph_are(monkeypatch: pytest.MonkeyPatch) -> None:
    times, capturing = [0.0, 1.0, 9.0, 1.5, 4.5, 5.5, 2.0, 12.0, 13.0], [False]
    made: list[FakeEvent] = []

    def event(*, enable_timing: bool, external: bool) -> FakeEvent:
        assert enable_timing
        made.append(FakeEvent(times, external))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    clock = gpu.Clock(torch.device("cuda"))
    clock.mark("start")
    clock.mark("data")
    clock.mark(gpu.REPLAY)
    assert clock.split() == {"data": 1.0, gpu.REPLAY: 8.0}, "nothing in the graph is marked"
    capturing[0] = True
    for name in ("data", "forward", "backward"):
        clock.mark(name)
    capturing[0] = False
    assert [each.external for each in made] == [False] * 3 + [True] * 3
    made[2].at_s = times.pop(0)
    clock.mark(gpu.REPLAY)
    clock.mark("log")
    assert clock.split() == {"forward": 7.5, "backward": 2.5, "log": 1.0}


def test_the_allocator_is_set_by_the_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", made.append)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: made.append(given))
    memory = Memory(expandable_segments=True, fraction=0.5)
    gpu.set_allocator(torch.device("cpu"), memory, {"PYTORCH_ALLOC_CONF": "a:1"})
    assert made == []
    where = torch.device("cuda", 1)
    gpu.set_allocator(where, memory, {})
    assert made == ["expandable_segments:True", (0.5, where)]
    environ = from_environment({"PYTORCH_CUDA_ALLOC_CONF": "a:1", "HOME": "/home/a"}).allocator
    with pytest.raises(InputError, match=r"^PYTORCH_CUDA_ALLOC_CONF: expected to be unset, .*got 'a:1'; unset it"):
        gpu.set_allocator(where, memory, environ)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("gpus", "problem"),
    [
        (0, 'run.device: expected a GPU that torch can use for "cuda", got none; '),
        (4, "parallel.ranks: expected a GPU for each of the 8 ranks of this host, got 4; "),
    ],
)
def test_ranks_without_a_gpu_are_not_started(
    gpus: int, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """256 of them filled the memory of a machine before each had said that it has none (2026-11-29)."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch, "start", None)
    assert main(["run", "moonlight"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nmoe: {problem}")


def test_ranks_that_have_gpus_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(launch, "start", lambda ranks, *arguments, **patience: 70 + ranks)
    assert main(["run", "moonlight"]) == 78
