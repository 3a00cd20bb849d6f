"""What watches a run: real threads, real files, real commands."""

from __future__ import annotations

import io
import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from rich.console import Console

from nmoe.config import preset
from nmoe.config.layers import load
from nmoe.effects.record import alert_command, footer, heartbeat, telemetry
from nmoe.effects.record.log import open_log
from nmoe.effects.record.monitor import arrays_every, watching
from nmoe.effects.record.names import ARRAYS, RUN, TELEMETRY
from nmoe.errors import InputError
from nmoe.pure.watch.alerts import History
from nmoe.pure.watch.metrics import Experts, Rank, Step
from tests.effects.train.tiny import tiny


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def line(step: int, dead: Sequence[int] = (0, 0), **other: Any) -> Step:
    times: dict[str, Any] = {"elapsed_s": 1.0, "step_s": 0.1, "times": {}}
    sent: dict[str, Any] = {"exchange_bytes": None, "exchange_bandwidth": None}
    health: Any = dict.fromkeys(("max_over_mean", "cv", "entropy", "bias_min", "bias_max"), (1.0, 1.0))
    norms: dict[str, Any] = {"grad_norm": 1.0, "update_norm": 1.0, "auxiliary_loss": 0.0}
    norms |= {"mtp_losses": {}, "rates": {}, "spike_steps": 0}
    numbers: dict[str, Any] = {"loss": 2.0, "nonfinite_steps": 0, "tokens_per_s": 1e5, "mfu": 0.1, **other}
    rank = Rank(step=step, tokens_local=32 * step, memory_bytes=1, **times, **sent)
    experts = Experts(layer=[1, 2], dead=dead, **health)
    return Step(rank=rank, experts=experts, tokens_global=32 * step, **norms, **numbers)


@pytest.mark.parametrize("name", [name for name in preset.names() if name.startswith("quickstart")])
def test_a_first_run_has_fifty_loads_of_its_experts(name: str) -> None:
    config = load(preset.path_of(name), {}, ()).config
    logged = 1 + config.train.steps // config.log.every
    assert logged // arrays_every(config.log, config.train.steps) >= 50


@pytest.mark.parametrize(("steps", "every"), [(10, 1), (499, 1), (999, 1), (1500, 3), (5000, 10), (100_000, 10)])
def test_a_short_run_has_loads_more_often(steps: int, every: int) -> None:
    assert arrays_every(attrs.evolve(tiny().log, every=10, arrays_every=10), steps) == every


def test_a_watched_run_leaves_what_readers_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(steps=100)
    settings = attrs.evolve(config.log, every=1, arrays_every=2, alert_disk_gb=0.0)
    settings = attrs.evolve(settings, alert_command=f"cat > {tmp_path}/told; echo oh >&2; exit 3")
    config = attrs.evolve(config, log=settings)
    load = torch.arange(16).reshape(2, 8)
    with open_log(tmp_path, attempt=4) as opened:
        with watching(config, opened, flops=7, world=1, cuda=False, step=0, history=History()) as monitor:
            for step in (1, 2, 3):
                monitor.step(line(step, dead=[0, int(step == 3)]), load)
            monitor.log.event("end", status="finished", step=3)
    beat = json.loads((tmp_path / RUN).read_text())
    assert (beat["status"], beat["step"], beat["steps"], beat["layers"]) == ("finished", 3, 100, [1, 2])
    assert (beat["num_experts"], beat["top_k"], beat["tokens_per_step"], beat["flops_per_token"]) == (8, 2, 32, 7)
    arrays = lines(tmp_path / ARRAYS)
    assert [(line["step"], line["load"], line["attempt"]) for line in arrays] == [
        (1, load.tolist(), 4),
        (3, load.tolist(), 4),
    ]
    events = {line["event"]: line for line in lines(tmp_path / "events.jsonl")}
    told = capsys.readouterr().out
    assert told.count("alert          dead_experts at step 3: 12 % of a layer's experts got no token") == 1
    assert (events["alert"]["rule"], events["alert"]["step"], events["alert"]["attempt"]) == ("dead_experts", 3, 4)
    assert events["alert_command_failed"]["error"] == "log.alert_command: expected exit code 0, got 3: oh"
    assert json.loads((tmp_path / "told").read_text())["rule"] == "dead_experts"
    (reading, *_) = lines(tmp_path / TELEMETRY)
    assert reading["attempt"] == 4 and reading["gpus"] == [] and reading["host"]["disk_free_bytes"] > 0


