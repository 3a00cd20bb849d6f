"""A refactor reproduces the golden loss curve bitwise.

A change of arithmetic is a commit of its own that says why and writes the curve anew:
`python -m tests.golden.test_curve > tests/golden/curve.json`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PORTABLE = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}


def curve() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.curve"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **PORTABLE, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_curve_is_the_golden_one() -> None:
    found, golden = curve(), json.loads((ROOT / "tests/golden/curve.json").read_text())
    assert found == curve(), "the same run twice"
    for compute in ("fp32", "bf16"):
        assert found[compute]["initial"] == golden[compute]["initial"], "initial values"
        assert found[compute]["loss"] == golden[compute]["loss"]
        assert found[compute]["grad_norm"] == golden[compute]["grad_norm"]
        assert found[compute]["final"] == golden[compute]["final"]
        losses = [float.fromhex(each) for each in golden[compute]["loss"]]
        assert losses[-1] < losses[0] - 0.3, "the golden run learns"


if __name__ == "__main__":
    print(json.dumps(curve(), indent=1))
