"""What the parsers of all verbs are made of."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nmoe.errors import InputError

if TYPE_CHECKING:
    from nmoe.config import Loaded


class Parser(argparse.ArgumentParser):
    """argparse, with its errors raised as InputError instead of printed with the usage."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.removeprefix("nmoe").strip()
        raise InputError(f"{verb}: {message}; see `{self.prog} --help`" if verb else f"{message}; see `nmoe --help`")


Verbs = Any  # argparse names no public type for what add_subparsers returns


def add(
    verbs: Verbs,
    name: str,
    call: Callable[[argparse.Namespace], int],
    about: str,
    example: str,
    *,
    config: bool = False,
    run: bool = False,
    reads: bool = False,
) -> Parser:
    """A verb's parser.

    example  arguments that make sense, shown in its help
    config   whether it takes a config and overrides
    run      whether it takes a run under --root
    reads    whether it prints what it read, and so takes --json
    """
    parser: Parser = verbs.add_parser(
        name, help=about.replace("%", "%%"), description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    verb = parser.prog.removeprefix("nmoe ")
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(call=call, verb=verb, takes_overrides=config)
    if config:
        parser.usage = f"{parser.prog} CONFIG [options] [--section.key=value ...]"
        parser.add_argument("config", type=config_path, metavar="CONFIG", help="TOML file, or name of a preset")
    if run:
        parser.add_argument("name", metavar="RUN", help="name of a run, or path of its folder")
    if reads:
        parser.add_argument("--json", action="store_true", help="print JSON, for a program")
    return parser


def group(verbs: Verbs, name: str, about: str) -> Verbs:
    """A verb that has verbs of its own."""
    parser: Parser = verbs.add_parser(
        name, help=about.replace("%", "%%"), description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    return parser.add_subparsers(metavar="VERB", required=True)


def load(args: argparse.Namespace, world: int | None = None, *, to_run: bool = False) -> Loaded:
    """The config of a verb with CONFIG, valid, and fitted to its ranks where the verb has --fit and it is given."""
    from nmoe.config import load_valid

    fit = getattr(args, "fit", False)
    return load_valid(args.config, os.environ, args.overrides, world, to_run=to_run, fit=fit)


def add_fit(parser: Parser) -> None:
    """The option --fit of a verb with --gpus."""
    parser.add_argument(
        "--fit",
        action="store_true",
        help="change train.batch_size and train.microbatch_size to the nearest that the GPUs share evenly, and say so",
    )


def config_path(text: str) -> Path:
    """The file of an argument CONFIG: the name of a preset, or a path."""
    from nmoe.config import preset

    try:
        return preset.resolve(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_path(text: str) -> Path:
    """The path of an argument RUN: a name in the folder runs, or a path."""
    from nmoe.effects.record import address

    try:
        return address.find(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("run: ")) from error


def under(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs a verb has of its own, with their parsers."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # pyright: ignore[reportPrivateUsage]
    return {name: parser for verbs in groups for name, parser in verbs.choices.items()}
