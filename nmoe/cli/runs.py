"""`nmoe runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group

__all__ = ["verbs"]


def verbs(root: Verbs) -> None:
    """Look at past runs."""
    runs = group(root, "runs", "look at past runs")
    add(runs, "list", _runs_list, "list the runs in a folder", "--root runs")
    add(runs, "show", _runs_show, "show one run", "NAME", run=True)
    export = add(runs, "export", _runs_export, "write a run's metrics as CSV", "NAME --to metrics.csv", run=True)
    export.add_argument("--to", type=Path, metavar="FILE", help="file to write (default: standard output)")
    for each in runs.choices.values():
        each.add_argument(
            "--root", type=Path, default=Path("runs"), help="folder of run folders (default: %(default)s)"
        )


def _runs_list(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.list_runs(args.root)


def _runs_show(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.show(args.root, args.name)


def _runs_export(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.export(args.root, args.name, args.to)
