"""The picture of learning curves by number format in docs/: validation losses, and how far they are from bf16's.

    python -m tests.effects.runs.precision_curves NAME=RUN ...

RUN is a run folder, of the study docs/records/precision-study.toml for one; the first of each seed is what the others
of that seed are compared with. Runs of one name have one color, and dashes by their seed.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

PICTURE = Path(__file__).resolve().parents[3] / "docs" / "precision-curves.svg"
COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#999999")  # of names
DASHES = ("none", "6 4", "2 3")  # of seeds
LEFT, RIGHT, WIDTH, HEIGHT = 60, 520, 800, 560
LAST = 2000


@attrs.frozen(kw_only=True)
class Panel:
    """A part of the picture: its rows of pixels, and the values that they mean."""

    top: int
    bottom: int
    low: float
    high: float

    def down(self, value: float) -> float:
        """The row of a value."""
        return round(self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top), 1)

    def lines(self, values: Sequence[float], form: str) -> list[str]:
        """Lines across it, with their values."""
        parts: list[str] = []
        for value in values:
            parts.append(f'<path d="M{LEFT} {self.down(value)}H{RIGHT}" stroke="#ddd"/>')
            label = f"{value:{form}}"
            parts.append(f'<text x="{LEFT - 8}" y="{self.down(value) + 4}" text-anchor="end">{label}</text>')
        return parts

    def curve(self, points: Sequence[tuple[int, float]], color: str, dash: str) -> str:
        """A line through values at steps."""
        joined = " ".join(f"{across(step)},{self.down(value)}" for step, value in points)
        return f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'


LOSS = Panel(top=30, bottom=260, low=3.8, high=5.4)
APART = Panel(top=310, bottom=510, low=-1.2, high=1.2)


def across(step: float) -> float:
    return round(LEFT + step / LAST * (RIGHT - LEFT), 1)


def seed_of(run: Path) -> int:
    """The seed of a run."""
    return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["run"]["seed"]


def curve(run: Path) -> dict[int, float]:
    """Losses of the validations by step."""
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return {event["step"]: event["loss"] for event in events if event["event"] == "validation"}


def drawn(runs: Sequence[tuple[str, int, Mapping[int, float]]]) -> str:
    """Name, seed and losses of each run, as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        "<title>Validation loss by the format of the experts' products, and its distance from bf16's</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="{LOSS.top - 12}">validation loss, nats a token</text>',
        f'<text x="{LEFT}" y="{APART.top - 12}">over the first of the same seed, percent</text>',
        *LOSS.lines((3.8, 4.2, 4.6, 5.0, 5.4), ".1f"),
        *APART.lines((-1.0, -0.5, 0.0, 0.5, 1.0), "+.1f"),
    ]
    for step in range(0, LAST + 1, 500):
        parts.append(f'<text x="{across(step)}" y="{APART.bottom + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">step of 8,192 tokens</text>')
    base: dict[int, Mapping[int, float]] = {}
    names = list(dict.fromkeys(name for name, _, _ in runs))
    for place, (name, seed, losses) in enumerate(runs):
        first = base.setdefault(seed, losses)
        color, dash = COLORS[names.index(name)], DASHES[seed]
        parts.append(LOSS.curve(list(losses.items()), color, dash))
        last = max(losses)
        y = LOSS.top + 20 + 19 * place
        text = f"{name}, seed {seed}: {losses[last]:.3f}"
        if losses is not first:
            apart = {step: 100 * (loss / first[step] - 1) for step, loss in losses.items()}
            parts.append(APART.curve(list(apart.items()), color, dash))
            text += f", {apart[last]:+.2f} %"
        line = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<path d="M{RIGHT + 12} {y - 4}h20" {line}/>')
        parts.append(f'<text x="{RIGHT + 38}" y="{y}" font-size="11" fill="{color}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    named = [(name, Path(path)) for name, _, path in (each.partition("=") for each in sys.argv[1:])]
    PICTURE.write_text(drawn([(name, seed_of(run), curve(run)) for name, run in named]), encoding="utf-8")
