"""`nmoe bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

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

    save = add(
        bench,
        "checkpoint",
        _bench_checkpoint,
        "time a save and a load of a config's state, and what a save costs the steps beside it",
        "configs/quickstart.toml --to /data",
        config=True,
    )
    save.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="where to write, and delete (default: here)"
    )
    save.add_argument("--steps", type=int, default=10, metavar="N", help="steps beside a save (default: %(default)s)")
    save.add_argument("--rounds", type=int, default=3, metavar="N", help="how often (default: %(default)s)")


def _bench_step(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects import bench

    return bench.step(loaded.config, args.against, args.steps)


def _bench_checkpoint(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects import bench_checkpoint

    return bench_checkpoint.main(loaded.config, args.to, args.steps, args.rounds)
