"""The memory of the index does not follow the file it reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("duckdb")

CHILD = """
import resource, sys
from pathlib import Path
from nmoe.effects.viz.index import open_index, poll, query
with open_index(Path(sys.argv[1]), Path(sys.argv[2])) as index:
    while poll(index).left_bytes:
        pass
    print(query(index, "select count(*) from metrics")[0][0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.long
def test_a_file_of_300_mb_is_read_in_450_mb_of_memory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("")
    count = 0
    with open(run / "metrics.rank0.jsonl", "w") as file:
        while file.tell() < 300_000_000:
            values = ",".join(f'"metric/name_{i:02d}":{i}.{(count * 7919 + i * 104729) % 1000003:06d}' for i in range(24))
            file.write(f'{{"attempt":1,"step":{count},"elapsed_s":{count}.5,"tokens_global":{count},{values}}}\n')
            count += 1
    told = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "runs"), str(tmp_path / "index.duckdb")],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    rows, peak_mb = map(int, told.stdout.split())
    assert rows == count
    assert peak_mb < 450
