"""Two GPUs: thousands of exchanges to the bit, peers that die or hang, other numbers of GPUs on resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nmoe.effects.parallel import launch
from tests.effects.parallel.exchange_ranks import ended
from tests.effects.parallel.exchange_ranks import started as ranks_started
from tests.gpu.test_run import environment, started, trained

pytestmark = pytest.mark.gpu2

OFF = dict(launch.MULTICAST_OFF)
NAMES = ("y", "count", "dx", "d_weight", "d_up", "d_down")
PATIENCE_S = 240.0


@pytest.mark.parametrize(
    ("what", "per_host"),
    [("kernels", None), ("plain", None), ("slow", None), ("fp8", None), ("kernels", 1), ("plain", 1), ("fp8", 1)],
)
def test_the_bits_of_one_gpu(tmp_path: Path, what: str, per_host: int | None) -> None:
    """Of one host, and of two that the proxy joins."""
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF, per_host)
    for found in [ended(each, PATIENCE_S) for each in processes]:
        assert "error" not in found, found
        assert [found[name] for name in NAMES] == [0.0] * 6, found


def test_ten_thousand_passes_with_delays(tmp_path: Path) -> None:
    """Forward and backward passes on routing of their own each, half of them replayed: no bit differs."""
    processes = ranks_started("many", 2, tmp_path, "cuda", OFF)
    for found in [ended(each, PATIENCE_S) for each in processes]:
        assert "error" not in found, found
        assert (found["wrong"], found["passes"]) == ([0] * 6, 10_000), dict(zip(NAMES, found["wrong"], strict=True))


@pytest.mark.parametrize("what", ["dead", "hung"])
def test_a_peer_that_is_gone_is_named(tmp_path: Path, what: str) -> None:
    processes = ranks_started(what, 2, tmp_path, "cuda", OFF)
    try:
        error = ended(processes[0], PATIENCE_S)["error"]
        assert error.startswith("PeerError: rank 0: expected every rank of the exchange within 20 s, got"), error
        assert "from rank 1" in error
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_too_many_rows_stop_both_alike(tmp_path: Path) -> None:
    processes = ranks_started("overflow", 2, tmp_path, "cuda", OFF)
    errors = [ended(each, PATIENCE_S)["error"] for each in processes]
    assert errors[0] == errors[1]
    assert errors[0].startswith("InputError: parallel.capacity: expected at most 2048 rows on a rank")


def lines(run: Path) -> list[dict[str, float]]:
    """The logged steps of a run."""
    every = map(json.loads, (run / "metrics.rank0.jsonl").read_text().splitlines())
    return [line for line in every if "loss" in line]


def test_two_then_one_then_two(tmp_path: Path) -> None:
    """A checkpoint of two GPUs resumed by one, and that one's by two: every step once, near a run that two finished.

    The batch stays. One rank adds four microbatches where two add two each: the same numbers in another order.
    """
    for name in ("mixed", "whole"):
        (tmp_path / name).mkdir()
    batch = "--train.batch_size=16"
    for gpus, steps in ((2, 4), (1, 8), (2, 12)):
        run = trained(tmp_path / "mixed", gpus, batch, f"--train.steps={steps}", poison=255)
    whole = trained(tmp_path / "whole", 2, poison=0)
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    assert [line["loss"] for line in lines(run)[:4]] == [line["loss"] for line in lines(whole)[:4]], (
        "nothing resumed yet"
    )
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines(run)] == pytest.approx([line[key] for line in lines(whole)], rel=0.02)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 8]


@pytest.mark.parametrize(("experts", "compute"), [(1, "bf16"), (2, "bf16"), (2, "fp8")])
def test_one_gpu_and_two_agree_about_the_gradient(tmp_path: Path, experts: int, compute: str) -> None:
    """Of one batch, before any update: loss and norm of one GPU, up to the order of sums in fp32."""
    runs: list[Path] = []
    for gpus, more in ((1, ()), (2, (f"--parallel.experts={experts}",))):
        (tmp_path / str(gpus)).mkdir()
        step = (
            f"--precision.compute={compute}",
            "--train.batch_size=8",
            "--train.microbatch_size=4",
            "--train.steps=1",
        )
        runs.append(trained(tmp_path / str(gpus), gpus, *step, *more, poison=255))
    one, two = (lines(run)[0] for run in runs)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_run_and_is_named(tmp_path: Path, how: signal.Signals) -> None:
    command = started(tmp_path, 2, "--train.steps=100000", "--parallel.timeout_s=15", poison=0)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = tmp_path / "runs" / "same"
    try:
        end = time.monotonic() + PATIENCE_S
        while not (run / "metrics.rank1.jsonl").exists() or len(lines(run)) < 5:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        os.kill(ranks_of(process.pid)[1], how)
        out = process.communicate(timeout=PATIENCE_S)[0]
    finally:
        process.kill()
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("nmoe: rank 1: expected "), out[-3000:]
    assert ("SIGKILL" if how == signal.SIGKILL else "stopped by a signal") in last
    assert ranks_of(process.pid) == {}


def ranks_of(launcher: int) -> dict[int, int]:
    """Process of each rank that a launcher started."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environ = (path.parent / "environ").read_text().split("\0")
        except OSError:
            continue
        ranks = [int(each.removeprefix("RANK=")) for each in environ if each.startswith("RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(path.parent.name)
    return found
