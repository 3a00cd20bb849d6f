"""`nmoe bench step`: both sides train the same model, and what is asked wrongly is refused before anything starts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import attrs
import pytest
import torch

from nmoe.bench import step as bench
from nmoe.config import Config
from nmoe.effects.device.process import Runtime
from nmoe.errors import InputError
from tests.effects.train.tiny import tiny

RT = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1e9)


def losses(config: Config, steps: int) -> tuple[list[float], list[float]]:
    """Ours and theirs, step by step."""
    batch = bench.random_batch(config, RT.device)
    ours = bench.our_step(config, RT, batch)
    theirs = bench.their_step(config, bench.their_network(config, RT, bench.their_classes()), batch)
    return [ours().item() for _ in range(steps)], [theirs().item() for _ in range(steps)]


def comparable(compute: str) -> Config:
    """Two microbatches; nothing but the balance of experts differs."""
    config = tiny(batch_size=4, microbatch_size=2, compute=compute)
    moe = attrs.evolve(config.model.moe, bias_update_rate=0.0, sequence_balance=0.0)
    group = config.optim.dense
    return attrs.evolve(
        config,
        model=attrs.evolve(config.model, moe=moe),
        optim=attrs.evolve(config.optim, expert=group, router=group, weight_decay=0.0),
        schedule=attrs.evolve(config.schedule, warmup_tokens=0, hold_tokens=10**6),
    )


def test_both_sides_take_the_same_steps() -> None:
    ours, theirs = losses(comparable("fp32"), 4)
    assert ours[-1] < ours[0] - 0.01
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_both_sides_start_from_the_same_loss_in_bf16() -> None:
    """Within the rounding of bf16."""
    ours, theirs = losses(comparable("bf16"), 1)
    assert ours == pytest.approx(theirs, rel=2.0**-8)


def test_measuring_counts_only_warm_steps_and_keeps_the_first_loss() -> None:
    calls = 0

    def one() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(10.0 - calls)

    timing = bench.measure(one, 4, RT.device)
    assert calls == bench.WARMUP + 4
    assert timing.loss == 9.0
    assert len(timing.seconds) == 4
    assert all(seconds >= 0 for seconds in timing.seconds)


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """32 tokens a step; the time and memory of the others over ours, medians over all rounds."""
    ours = iter((0.2, 0.1, 0.9))
    theirs = iter((0.3, 0.3, 0.2))

    def in_fresh_process(_: Config, name: str, steps: int) -> bench.Timing:
        seconds = next(ours if name == "nmoe" else theirs)
        return bench.Timing(seconds=(seconds,) * steps, loss=4.5, memory_bytes=10**8 if name == "nmoe" else 5 * 10**9)

    monkeypatch.setattr(bench, "in_fresh_process", in_fresh_process)
    assert bench.step(tiny(), "transformers", 3) == 0
    nmoe, transformers, ratio = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"nmoe +200\.0 ms a step \(100\.0 to 900\.0\)  160 tok/s  mfu [\d.]+ %  memory 100 MB  first loss 4\.500000",
        nmoe,
    )
    assert re.fullmatch(
        r"transformers +300\.0 ms a step \(200\.0 to 300\.0\)  107 tok/s  mfu [\d.]+ %  memory 5 GB  first loss 4\.5.*",
        transformers,
    )
    assert ratio.split(maxsplit=1)[1] == "1.50 in time, 50.00 in memory  (transformers / nmoe)"


def test_a_config_of_muon_is_compared_by_adamw_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[tuple[str, str, str]] = []

    def timed(config: Config, name: str, steps: int) -> bench.Timing:
        used.append((name, config.optim.dense.optimizer, config.optim.expert.optimizer))
        return bench.Timing(seconds=(0.1,) * steps, loss=4.5, memory_bytes=10**8)

    monkeypatch.setattr(bench, "in_fresh_process", timed)
    muon = attrs.evolve(tiny().optim.dense, optimizer="muon")
    config = attrs.evolve(tiny(), optim=attrs.evolve(tiny().optim, dense=muon, expert=muon))
    assert bench.step(config, "transformers", 3) == 0
    assert set(used) == {("transformers", "adamw", "adamw"), ("nmoe", "adamw", "adamw")}
    assert "AdamW on both sides" in capsys.readouterr().out
    used.clear()
    assert bench.step(config, None, 3) == 0
    assert set(used) == {("nmoe", "muon", "muon")}
    assert "AdamW" not in capsys.readouterr().out


def test_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Once, in a real process of its own; the line of the file says what the screen says, and is not written over."""
    monkeypatch.setattr(bench, "ROUNDS", 1)
    rows = tmp_path / "rows.jsonl"
    assert bench.step(tiny(), None, 1, rows) == 0
    (only,) = capsys.readouterr().out.splitlines()
    told = re.fullmatch(r"nmoe +([1-9][\d.]*) ms a step .* tok/s .*", only)
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert told and row["variant"] == "nmoe" and f"{1000 * row['seconds'][0]:.1f}" == told[1]
    assert row["tokens"] == tiny().train.batch_size * tiny().train.sequence_length
    with pytest.raises(
        InputError, match=r"--jsonl: expected a new file in a folder one may write, got .*: File exists"
    ):
        bench.step(tiny(), None, 1, rows)
    assert len(rows.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("against", "steps", "message"),
    [
        (None, 0, "--steps: expected at least 1, got 0; "),
        ("nanochat", 3, "--against: expected one of transformers, got 'nanochat'; "),
    ],
)
def test_refusals(against: str | None, steps: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        bench.step(tiny(), against, steps)
    assert capsys.readouterr().out == ""


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    wanted = (
        '^--against: expected the extra `hf` for "transformers", got .*; '
        r"install it with: .* -m pip install 'nmoe\[hf\]'"
    )
    with pytest.raises(InputError, match=wanted):
        bench.timed(tiny(), "transformers", 3)
    assert capsys.readouterr().out == ""
