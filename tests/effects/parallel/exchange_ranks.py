"""The processes of an exchange, started together and waited for: fresh ones, or forks of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.effects.parallel import exchange_rank
from tests.effects.parallel.rank_runs import on_ranks


def started(
    what: str,
    ranks: int,
    folder: Path,
    device: str = "cpu",
    environ: Mapping[str, str] | None = None,
    joined: int | str | None = None,
) -> list[subprocess.Popen[str]]:
    """One process a rank.

    joined  by "nvshmem", "nvshmem:1" on hosts of so many ranks, or by the proxy on such; None: by memory that all share
    """
    command = [sys.executable, "-m", "tests.effects.parallel.exchange_rank", what, device]
    return [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / "store"), *([] if joined is None else [str(joined)])],
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


def forked(
    what: str, ranks: int, folder: Path, per_host: int | None = None, gone: int | None = None
) -> list[dict[str, Any]]:
    """What each rank found, each a fork of this process.

    gone  a rank that finds nothing
    """
    sizes = () if per_host is None else (str(per_host),)

    def call(rank: int) -> int:
        exchange_rank.main(what, "cpu", rank, ranks, str(folder / "store"), *sizes)
        return 0

    ends = on_ranks(ranks, folder, call)
    assert [code for rank, (code, _) in enumerate(ends) if rank != gone] == [0] * (ranks - (gone is not None)), ends
    return [{} if rank == gone else found_by(text) for rank, (_, text) in enumerate(ends)]


def found_by(text: str) -> dict[str, Any]:
    """What a rank found, from all it wrote."""
    return json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))
