"""`nmoe data plan` and `nmoe bench loader`: what a config will read, and how fast."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nmoe.config import Config
from nmoe.config.mixture import load_mixture
from nmoe.config.sections import Mixture, Stdlib
from nmoe.effects import runtime
from nmoe.effects.corpus import open_corpus, planned_blend
from nmoe.effects.data import lazy, stdlib
from nmoe.effects.data.blend import plan_blend
from nmoe.effects.data.format import read_manifest
from nmoe.effects.data.lazy import content_digest, split_problems
from nmoe.effects.data.scale import write_empty_mixture
from nmoe.effects.loader import open_stream
from nmoe.effects.log import say
from nmoe.effects.plan import quantity
from nmoe.effects.prefetch import prefetching
from nmoe.errors import InputError
from nmoe.pure.key import Key
from nmoe.pure.stream import Ingredient, Recipe, Stream, identity, plan

__all__ = ["bench", "bench_scale", "main", "planned_stream", "rows"]


BENCH_WARMUP = 5
"""Batches before the clock counts: pages come into memory."""


def main(config: Config, launch: runtime.Launch, *, as_json: bool) -> int:
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


def bench(config: Config, launch: runtime.Launch, *, steps: int, pause_s: float) -> int:
    """Print how long a step waits for its batch, read in the call and read ahead. returns  exit code 0

    pause_s  between two calls, in the place of a step

    Raises:  InputError for no steps, for a pause below 0, and for data that can not be read.
    """
    if steps < 1 or not pause_s >= 0:
        raise InputError(f"--steps, --pause: at least 1 and 0, got {steps} and {pause_s}; raise them")
    device, train = runtime.device(config.run.device), config.train
    began = time.perf_counter()
    corpus = open_corpus(config, launch)
    say(f"opened     in {time.perf_counter() - began:.2f} s, yardsticks included")
    for depth in dict.fromkeys((0, config.data.prefetch)):
        with prefetching(corpus.read, batch_size=train.batch_size, depth=depth, device=device) as read:
            waits: list[float] = []
            for step in range(steps + BENCH_WARMUP):
                time.sleep(pause_s)
                asked = time.perf_counter()
                read(step % train.steps * train.batch_size)
                waits.append(1e3 * (time.perf_counter() - asked))
        waits = sorted(waits[BENCH_WARMUP:])
        say(
            f"handed     {train.batch_size} x {train.sequence_length} tokens, {depth} batches ahead: "
            f"{statistics.median(waits):.3f} ms median, {waits[int(0.9 * len(waits))]:.3f} ms the slowest of ten"
        )
    return 0


def bench_scale() -> int:
    """Print how long a mixture of ten trillion tokens in 10,000 shards takes to plan, and to open. returns  exit code 0

    Writes:  a temporary folder of files with holes, which goes.
    """
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        path = write_empty_mixture(Path(name), sources=20, shards=500, tokens=10**9, flow_tokens=10**13)
        began = time.perf_counter()
        blend = plan_blend(load_mixture(path), "full_train", sequence_length=4096, active_parameters=0)
        planned = time.perf_counter()
        pairs = zip(blend.folders, blend.manifests, strict=True)
        splits = [lazy.open_lazily(folder, manifest, "train") for folder, manifest in pairs]
        sizes = {"batch_size": 1024, "microbatch_size": 8, "sequence_length": 4096, "rank": 3, "world": 128}
        open_stream(splits, blend.stream, key=Key(0), **sizes)
        opened = time.perf_counter()
    say(f"planned    10 T tokens in 10,000 shards in {planned - began:.2f} s, opened in {opened - planned:.2f} s")
    return 0


def planned_stream(config: Config, launch: runtime.Launch) -> Stream:
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
