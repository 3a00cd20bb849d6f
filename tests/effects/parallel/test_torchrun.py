"""`nmoe-torchrun`: the exit codes of ranks, which torchrun itself replaces by 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.configs import ROOT

LAUNCHER = "from nmoe.effects.parallel.torchrun import main; main()"
RANK = """
import os, signal, sys, time
from pathlib import Path

what, ready = sys.argv[1:]
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    Path(ready, os.environ["RANK"]).touch()
    time.sleep(60)
elif os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else sys.exit(int(what))
"""


def start(folder: Path, what: str, hosts: int = 1, node: int = 0) -> subprocess.Popen[str]:
    rank = folder / "rank.py"
    rank.write_text(RANK)
    where = (f"--nnodes={hosts}", f"--node-rank={node}", f"--nproc-per-node={2 // hosts}")
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-c",
                LAUNCHER,
                *where,
                "--master-addr=127.0.0.1",
                f"--master-port={29600 + os.getpid() % 300}",
            ),
            *(str(rank), what, str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("what", "code"), [("75", 75), ("killed", 137)])
def test_it_ends_as_its_rank(tmp_path: Path, what: str, code: int) -> None:
    launcher = start(tmp_path, what)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == code, stderr
    assert "Traceback" not in stderr
    assert ("nmoe: rank 1: expected the end of all ranks together, got exit code 137" in stderr) == (what == "killed")


def test_a_signal_to_the_launcher_is_75(tmp_path: Path) -> None:
    """On each of two hosts, after its rank has ended."""
    launchers = [start(tmp_path, "wait", hosts=2, node=node) for node in range(2)]
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.1)
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    ends = [(launcher.communicate(timeout=60)[1], launcher.returncode) for launcher in launchers]
    assert [code for _, code in ends] == [75, 75], ends
