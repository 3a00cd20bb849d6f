"""The process: what it is told, which devices it takes, how it is stopped, how it keeps time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from nmoe.effects import runtime
from nmoe.errors import InputError


def test_launch_reads_the_environment_it_is_given() -> None:
    told = runtime.launch({"RANK": "3", "WORLD_SIZE": "8", "NMOE_HOME": "/somewhere"})
    assert (told.rank, told.world, told.home) == (3, 8, Path("/somewhere"))
    alone = runtime.launch({"HOME": "/home/a"})
    assert (alone.rank, alone.world, alone.home) == (0, 1, Path("/home/a/.cache/nmoe"))
    assert runtime.launch({"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}).home == Path("/x/nmoe")
    with pytest.raises(InputError, match=r"^WORLD_SIZE: a launcher sets it to a number, got 'two'; "):
        runtime.launch({"WORLD_SIZE": "two"})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="^run.device: .*got none"):
        runtime.device("cuda")
    assert runtime.device("cpu") == torch.device("cpu")


def test_an_unsupported_gpu_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(InputError, match=r"\(9\.0, 10\.0\), got 8\.0 \(Old GPU\); "):
        runtime.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert runtime.device("cuda") == torch.device("cuda", 0)


def test_signals_are_noted_and_the_second_interrupt_is_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with runtime.stop_on_signals() as stop:
        assert stop.signal is None and stop.exit_code() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM and stop.exit_code() == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_clock_splits_time_by_name_and_starts_anew() -> None:
    clock = runtime.Clock(torch.device("cpu"))
    clock.mark("start")
    for name, seconds in (("a", 0.02), ("b", 0.05), ("a", 0.02)):
        time.sleep(seconds)
        clock.mark(name)
    first = clock.split()
    assert set(first) == {"a", "b"} and first["a"] >= 0.04 and first["b"] >= 0.05
    assert clock.split() == {}
    clock.mark("c")
    assert set(clock.split()) == {"c"}
