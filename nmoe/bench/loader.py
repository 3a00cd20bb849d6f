"""`nmoe bench loader`: how long a step waits for its batch, and how long large data takes to plan and open."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from nmoe.bench.empty_mixture import write_empty_mixture
from nmoe.config import Config
from nmoe.config.data_mixture import load_mixture
from nmoe.effects.data.corpus import open_corpus
from nmoe.effects.data.loader import open_stream
from nmoe.effects.data.mixture import plan_mixture
from nmoe.effects.data.prefetch import prefetching
from nmoe.effects.data.store.shards import open_split
from nmoe.effects.device import gpu
from nmoe.effects.parallel.launch import Launch
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.core.key import Key

BENCH_WARMUP = 5
"""Batches before the clock counts: pages come into memory."""


def bench(config: Config, launch: Launch, *, steps: int, pause_s: float) -> int:
    """Print how long a step waits for its batch, read in the call and read ahead. returns  exit code 0

    pause_s  between two calls, in the place of a step

    Raises:  InputError for no steps, for a pause below 0, and for data that can not be read.
    """
    if steps < 1 or not pause_s >= 0:
        raise InputError(f"--steps, --pause: expected at least 1 and 0, got {steps} and {pause_s}; raise them")
    device, train = gpu.device(config.run.device, kernels=config.run.kernels), config.train
    began = time.perf_counter()
    corpus = open_corpus(config, launch)
    say(f"opened     in {time.perf_counter() - began:.2f} s, n-gram baselines included")
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
        data = plan_mixture(load_mixture(path), "full_train", sequence_length=4096, active_parameters=0)
        planned = time.perf_counter()
        pairs = zip(data.folders, data.manifests, strict=True)
        splits = [open_split(folder, manifest, "train") for folder, manifest in pairs]
        sizes = {"batch_size": 1024, "microbatch_size": 8, "sequence_length": 4096, "rank": 3, "world": 128}
        open_stream(splits, data.stream, key=Key(0), **sizes)
        opened = time.perf_counter()
    say(f"planned    10 T tokens in 10,000 shards in {planned - began:.2f} s, opened in {opened - planned:.2f} s")
    return 0
