"""The picture of a mixture and a dense model in equal time in docs/records/, from gpu-long.json beside it.

python -m tests.effects.runs.equal_time
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parents[3] / "docs" / "records"
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 60, 560, 30, 330, 800, 390
SECONDS, BITS = (60, 220), (0.60, 0.90)
MODELS = (
    ("dense, 104 M parameters", "dense, 3746 steps", "#4d4d4d"),
    ("64 experts, as many active", "2 routed, 3 shared of 64, 3270 steps", "#0072b2"),
)
DASHES = ("", "6 4", "2 3")  # of seeds


def across(seconds: float) -> float:
    """The column of a time."""
    return round(LEFT + (seconds - SECONDS[0]) / (SECONDS[1] - SECONDS[0]) * (RIGHT - LEFT), 1)


def down(bits: float) -> float:
    """The row of a loss."""
    return round(BOTTOM - (bits - BITS[0]) / (BITS[1] - BITS[0]) * (BOTTOM - TOP), 1)


def points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds of a GPU that is alone, and bits a byte, of the validations that the picture has room for."""
    each = ((int(step) * run["step_ms"] / 1000, bits) for step, bits in run["bits_per_byte"].items())
    return [(seconds, bits) for seconds, bits in each if bits <= BITS[1]]


def drawn(runs: dict[str, dict[str, Any]]) -> str:
    """The curves of both models and seeds, as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        "<title>Bits a byte of a dense model and of a mixture by seconds of one H200</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="{TOP - 12}">held-out bits/byte</text>',
        f'<text x="{RIGHT}" y="{BOTTOM + 42}" text-anchor="end">seconds of one H200, alone</text>',
    ]
    for bits in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        parts.append(f'<path d="M{LEFT} {down(bits)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(bits) + 4}" text-anchor="end">{bits:.2f}</text>')
    for seconds in (60, 100, 140, 180, 220):
        parts.append(f'<text x="{across(seconds)}" y="{BOTTOM + 20}" text-anchor="middle">{seconds}</text>')
    row = TOP + 20
    for label, name, color in MODELS:
        for seed, dash in enumerate(DASHES):
            curve = points(runs[f"{name}, seed {seed}"])
            joined = " ".join(f"{across(seconds)},{down(bits)}" for seconds, bits in curve)
            parts.append(
                f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
            parts.append(
                f'<path d="M{RIGHT + 12} {row - 4}h26" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
            text = f"{label if seed == 0 else f'seed {seed}'}: {curve[-1][1]:.4f}"
            parts.append(f'<text x="{RIGHT + 44}" y="{row}" font-size="11">{text}</text>')
            row += 22
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    runs = json.loads((RECORDS / "gpu-long.json").read_text(encoding="utf-8"))
    (RECORDS / "equal-time.svg").write_text(drawn(runs), encoding="utf-8")
