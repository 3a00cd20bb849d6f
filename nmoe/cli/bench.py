"""`nmoe bench`."""

from __future__ import annotations

import argparse
import os

from nmoe.cli.parser import Verbs, add, group, load

__all__ = ["verbs"]


def verbs(root: Verbs) -> None:
    """Measure."""
    bench = group(root, "bench", "measure")
    step = add(
        bench,
        "step",
        _bench_step,
        "time a config's step on random tokens",
        "configs/quickstart.toml --against transformers",
        config=True,
    )
    step.add_argument("--against", choices=("transformers",), help="time the same model there too")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="steps to time (default: %(default)s)")
    data = add(bench, "data", _bench_data, "time preparation against the bare tokenizer", "--megabytes 200")
    data.add_argument("--megabytes", type=int, default=64, metavar="N", help="text to prepare (default: %(default)s)")
    data.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")


def _bench_step(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects import bench

    return bench.step(loaded.config, args.against, args.steps)


def _bench_data(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data import bench

    return bench.preparation(args.megabytes, args.workers, files.home(os.environ), lambda line: print(line, flush=True))
