"""`nmoe soak`."""

from __future__ import annotations

import argparse

from nmoe.cli.parser import Verbs, add


def verbs(root: Verbs) -> None:
    """Train under faults."""
    soak = add(
        root, "soak", _soak, "train under faults and compare with the same training without", "--hours 24 --seed 7"
    )
    soak.add_argument("--hours", type=float, default=0.0, metavar="H", help="how long; 0 is one round (default)")
    soak.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the faults (default: %(default)s)")
    soak.add_argument("--steps", type=int, default=2000, metavar="N", help="steps a round (default: %(default)s)")
    soak.add_argument("--faults", type=int, default=1234, metavar="N", help="faults a round (default: %(default)s)")


def _soak(args: argparse.Namespace) -> int:
    from nmoe.soak import soak

    return soak.main(args.hours, args.seed, args.steps, args.faults)
