"""`nmoe bench`."""

from __future__ import annotations

import argparse

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
    kernels = add(bench, "kernels", _bench_kernels, "time the GPU's kernels beside their peers", "")
    kernels.add_argument("--tune", action="store_true", help="look for the fastest tiles and print their table")


def _bench_kernels(args: argparse.Namespace) -> int:
    from nmoe.effects import kernel_bench

    return kernel_bench.tune() if args.tune else kernel_bench.kernels()


def _bench_step(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects import bench

    return bench.step(loaded.config, args.against, args.steps)