def test_what_was_not_finite_before_the_attempt_is_no_alert(tmp_path: Path) -> None:
    with open_log(tmp_path, attempt=2) as opened:
        before = History(nonfinite_steps=3)
        with watching(tiny(), opened, flops=1, world=1, cuda=False, step=10, history=before) as monitor:
            for step, nonfinite in ((11, 3), (12, 4)):
                monitor.step(line(step, nonfinite_steps=nonfinite), torch.zeros(2, 8, dtype=torch.int64))
    alerts = [line for line in lines(tmp_path / "events.jsonl") if line["event"] == "alert"]
    assert [(line["rule"], line["step"]) for line in alerts if line["rule"] == "nonfinite"] == [("nonfinite", 12)]


def test_loads_are_those_of_their_step_though_the_trainer_goes_on(tmp_path: Path) -> None:
    config = attrs.evolve(tiny(), log=attrs.evolve(tiny().log, arrays_every=1))
    with open_log(tmp_path, attempt=1) as opened:
        with watching(config, opened, flops=1, world=1, cuda=False, step=0, history=History()) as monitor:
            for step in range(1, 9):
                load = torch.full((100, 1000), step)
                monitor.step(line(step), load)
                load.zero_()
    written = lines(tmp_path / ARRAYS)
    assert [(line["step"], {n for row in line["load"] for n in row}) for line in written] == [
        (step, {step}) for step in range(1, 9)
    ]


def test_loads_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    (tmp_path / ARRAYS).symlink_to("/dev/full")
    config = attrs.evolve(tiny(), log=attrs.evolve(tiny().log, arrays_every=1))
    reached = 0
    with (
        pytest.raises(InputError, match="expected room for one more line, got No space left"),
        open_log(tmp_path, attempt=1) as opened,
    ):
        with watching(config, opened, flops=1, world=1, cuda=False, step=0, history=History()) as monitor:
            for reached in range(1, 9):
                monitor.step(line(reached), torch.zeros(2, 8, dtype=torch.int64))
    assert reached == 2, "told with the next loads, not after the run"


def test_a_heartbeat_on_a_slow_disk_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, disk = threading.Event(), threading.Event()

    def slow(path: Path, text: str) -> None:
        begun.set()
        disk.wait()

    monkeypatch.setattr(heartbeat.files, "write_text", slow)
    heart = heartbeat.Heart({}, lambda: "now")
    beat = threading.Thread(target=heart.beat, args=(tmp_path,))
    update = threading.Thread(target=heart.update, kwargs={"step": 1}, daemon=True)
    beat.start()
    begun.wait()
    update.start()
    update.join(5)
    held = update.is_alive()
    disk.set()
    beat.join()
    assert not held


def test_a_command_that_hangs_is_killed_and_holds_nobody(tmp_path: Path) -> None:
    problems: list[str] = []
    thread = alert_command.start(f"(sleep 2; touch {tmp_path}/late) & wait", {}, 0.2, problems.append)
    thread.join()
    assert problems == ["log.alert_command: expected an end within 0.2 s, got none; it was killed"]
    time.sleep(2.2)
    assert not (tmp_path / "late").exists()


def test_a_command_is_not_waited_for(tmp_path: Path) -> None:
    problems: list[str] = []
    os.mkfifo(tmp_path / "go")
    thread = alert_command.start(f"read word < {tmp_path}/go; touch {tmp_path}/$word", {}, 60.0, problems.append)
    (tmp_path / "go").write_text("after\n")  # only now can the command end
    thread.join()
    assert problems == [] and (tmp_path / "after").exists()


def test_a_full_disk_is_an_alert_once_telemetry_tells(tmp_path: Path) -> None:
    config = attrs.evolve(tiny(), log=attrs.evolve(tiny().log, alert_disk_gb=5.0, telemetry_every_s=1000.0))
    with open_log(tmp_path, attempt=1) as opened:
        with watching(config, opened, flops=1, world=1, cuda=False, step=0, history=History()) as monitor:
            # the one reading that the thread itself takes must not come between
            until = time.monotonic() + 30
            while not lines(tmp_path / "telemetry.rank0.jsonl") and time.monotonic() < until:
                time.sleep(0.01)
            for step, free in ((1, 6e9), (2, 4e9)):
                monitor.reading(opened.metrics_file, {"host": {"disk_free_bytes": free}})
                monitor.step(line(step), torch.zeros(2, 8, dtype=torch.int64))
    alerts = [line for line in lines(tmp_path / "events.jsonl") if line["event"] == "alert"]
    assert ("disk", 2) in [(line["rule"], line["step"]) for line in alerts]
    assert ("disk", 1) not in [(line["rule"], line["step"]) for line in alerts]


