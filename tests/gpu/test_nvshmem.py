"""NVSHMEM between two GPUs of one host: its kernels put rows where they belong, signal, and are as fast as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu2

ONE_HOST = {
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def test_runs_of_rows_arrive_before_the_signal_that_follows_them(tmp_path: Path) -> None:
    """Three times with other rows, and by plain stores to the addresses that NVSHMEM gives; rates are printed."""
    command = [sys.executable, "-m", "tests.gpu.nvshmem_rank"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **ONE_HOST},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            lines = [line for line in out.splitlines() if line.startswith("{")]
            assert lines, (process.returncode, error[-4000:])
            found = json.loads(lines[-1])
            print(found)
            assert found["wrong"] == [{}] * 4, found
    finally:
        for process in processes:
            process.kill()
            process.communicate()
