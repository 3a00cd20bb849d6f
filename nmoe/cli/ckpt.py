"""`nmoe ckpt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group


def verbs(root: Verbs) -> None:
    """Look at checkpoints, and thin them out."""
    ckpt = group(root, "ckpt", "look at checkpoints")
    listing = add(ckpt, "list", _list, "list the checkpoints of a run, newest first", "runs/NAME")
    verify = add(
        ckpt, "verify", _verify, "read everything and compare every digest; exit code 1 on damage", "runs/NAME"
    )
    show = add(ckpt, "show", _show, "show one checkpoint", "runs/NAME")
    prune = add(ckpt, "prune", _prune, "delete checkpoints that nothing keeps", "runs/NAME --last 1")
    export = add(
        ckpt, "export-weights", _export, "write weights.safetensors from a checkpoint", "runs/NAME --to weights"
    )
    for verb in (listing, prune):
        verb.add_argument("path", type=Path, metavar="RUN", help="run folder")
    for verb in (verify, show, export):
        verb.add_argument("path", type=Path, metavar="PATH", help="checkpoint, or run folder for its newest")
    verify.add_argument("--all", action="store_true", help="every checkpoint of the run, not only the newest")
    prune.add_argument("--last", type=int, default=2, metavar="N", help="newest ones to keep (default: %(default)s)")
    prune.add_argument("--every", type=int, default=0, metavar="K", help="keep those of each K-th step")
    prune.add_argument("--best", type=int, default=1, metavar="N", help="keep the N of the lowest validation loss")
    export.add_argument(
        "--to", type=Path, metavar="FOLDER", help="folder for weights.safetensors (default: the run folder)"
    )
    diff = add(ckpt, "diff", _diff, "compare two checkpoints; exit code 1 when they differ", "runs/A runs/B")
    diff.add_argument("left", type=Path, metavar="A", help="checkpoint, or run folder for its newest")
    diff.add_argument("right", type=Path, metavar="B", help="the same")


def _list(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import list_checkpoints

    return list_checkpoints(args.path)


def _verify(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import verify

    return verify(args.path, args.all)


def _show(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import show

    return show(args.path)


def _diff(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import diff

    return diff(args.left, args.right)


def _prune(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import prune

    return prune(args.path, args.last, args.every, args.best)


def _export(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.verbs import export_weights

    return export_weights(args.path, args.to)
