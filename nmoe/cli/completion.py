"""`nmoe completion`."""

from __future__ import annotations

import argparse

from nmoe.cli.parser import Verbs, add
from nmoe.effects.terminal import say

SHELLS = ("bash", "zsh", "fish")


def verbs(root: Verbs) -> None:
    """What a shell's start-up file reads."""
    parser = add(root, "completion", _completion, "print what makes a shell complete command lines", "bash")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


def _completion(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    say(shellcode(["nmoe"], shell=args.shell))
    return 0
