"""How fast each transport is between two GPUs of one host, printed: as one host, and as two of a GPU each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT
from tests.effects.parallel.exchange_ranks import ended
from tests.gpu.test_nvshmem import OFF, PATIENCE_S
from tests.gpu.test_run import environment

pytestmark = pytest.mark.gpu2


@pytest.mark.parametrize("dedup", [1, 0])
@pytest.mark.parametrize("joined", ["peer", "nvshmem", "nvshmem:1", "proxy:1"])
def test_how_fast_rows_move(tmp_path: Path, joined: str, dedup: int) -> None:
    """Rows that are put and waited for; a mixture forward and backward, and the bytes that one sends."""
    command = [sys.executable, "-m", "tests.gpu.exchange_rates", joined, str(dedup)]
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
        found = ended(process, PATIENCE_S)
        print(found)
        assert process.returncode == 0 and len(found["passes"]) == 3
        for row in found["passes"].values():
            assert row["ms"] > 0 and row["MB"] > 0
            # a row once a host, so no more than with dedup, beside the places of each
            assert (0 < row["MB over TCP"] < 1.1 * row["MB"]) if joined == "proxy:1" else not row["MB over TCP"]
