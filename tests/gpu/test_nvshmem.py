"""NVSHMEM between two GPUs of one host: the bits of memory that they share, its faults, and how fast it is.

Ranks of a host store to each other; where each says that it is on a host of its own, they put."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nmoe.effects.parallel import launch
from nmoe.soak.soak import differences
from tests.effects.parallel.exchange_ranks import ended
from tests.effects.parallel.exchange_ranks import started as ranks_started
from tests.gpu.test_run import trained

pytestmark = pytest.mark.gpu2

OFF = {**launch.MULTICAST_OFF, "NVSHMEM_REMOTE_TRANSPORT": "none"}
"""NVLink multicast; and a network, which ranks that say they are on two hosts would have NVSHMEM look for."""

PUTS = "nvshmem:1"
NAMES = ("y", "count", "dx", "d_weight", "d_up", "d_down")
PATIENCE_S = 240.0


@pytest.mark.parametrize(
    ("what", "joined"),
    [("kernels", PUTS), ("plain", PUTS), ("slow", PUTS), ("fp8", PUTS), ("kernels", "nvshmem"), ("plain", "nvshmem")],
)
def test_the_bits_of_one_gpu(tmp_path: Path, what: str, joined: str) -> None:
    """And so of shared memory: five routings, forward and backward, with and without dedup."""
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF, joined)
    for process in processes:
        found = ended(process, PATIENCE_S)
        assert "error" not in found, found
        assert [found[name] for name in NAMES] == [0.0] * 6, found
        assert process.returncode == 0, "a process ends as it should with NVSHMEM open"


def test_ten_thousand_passes_with_delays(tmp_path: Path) -> None:
    """Forward and backward passes on routing of their own each, half of them replayed: no bit differs."""
    processes = ranks_started("many", 2, tmp_path, "cuda", OFF, PUTS)
    for found in [ended(each, PATIENCE_S) for each in processes]:
        assert "error" not in found, found
        assert (found["wrong"], found["passes"]) == ([0] * 6, 10_000), dict(zip(NAMES, found["wrong"], strict=True))


@pytest.mark.parametrize(("what", "joined"), [("dead", PUTS), ("hung", PUTS), ("hung", "nvshmem")])
def test_a_peer_that_is_gone_is_named(tmp_path: Path, what: str, joined: str) -> None:
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF, joined)
    try:
        found = ended(processes[0], PATIENCE_S)
        assert found["error"].startswith("PeerError: rank 0: expected every rank of the exchange within 20 s"), found
        assert "from rank 1" in found["error"] and found["seconds"] < 40, found
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_too_many_rows_stop_both_alike(tmp_path: Path) -> None:
    processes = ranks_started("overflow", 2, tmp_path, "cuda", OFF, PUTS)
    errors = [ended(each, PATIENCE_S)["error"] for each in processes]
    assert errors[0] == errors[1]
    assert errors[0].startswith("InputError: parallel.capacity: expected at most 2048 rows on a rank")


def test_a_heap_that_is_too_small_is_refused(tmp_path: Path) -> None:
    environ = {**OFF, "NVSHMEM_SYMMETRIC_SIZE": "1M"}
    for process in ranks_started("kernels", 2, tmp_path, "cuda", environ, PUTS):
        error = ended(process, PATIENCE_S)["error"]
        assert error.startswith("InputError: NVSHMEM_SYMMETRIC_SIZE: expected at least "), error


A_HOST_A_RANK = """
import os

name, number = os.uname(), os.environ.get("LOCAL_RANK")
if number is not None:
    os.uname = lambda: os.uname_result((name[0], f"host{number}", *name[2:]))
"""


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_training_leaves_the_bits_of_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: int
) -> None:
    """All metrics but times, every tensor of the checkpoint, the weights; and the run says what is not proven."""
    runs: list[Path] = []
    for name in ("peer", "nvshmem"):
        (tmp_path / name).mkdir()
        if name == "nvshmem" and hosts > 1:
            # Python imports a module of this name at its start
            (tmp_path / "sitecustomize.py").write_text(A_HOST_A_RANK)
            monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
            monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "none")
        runs.append(trained(tmp_path / name, 2, f"--parallel.transport={name}", "--train.steps=6", poison=255))
    assert differences(*runs) == []
    assert "no network has carried" in (runs[1] / "console.log").read_text()
