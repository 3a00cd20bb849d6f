"""`nmoe ckpt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group, run_path

ONE = "run for its newest checkpoint, a name in runs or a path; or path of a checkpoint"


def verbs(root: Verbs) -> None:
    """Look at checkpoints, and thin them out."""
    ckpt = group(root, "ckpt", "look at checkpoints")
    listing = add(ckpt, "list", _list, "list the checkpoints of a run, newest first", "NAME", reads=True)
    verify = add(
        ckpt, "verify", _verify, "read everything and compare every digest; exit code 1 on damage", "NAME", reads=True
    )
    show = add(ckpt, "show", _show, "show one checkpoint", "NAME", reads=True)
    prune = add(ckpt, "prune", _prune, "delete checkpoints that nothing keeps", "NAME --last 1")
    export = add(ckpt, "export-weights", _export, "write weights.safetensors from a checkpoint", "NAME --to weights")
    for verb in (listing, prune):
        verb.add_argument("path", type=run_path, metavar="RUN", help="name of a run in runs, or a path")
    for verb in (verify, show, export):
        verb.add_argument("path", type=run_path, metavar="RUN", help=ONE)
    verify.add_argument("--all", action="store_true", help="every checkpoint of the run, not only the newest")
    prune.add_argument("--last", type=int, default=2, metavar="N", help="newest ones to keep (default: %(default)s)")
    prune.add_argument("--every", type=int, default=0, metavar="K", help="keep those of each K-th step")
    prune.add_argument("--best", type=int, default=1, metavar="N", help="keep the N of the lowest validation loss")
    export.add_argument(
        "--to", type=Path, metavar="FOLDER", help="folder for weights.safetensors (default: the run folder)"
    )
    diff = add(ckpt, "diff", _diff, "compare two checkpoints; exit code 1 when they differ", "A B", reads=True)
    diff.add_argument("left", type=run_path, metavar="A", help=ONE)
    diff.add_argument("right", type=run_path, metavar="B", help="the same")


def _list(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import list_checkpoints

    return list_checkpoints(args.path, args.json)


def _verify(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import verify

    return verify(args.path, args.all, args.json)


def _show(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import show

    return show(args.path, args.json)


def _diff(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import diff

    return diff(args.left, args.right, args.json)


def _prune(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import prune

    return prune(args.path, args.last, args.every, args.best)


def _export(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import export_weights

    return export_weights(args.path, args.to)