def test_a_reading_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings are taken all along, beside a trainer whose memory a fork would share."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"a process was started: {arguments}")

    for place, name in ((subprocess, "Popen"), (os, "system"), (os, "fork"), (os, "posix_spawn")):
        monkeypatch.setattr(place, name, refuse)
    taken = threading.Event()
    readings: list[Any] = []

    def append(fields: Any) -> None:
        readings.append(fields)
        taken.set()

    with telemetry.sampling(tmp_path, 1000.0, cuda=False, append=append, event=refuse):
        assert taken.wait(60)
    assert readings[0]["host"]["memory_total_bytes"] > 0


def test_what_a_gpu_does_not_have_is_null_and_the_rest_is_told() -> None:
    class NotSupported(Exception):
        pass

    def absent(*_: Any) -> None:
        raise NotSupported

    def constant(value: Any) -> Any:
        return lambda *_: value

    nvml = SimpleNamespace(
        NVMLError_NotSupported=NotSupported,
        nvmlDeviceGetCount=constant(1),
        nvmlDeviceGetHandleByIndex=constant("handle"),
        nvmlDeviceGetUtilizationRates=constant(SimpleNamespace(gpu=87)),
        nvmlDeviceGetMemoryInfo=constant(SimpleNamespace(used=1 << 30, total=2 << 30)),
        nvmlDeviceGetCurrentClocksEventReasons=constant(0b101),
        nvmlDeviceGetName=constant("A"),
        nvmlDeviceGetUUID=constant("GPU-1"),
        nvmlDeviceGetPowerUsage=constant(123_456),
        nvmlDeviceGetEnforcedPowerLimit=absent,
        nvmlDeviceGetTemperature=constant(61),
        nvmlDeviceGetClockInfo=lambda _, kind: {"sm": 1755, "memory": 2619}[kind],
        nvmlDeviceGetTotalEccErrors=absent,
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_MEMORY_ERROR_TYPE_CORRECTED=0,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlClocksEventReasonSwPowerCap=0b100,
        nvmlClocksThrottleReasonHwSlowdown=0b1000,
        nvmlClocksEventReasonSwThermalSlowdown=0b10000,
        nvmlClocksThrottleReasonHwThermalSlowdown=0b100000,
        nvmlClocksThrottleReasonHwPowerBrakeSlowdown=0b1000000,
    )
    (gpu,) = telemetry.gpus(nvml)
    assert (gpu["power_w"], gpu["power_limit_w"], gpu["ecc_corrected"]) == (123.456, None, None)
    assert (gpu["utilization"], gpu["temperature_c"], gpu["sm_clock_mhz"]) == (87, 61, 1755)
    assert gpu["throttle"] == ["sw_power_cap"], "an idle GPU is not held down"


def test_telemetry_that_fails_is_told_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    calls: list[int] = []

    def broken(folder: Path) -> dict[str, Any]:
        calls.append(1)
        raise OSError("no figures")

    monkeypatch.setattr(telemetry, "host", broken)
    with telemetry.sampling(
        tmp_path, 0.01, cuda=False, append=lambda line: None, event=lambda name, **_: told.append(name)
    ):
        while len(calls) < 3:
            time.sleep(0.01)
    assert told == ["telemetry_failed"]


def test_a_heartbeat_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    problems: list[str] = []
    heart = heartbeat.Heart({"status": "running"}, lambda: "now")
    with heartbeat.beating(tmp_path / "gone", heart, 0.01, problems.append):
        time.sleep(0.2)
    assert problems[0].startswith("run.json: expected to be written, got No such file")
    assert len(problems) == 2, "once for all beats in a row, and once for the last"


def test_no_footer_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with footer.shown(10, wanted=True, console=lambda: Console(file=out)) as foot:
        foot.step(5, 2.0)
    assert out.getvalue() == ""


def test_the_footer_on_a_terminal() -> None:
    out = io.StringIO()
    with footer.shown(10, wanted=True, console=lambda: Console(file=out, force_terminal=True, width=80)) as foot:
        foot.step(4, 3.0)
        foot.step(5, float("nan"))
        foot.event({"event": "alert", "message": "loss nan"})
    assert "50.0 %  step 5/10" in out.getvalue() and "▁x" in out.getvalue() and "alert  loss nan" in out.getvalue()
