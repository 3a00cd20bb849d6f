"""The picture of losses and throughput on several GPUs in docs/: runs of one config on the same batches.

    python -m tests.effects.runs.rank_curves NAME=METRICS ...

METRICS is metrics.rank0.jsonl of a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "ranks.svg"
COLORS, DASHES = ("#4d4d4d", "#d55e00"), ("none", "6 5")
LEFT, TOP, RIGHT, BOTTOM = 60, 40, 460, 330
BARS = (560, 760)
"""First and last place of the bars of tokens/s."""

Line = Mapping[str, float]


def lines(path: Path) -> list[Line]:
    """The logged steps of a run."""
    every = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line for line in every if "loss" in line]


def drawn(runs: Mapping[str, list[Line]]) -> str:
    """Losses over each other, and tokens/s of the last logged step, as SVG."""
    losses = [line["loss"] for run in runs.values() for line in run]
    low, high = int(min(losses)), int(max(losses)) + 1
    last = max(line["step"] for run in runs.values() for line in run)
    fastest = max(run[-1]["tokens_per_s"] for run in runs.values())

    def across(step: float) -> float:
        return round(LEFT + step / last * (RIGHT - LEFT), 1)

    def down(loss: float) -> float:
        return round(BOTTOM - (loss - low) / (high - low) * (BOTTOM - TOP), 1)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 380" font-family="sans-serif" font-size="13" '
        'fill="#222">',
        "<title>Loss on the same batches, and tokens/s, by the number of GPUs</title>",
        '<rect width="800" height="380" fill="#fff"/>',
        f'<text x="{LEFT}" y="24">loss, nats/token</text><text x="{BARS[0]}" y="24">tokens/s</text>',
    ]
    for loss in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {down(loss)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(loss) + 4}" text-anchor="end">{loss}</text>')
    for step in range(0, int(last) + 1, 10):
        parts.append(f'<text x="{across(step)}" y="{BOTTOM + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}" text-anchor="middle">step</text>')
    width = (BARS[1] - BARS[0]) / (2 * len(runs))
    for place, (name, run) in enumerate(runs.items()):
        color, dash = COLORS[place % 2], DASHES[place % 2]
        points = " ".join(f"{across(line['step'])},{down(line['loss'])}" for line in run)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        rate = run[-1]["tokens_per_s"]
        top, x = round(BOTTOM - rate / fastest * (BOTTOM - TOP - 20), 1), round(BARS[0] + 2 * place * width, 1)
        parts.append(f'<rect x="{x}" y="{top}" width="{width}" height="{round(BOTTOM - top, 1)}" fill="{color}"/>')
        parts.append(f'<text x="{x + width / 2}" y="{top - 6}" text-anchor="middle">{rate / 1000:.0f} k</text>')
        parts.append(f'<text x="{x + width / 2}" y="{BOTTOM + 20}" text-anchor="middle">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn({name: lines(Path(path)) for name, path in (each.split("=", 1) for each in sys.argv[1:])}))
