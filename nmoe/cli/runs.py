"""`nmoe runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group
from nmoe.errors import InputError


def verbs(root: Verbs) -> None:
    """Look at past runs."""
    runs = group(root, "runs", "look at past runs")
    add(runs, "list", _runs_list, "list the runs in a folder", "--root runs", reads=True)
    add(runs, "show", _runs_show, "show one run", "NAME", run=True, reads=True)
    export = add(
        runs, "export", _runs_export, "write a run's metrics as CSV or Parquet", "NAME --to metrics.csv", run=True
    )
    export.add_argument(
        "--to", type=Path, metavar="FILE", help="file to write, .csv or .parquet (default: CSV to standard output)"
    )
    tail = add(
        runs, "tail", _runs_tail, "show the last steps and events of a run", "NAME --follow", run=True, reads=True
    )
    tail.add_argument("--lines", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    tail.add_argument("--follow", action="store_true", help="print new lines until the run ends")
    compare = add(runs, "compare", _runs_compare, "show runs side by side", "NAME NAME", reads=True)
    compare.add_argument("names", nargs="+", metavar="RUN", help="names of runs, or paths of folders beside each other")
    add(runs, "compact", _runs_compact, "write a run's metrics as Parquet into its folder", "NAME", run=True)
    for verb in runs.choices.values():
        verb.add_argument(
            "--root", type=Path, default=Path("runs"), help="folder of run folders (default: %(default)s)"
        )


def _runs_list(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.show import list_runs

    return list_runs(args.root, args.json)


def _runs_show(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.show import show

    return show(args.root, args.name, args.json)


def _runs_export(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.show import export

    if args.to is not None and args.to.suffix not in (".csv", ".parquet"):
        raise InputError(f"--to: expected a file that ends in .csv or .parquet, got {args.to}; rename it")
    if args.to is not None and args.to.suffix == ".parquet":
        from nmoe.effects.runs.viz import tables

        return tables.export_parquet(args.root, args.name, args.to)
    return export(args.root, args.name, args.to)


def _runs_tail(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.show import tail

    if args.lines < 0:
        raise InputError(f"--lines: expected at least 0, got {args.lines}; raise it")
    return tail(args.root, args.name, args.lines, args.follow, args.json)


def _runs_compare(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.viz import tables

    return tables.compare(args.root, args.names, args.json)


def _runs_compact(args: argparse.Namespace) -> int:
    from nmoe.effects.runs.viz import tables

    return tables.compact(args.root, args.name)
