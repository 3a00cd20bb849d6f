"""`nmoe data plan`: what a config will read."""

from __future__ import annotations

from typing import Any

from nmoe.config import Config
from nmoe.effects.data.mixture import plan_data
from nmoe.effects.parallel.launch import Launch
from nmoe.effects.terminal import say, say_json, table
from nmoe.pure.data.stages import Ingredient, Stream
from nmoe.pure.units import quantity


def main(config: Config, launch: Launch, *, as_json: bool) -> int:
    """Print the plan. returns  exit code 0"""
    data, train = plan_data(config, launch.home), config.train
    reads, windows = rows(data.stream, train.sequence_length, config.data.source.kind), data.stream.windows()
    if as_json:
        say_json({"fingerprint": data.identity, "windows": windows, "reads": reads})
        return 0
    cells = [
        (
            row["stage"],
            row["source"],
            quantity(row["tokens"]),
            f"{100 * row['share']:.2f} %",
            f"{row['passes']:.3f}",
        )
        for row in reads
    ]
    say(table(("stage", "source", "tokens", "share", "passes"), cells, left=2))
    say(
        f"\nreads      {train.steps} steps of {train.batch_size} x {train.sequence_length} tokens, "
        f"{100 * train.steps * train.batch_size / windows:.1f} % of {quantity(windows * train.sequence_length)} "
        f"planned; {windows // train.batch_size} steps read them"
    )
    say(f"fingerprint {data.identity}")
    return 0


def rows(stream: Stream, sequence_length: int, alone: str) -> list[dict[str, Any]]:
    """One row a source and stage that reads it, and one a source of several stages for all together.

    alone  how a source is called that stands alone and has no name
    """

    def row(stage: str, ingredient: Ingredient, quota: int, total: int) -> dict[str, Any]:
        return {
            "stage": stage,
            "source": ingredient.name or alone,
            "tokens": quota * sequence_length,
            "share": quota / total,
            "passes": quota / ingredient.windows,
        }

    by_stage = [
        row(stage.name, ingredient, quota, stage.turns.count)
        for stage in stream.stages
        for ingredient, quota in zip(stream.ingredients, stage.quotas, strict=True)
        if quota
    ]
    if len(stream.stages) == 1:
        return by_stage
    totals = [sum(stage.quotas[index] for stage in stream.stages) for index in range(len(stream.ingredients))]
    return by_stage + [
        row("all", ingredient, total, stream.windows())
        for ingredient, total in zip(stream.ingredients, totals, strict=True)
    ]
