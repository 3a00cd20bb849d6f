"""`nmoe viz`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nmoe.cli.parser import Verbs, add
from nmoe.errors import InputError


def verbs(root: Verbs) -> None:
    """Look at runs in a browser."""
    viz = add(root, "viz", _viz, "look at runs in a browser, live", "--runs runs --data data/prepared")
    viz.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="run folders (default: %(default)s)"
    )
    viz.add_argument(
        "--data", type=Path, action="append", default=[], metavar="DIR", help="prepared data to look into; repeatable"
    )
    viz.add_argument("--port", type=int, default=6543, metavar="N", help="port, 0 for any (default: %(default)s)")
    viz.add_argument("--host", default="127.0.0.1", help="address to listen on; not loopback: needs a token")
    viz.add_argument("--token", metavar="TEXT", help="what a browser must show (default off loopback: a fresh one)")


def _viz(args: argparse.Namespace) -> int:
    if not 0 <= args.port < 65536:
        raise InputError(f"--port: expected a number from 0 to 65535, got {args.port}; choose another")
    from nmoe.effects import files
    from nmoe.effects.runs import viz

    home = files.home(os.environ)
    return viz.serve(args.runs, args.data, home, host=args.host, port=args.port, token=args.token)
