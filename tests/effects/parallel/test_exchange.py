"""The exchange among real processes that share memory: the same result as one, and a peer that is gone is named."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nmoe.effects.parallel.exchange import opening
from nmoe.errors import InputError
from tests.effects.parallel.exchange_rank import TIMEOUT_S
from tests.effects.parallel.exchange_ranks import ended, started

RESULTS = ("y", "count", "dx", "d_weight", "d_up", "d_down")


@contextmanager
def running(what: str, ranks: int, folder: Path, per_host: int | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are gone afterwards."""
    processes = started(what, ranks, folder, joined=per_host)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def left_behind() -> list[str]:
    """Files of arenas that still have a name."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("nmoe-")]


@pytest.mark.parametrize("what", ["plain", pytest.param("slow", marks=pytest.mark.long)])
def test_two_processes_compute_what_one_does(tmp_path: Path, what: str) -> None:
    """Within the rounding of sums that torch orders by the number of rows."""
    with running(what, 2, tmp_path) as processes:
        for found in [ended(process) for process in processes]:
            assert "error" not in found, found
            assert {name: found[name] for name in RESULTS if found[name] > 1e-6} == {}
            assert found["count"] == 0
            assert found["sent"] > 0
    assert left_behind() == []


def test_fp8_that_is_emulated_has_the_bits_of_one_rank(tmp_path: Path) -> None:
    """Output and weight gradients; the gradients of tokens and gates within the order of sums."""
    with running("emulated fp8", 2, tmp_path) as processes:
        for found in [ended(process) for process in processes]:
            assert "error" not in found, found
            assert [found[name] for name in ("y", "count", "d_up", "d_down")] == [0.0] * 4, found
            assert {name: found[name] for name in ("dx", "d_weight") if found[name] > 1e-6} == {}


@pytest.mark.long
@pytest.mark.parametrize("what", ["kernels", "fp8"])
def test_the_kernels_run_among_processes_too(tmp_path: Path, what: str) -> None:
    """Interpreted, over the same shared memory, waiting for each other by the same flags: bitwise."""
    with running(what, 2, tmp_path) as processes:
        for found in [ended(process) for process in processes]:
            assert [found.get(name) for name in RESULTS] == [0.0] * 6, found


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_peer_that_is_gone_is_named_in_time(tmp_path: Path, how: signal.Signals) -> None:
    with running("hung", 2, tmp_path) as processes:
        assert processes[1].stdout is not None
        assert processes[1].stdout.readline() == "hung\n"
        processes[1].send_signal(how)
        found = ended(processes[0])
        told = f"PeerError: rank 0: expected every rank of the exchange within {TIMEOUT_S:g} s, got nothing from rank 1"
        assert found["error"].startswith(told), found
        assert TIMEOUT_S <= found["seconds"] < 10 * TIMEOUT_S


def test_too_many_rows_stop_every_rank_alike(tmp_path: Path) -> None:
    with running("overflow", 2, tmp_path) as processes:
        errors = [ended(process)["error"] for process in processes]
    assert errors[0] == errors[1]
    assert errors[0].startswith("InputError: parallel.capacity: expected at most 12 rows on a rank (0.33 x the mean)")


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("astray", "expected each rank's first word in its arena, got another one from rank"),
        (
            "hosts",
            "parallel.experts: expected the ranks of an expert group on one host, got rank 1 on host1 and",
        ),
    ],
)
def test_memory_that_is_not_shared_is_refused(tmp_path: Path, what: str, told: str) -> None:
    with running(what, 2, tmp_path) as processes:
        assert any(told in ended(process)["error"] for process in processes)


def test_multicast_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Everywhere:
        has_multicast_support = staticmethod(lambda kind, index: True)

    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Everywhere)
    with pytest.raises(InputError, match="multicast off before ranks share memory, got it on; export TORCH_SYMM_MEM"):
        opening._refuse_multicast(torch.device("cuda", 0))


@pytest.mark.long
def test_ranks_that_disagree_are_told_so(tmp_path: Path) -> None:
    with running("disagree", 2, tmp_path) as processes:
        errors = [ended(process)["error"] for process in processes]
    assert "rank 0: expected the same sizes on all ranks" in errors[0] and "experts=9" in errors[0]
    assert "9 experts for 2 ranks" in errors[1]
