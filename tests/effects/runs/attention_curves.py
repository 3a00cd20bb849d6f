"""The picture of learning curves in docs/: each kind of attention on the same tokens, and the bigram beside them.

    python -m tests.effects.runs.attention_curves FOLDER

FOLDER keeps the runs; those that are there are not trained again. On two quiet CPU cores it takes a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "attention-curves.svg"
COMMON = ("--log.every=2", "--validation.every=30")
SCHEDULE = ("warmup_tokens=40960", "hold_tokens=184320", "decay_tokens=389120")
"""Of the presets of the kinds; the quickstart's own is longer."""

RUNS = {
    "mla": ("quickstart", "--train.steps=300", *(f"--schedule.{key}" for key in SCHEDULE)),
    **{kind: (f"quickstart-{kind}",) for kind in ("gqa", "kda", "nsa", "dsa")},
}
COLORS = dict(zip(RUNS, ("#4d4d4d", "#0072b2", "#009e73", "#d55e00", "#cc79a7"), strict=True))

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 20, 620, 370
LOSSES = (3.25, 5.5)
STEPS = (0, 300)


def train(root: Path) -> None:
    """Train the runs that are not there. Writes: run folders."""
    for name, options in RUNS.items():
        if not (root / name).exists():
            where = (f"--run.root={root}", f"--run.name={name}")
            command = [sys.executable, "-m", "nmoe", "run", *options, *where, *COMMON]
            subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})


def events(run: Path) -> list[dict[str, Any]]:
    """What happened in a run."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def bigram(root: Path) -> float:
    """The bigram's loss on the validation tokens, which must be one, or the runs have other tokens."""
    every = (event for name in RUNS for event in events(root / name))
    (loss,) = {event["ngram_baseline"]["bigram"] for event in every if event["event"] == "start"}
    return loss


def curve(run: Path) -> list[tuple[int, float]]:
    """Steps and losses of the validations."""
    return [(event["step"], event["loss"]) for event in events(run) if event["event"] == "validation"]


def across(step: float) -> float:
    return round(LEFT + (step - STEPS[0]) / (STEPS[1] - STEPS[0]) * (RIGHT - LEFT), 1)


def down(loss: float) -> float:
    return round(BOTTOM - (loss - LOSSES[0]) / (LOSSES[1] - LOSSES[0]) * (BOTTOM - TOP), 1)


def drawn(curves: Mapping[str, list[tuple[int, float]]], yardstick: float) -> str:
    """The curves as SVG; names beside them in the order of the last losses."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        "<title>Validation loss of each kind of attention on the same tokens, and of a bigram</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for loss in (3.5, 4.0, 4.5, 5.0, 5.5):
        parts.append(f'<path d="M{LEFT} {down(loss)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(loss) + 4}" text-anchor="end">{loss}</text>')
    for step in range(STEPS[0], STEPS[1] + 1, 50):
        parts.append(f'<text x="{across(step)}" y="{BOTTOM + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step of 2,048 tokens</text>')
    turned = f"translate(16 {(TOP + BOTTOM) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">validation loss, nats a token</text>')
    parts.append(f'<path d="M{LEFT} {down(yardstick)}H{RIGHT}" stroke="#222" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{RIGHT + 10}" y="{down(yardstick) + 4}">bigram {yardstick:.3f}</text>')
    for place, (name, points) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1][1])):
        line = " ".join(f"{across(step)},{down(loss)}" for step, loss in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        y = down(3.7) + 17 * place
        parts.append(f'<text x="{RIGHT + 10}" y="{y}" fill="{COLORS[name]}">{name} {points[-1][1]:.3f}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    runs = Path(sys.argv[1]).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    train(runs)
    PICTURE.write_text(drawn({name: curve(runs / name) for name in RUNS}, bigram(runs)), encoding="utf-8")
