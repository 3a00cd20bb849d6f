"""Real processes, killed at random moments, on a real disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_a_killed_writer_loses_nothing_that_was_told(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.effects.checkpoint.killed", str(tmp_path / "checkpoints"), str(kills), "11"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)
    assert (counts["lost"], counts["wrong"]) == (0, 0), (counts, done.stderr)
    assert counts["inside"] >= 0.7 * kills, f"too few deaths inside a save to prove anything: {counts}"
    assert counts["left"] > 0 and counts["last"] > 5, counts
