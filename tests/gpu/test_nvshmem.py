"""NVSHMEM between two GPUs of one host: the bits of memory that they share, its faults, and how fast it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nmoe.effects.parallel import launch
from nmoe.soak.soak import differences
from tests.configs import ROOT
from tests.effects.parallel.exchange_ranks import ended
from tests.effects.parallel.exchange_ranks import started as ranks_started
from tests.gpu.test_run import environment, trained

pytestmark = pytest.mark.gpu2

OFF = dict(launch.MULTICAST_OFF)
NAMES = ("y", "count", "dx", "d_weight", "d_up", "d_down")
PATIENCE_S = 240.0


@pytest.mark.parametrize("what", ["kernels", "plain", "slow"])
def test_the_bits_of_one_gpu(tmp_path: Path, what: str) -> None:
    """And so of shared memory: five routings, forward and backward, with and without dedup."""
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF, "nvshmem")
    for process in processes:
        found = ended(process, PATIENCE_S)
        assert "error" not in found, found
        assert [found[name] for name in NAMES] == [0.0] * 6, found
        assert process.returncode == 0, "a process ends as it should with NVSHMEM open"


def test_ten_thousand_passes_with_delays(tmp_path: Path) -> None:
    """Forward and backward passes on routing of their own each, half of them replayed: no bit differs."""
    processes = ranks_started("many", 2, tmp_path, "cuda", OFF, "nvshmem")
    for found in [ended(each, PATIENCE_S) for each in processes]:
        assert "error" not in found, found
        assert (found["wrong"], found["passes"]) == ([0] * 6, 10_000), dict(zip(NAMES, found["wrong"], strict=True))


@pytest.mark.parametrize("what", ["dead", "hung"])
def test_a_peer_that_is_gone_is_named(tmp_path: Path, what: str) -> None:
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF, "nvshmem")
    try:
        found = ended(processes[0], PATIENCE_S)
        assert found["error"].startswith("PeerError: rank 0: expected every rank of the exchange within 20 s"), found
        assert "from rank 1" in found["error"] and found["seconds"] < 40, found
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_too_many_rows_stop_both_alike(tmp_path: Path) -> None:
    processes = ranks_started("overflow", 2, tmp_path, "cuda", OFF, "nvshmem")
    errors = [ended(each, PATIENCE_S)["error"] for each in processes]
    assert errors[0] == errors[1]
    assert errors[0].startswith("InputError: parallel.capacity: expected at most 2048 rows on a rank")


def test_a_heap_that_is_too_small_is_refused(tmp_path: Path) -> None:
    environ = {**OFF, "NVSHMEM_SYMMETRIC_SIZE": "1M"}
    for process in ranks_started("kernels", 2, tmp_path, "cuda", environ, "nvshmem"):
        error = ended(process, PATIENCE_S)["error"]
        assert error.startswith("InputError: NVSHMEM_SYMMETRIC_SIZE: expected at least "), error


def test_a_training_leaves_the_bits_of_shared_memory(tmp_path: Path) -> None:
    """All metrics but times, every tensor of the checkpoint, the weights; and the run says what is not proven."""
    runs: list[Path] = []
    for name in ("peer", "nvshmem"):
        (tmp_path / name).mkdir()
        runs.append(trained(tmp_path / name, 2, f"--parallel.transport={name}", "--train.steps=6", poison=255))
    assert differences(*runs) == []
    assert "no network has carried" in (runs[1] / "console.log").read_text()


def test_how_fast_rows_move(tmp_path: Path) -> None:
    """Printed: by NVSHMEM, and by stores to the addresses that it hands out."""
    command = [sys.executable, "-m", "tests.gpu.nvshmem_rank"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")],
            cwd=ROOT,
            env={**environment(tmp_path), **OFF},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        rates = ended(process, PATIENCE_S)["GB/s"]
        print(rates)
        assert all(rate > 0 for rate in [*rates["nvshmem"], *rates["stores"]])
