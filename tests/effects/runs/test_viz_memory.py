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
from nmoe.effects.runs.viz.index import open_index, poll, query
with open_index(Path(sys.argv[1]), Path(sys.argv[2])) as index:
    while poll(index).left_bytes:
        pass
    print(query(index, "select count(*) from metrics")[0][0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.long
def test_a_file_is_larger_than_the_memory_that_reads_it(tmp_path: Path) -> None:
    """Two gigabytes of lines; DuckDB may have one of memory, and Python holds a piece of the file."""
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("")
    values = ",".join(f'"metric/name_{i:02d}":{i}.{i * 104729 % 1000003:06d}' for i in range(24))
    count = 0
    with open(run / "metrics.rank0.jsonl", "w") as file:
        while file.tell() < 2_000_000_000:
            lines = range(count, count + 10_000)
            file.writelines(
                f'{{"attempt":1,"step":{n},"elapsed_s":{n}.5,"tokens_global":{n},"loss":{n * 7919 % 997},{values}}}\n'
                for n in lines
            )
            count += len(lines)
    told = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "runs"), str(tmp_path / "index.duckdb")],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    rows, peak_mb = map(int, told.stdout.split())
    assert rows == count
    assert peak_mb < 1400
