"""The processes of an exchange, started together and waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def started(
    what: str, ranks: int, folder: Path, device: str = "cpu", environ: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """One process a rank."""
    command = [sys.executable, "-m", "tests.effects.parallel.exchange_rank", what, device]
    return [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / "store")],
            cwd=Path(__file__).resolve().parents[3],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(process: subprocess.Popen[str], timeout_s: float = 60.0) -> dict[str, Any]:
    """What a rank found."""
    out, error = process.communicate(timeout=timeout_s)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        raise AssertionError(f"a rank says what it found, got exit code {process.returncode} and {error[-3000:]}")
    return json.loads(lines[-1])
