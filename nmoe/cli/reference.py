"""The page docs/cli.md, from the parsers of all verbs; `make docs` writes it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nmoe.cli import build_parser
from nmoe.cli.parser import under

HEAD = """# Command line

Every verb, from the parsers themselves; `make docs` writes this page.

CONFIG is a TOML file or the name of a preset (`nmoe config list`). `--section.key=value` sets a key of the config
([config](config.md)). Bad input ends with exit code 2 and one line a problem; the other codes are in
[architecture](architecture.md#exit-codes). `nmoe VERB --help` shows the same on the screen.
"""


def reference() -> str:
    """The page, in Markdown."""
    parser, _ = build_parser()
    leaves = list(_leaves(parser))
    rows = [f"| [`{leaf.prog}`](#{leaf.prog.replace(' ', '-')}) | {_about(leaf)} |" for leaf in leaves]
    sections = [_section(leaf) for leaf in leaves]
    return "\n".join([HEAD, "| verb | what it does |", "|---|---|", *rows, "", *sections])


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every parser that has no verbs of its own, in order."""
    verbs = under(parser)
    if not verbs:
        yield parser
    for verb in verbs.values():
        yield from _leaves(verb)


def _about(parser: argparse.ArgumentParser) -> str:
    return _cell(parser.description or "")


def _section(parser: argparse.ArgumentParser) -> str:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = [f"## {parser.prog}", "", _about(parser), "", "```", usage, "```", ""]
    rows = [f"| {_names(action)} | {_cell(_help(parser, action))} |" for action in parser._actions if _shown(action)]  # pyright: ignore[reportPrivateUsage]
    if rows:
        lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    if parser.epilog:
        lines += [f"{_cell(parser.epilog).replace('example: ', 'Example: `', 1)}`", ""]
    return "\n".join(lines)


def _shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and "--help" not in action.option_strings


def _names(action: argparse.Action) -> str:
    value = (
        "" if action.nargs == 0 else action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    )
    if action.choices is not None and action.metavar is None:
        value = "\\|".join(str(choice) for choice in action.choices)
    return f"`{' '.join([', '.join(action.option_strings), str(value)]).strip()}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""  # pyright: ignore[reportPrivateUsage]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
