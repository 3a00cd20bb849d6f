"""`nmoe run` in processes of its own: the same command twice leaves the same bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe.soak.soak import differences
from tests.configs import ROOT

PATIENCE_S = 300.0


def trained(folder: Path, gpus: int, *more: str, poison: int) -> Path:
    """The folder of a run of 12 steps, of two microbatches a rank each, with gradients in fp32 beside bf16 values."""
    run = subprocess.run(
        started(folder, gpus, *more, poison=poison),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "runs" / "same"


def environment(folder: Path) -> dict[str, str]:
    """Of a process of its own: the packages of this one."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": path, "NMOE_HOME": str(folder.parent / "home")}


def started(folder: Path, gpus: int, *more: str, poison: int) -> list[str]:
    """The command of such a run.

    more    arguments
    poison  fills the GPU's free memory before the run, through the allocator's pools of another process
    """
    text = (ROOT / "configs" / "moonlet.toml").read_text()
    text = re.sub(r'kind = "shards"\npath = .*', 'kind = "stdlib"', text)
    (folder / "run.toml").write_text(text)
    fill = (
        f"import torch; [torch.full((2**30,), {poison}, dtype=torch.uint8, device=f'cuda:{{gpu}}') "
        f"for gpu in range({gpus}) for _ in range(8)]; torch.cuda.synchronize()"
    )
    subprocess.run([sys.executable, "-c", fill], check=True)
    model = "--model.num_layers=2 --model.vocab_size=4104 --model.hidden_size=512 --model.moe.num_experts=16"
    batch = f"--train.sequence_length=512 --train.batch_size={8 * gpus} --train.microbatch_size=4 --train.steps=12"
    command = [sys.executable, "-m", "nmoe", "run", "run.toml", *model.split(), *batch.split()]
    often = "--log.every=1 --validation.every=1000 --parallel.timeout_s=60"
    return [*command, "--run.name=same", *often.split(), "--gpus", str(gpus), *more]


@pytest.mark.parametrize(
    "gpus", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu2)], ids=["one", "two"]
)
def test_two_processes_leave_the_same_bits(gpus: int, tmp_path: Path) -> None:
    """All metrics but times, every tensor of the checkpoint, the weights."""
    runs: list[Path] = []
    for number, poison in enumerate((0, 255)):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(trained(folder, gpus, poison=poison))
    assert differences(*runs) == []


@pytest.mark.gpu
def test_plain_torch_learns_what_the_kernels_learn(tmp_path: Path) -> None:
    """The same losses, as far as bf16 goes; the run says that it is slower."""
    losses: list[list[float]] = []
    for kernels in ("triton", "torch"):
        folder = tmp_path / kernels
        folder.mkdir()
        run = trained(folder, 1, f"--run.kernels={kernels}", "--train.graph=false", poison=255)
        lines = map(json.loads, (run / "metrics.rank0.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert ('run.kernels is "torch"' in (run / "console.log").read_text()) == (kernels == "torch")
    assert len(losses[0]) == 12 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
