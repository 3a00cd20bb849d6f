"""`nmoe data plan`: what a config will read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmoe.config import Config
from nmoe.config.sections import Mixture, Stdlib
from nmoe.effects.data import stdlib
from nmoe.effects.data.corpus import planned_blend
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.lazy import content_digest, split_problems
from nmoe.effects.parallel.launch import Launch
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.data.stages import Ingredient, Recipe, Stream, identity, plan
from nmoe.pure.units import quantity


def main(config: Config, launch: Launch, *, as_json: bool) -> int:
    """Print the plan. returns  exit code 0"""
    stream = planned_stream(config, launch)
    train = config.train
    found = rows(stream, train.sequence_length)
    if as_json:
        say(json.dumps({"identity": identity(stream), "windows": stream.windows(), "reads": found}, indent=1))
        return 0
    width = max(len(row["source"]) for row in found)
    say(f"{'stage':<10}{'source':<{width + 2}}{'tokens':>9}{'share':>9}{'passes':>9}")
    for row in found:
        say(
            f"{row['stage']:<10}{row['source']:<{width + 2}}{quantity(row['tokens']):>9}{100 * row['share']:>7.2f} %"
            f"{row['passes']:>9.3f}"
        )
    asked, held = train.steps * train.batch_size, stream.windows()
    say(
        f"\nreads      {train.steps} steps of {train.batch_size} x {train.sequence_length} tokens, "
        f"{100 * asked / held:.1f} % of {quantity(held * train.sequence_length)} planned; "
        f"{held // train.batch_size} steps read them"
    )
    say(f"identity   {identity(stream)}")
    return 0


def planned_stream(config: Config, launch: Launch) -> Stream:
    """The stream of a config. Of one source it is as long as the training.

    Raises:  InputError when what it names can not be read.
    """
    source, train = config.data.source, config.train
    if isinstance(source, Mixture):
        return planned_blend(config, source).stream
    folder = (
        stdlib.prepare(launch.home, source.tokenizer_size, say) if isinstance(source, Stdlib) else Path(source.path)
    )
    manifest = read_manifest(folder)
    if problems := split_problems(folder, manifest, "train"):
        raise InputError(*problems)
    one = Ingredient(
        name=source.kind,
        windows=(manifest.splits["train"].tokens - 1) // train.sequence_length,
        max_passes=None,
        content=content_digest(manifest, "train"),
    )
    return plan([one], [Recipe(name="train", windows=train.steps * train.batch_size, weights=(1.0,))])


def rows(stream: Stream, sequence_length: int) -> list[dict[str, Any]]:
    """One a source and stage that reads it, and one a source of several stages for all together."""
    found = [
        _row(stage.name, each, quota, stage.turns.count, sequence_length)
        for stage in stream.stages
        for each, quota in zip(stream.ingredients, stage.quotas, strict=True)
        if quota
    ]
    if len(stream.stages) == 1:
        return found
    totals = [sum(stage.quotas[index] for stage in stream.stages) for index in range(len(stream.ingredients))]
    return found + [
        _row("all", each, total, stream.windows(), sequence_length)
        for each, total in zip(stream.ingredients, totals, strict=True)
    ]


def _row(stage: str, each: Ingredient, quota: int, of: int, sequence_length: int) -> dict[str, Any]:
    return {
        "stage": stage,
        "source": each.name,
        "tokens": quota * sequence_length,
        "share": quota / of,
        "passes": quota / each.windows,
    }
