"""`nmoe track`."""

from __future__ import annotations

import argparse

from nmoe.cli.parser import Verbs, add, run_path


def verbs(root: Verbs) -> None:
    """Mirror runs to other trackers."""
    track = add(root, "track", _track, "mirror a run to another tracker", "--to tensorboard NAME")
    track.add_argument("folder", type=run_path, metavar="RUN", help="name of a run in runs, or a path")
    track.add_argument(
        "--to", required=True, choices=("tensorboard", "wandb", "trackio", "mlflow"), help="the other tracker"
    )
    track.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: %(default)s)"
    )
    track.add_argument("--once", action="store_true", help="send what there is, and stop")


def _track(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.track import follow, sinks

    return follow.follow(
        args.folder,
        args.to,
        sinks.opener(args.to),
        every_s=args.every,
        once=args.once,
        say=lambda line: print(line, flush=True),
    )
