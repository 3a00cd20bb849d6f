"""Completion of a command line in bash, zsh and fish: argcomplete over the parsers, and what they do not know.

The shell calls `nmoe` itself with the line in its environment: verbs and options come from the parsers, config keys
from the section classes, presets and runs from their folders. Nothing is generated that would have to be kept in step.
"""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from argcomplete.completers import ChoicesCompleter, DirectoriesCompleter, FilesCompleter
from argcomplete.finders import CompletionFinder

from nmoe.cli.parser import Parser, config_path, run_path, under


def complete(parser: Parser) -> None:
    """Answer the shell, and end this process.

    Reads:  _ARGCOMPLETE and COMP_LINE, where the shell has put its question.
    """
    leaf = _leaf(parser, os.environ.get("COMP_LINE", ""))
    finder = _Finder()
    if leaf.get_default("takes_overrides"):
        finder.overrides = frozenset(_add_overrides_(leaf))
    for action in leaf._actions:  # pyright: ignore[reportPrivateUsage]
        if (completer := _completer(action)) is not None:
            action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]
    finder(parser, always_complete_options=False)


class _Finder(CompletionFinder):
    """The finder, with `=` behind the name of an override, whose value belongs to the same word."""

    overrides: frozenset[str] = frozenset()

    def filter_completions(self, completions: list[str]) -> list[str]:
        found: list[str] = []
        for text in super().filter_completions(completions):
            word = f"{text}=" if text in self.overrides else text
            self._display_completions[word] = self._display_completions.get(text) or ""
            found.append(word)
        return found


def _leaf(parser: argparse.ArgumentParser, line: str) -> argparse.ArgumentParser:
    """The parser of the verb that a line begins with."""
    for word in line.split()[1:]:
        if word not in (known := under(parser)):
            break
        parser = known[word]
    return parser


def _add_overrides_(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Make each key of a config an option of the parser, with its values where they can be listed. yields  the names"""
    for name, (doc, values) in sorted(_keys().items()):
        action = parser.add_argument(f"--{name}", metavar="VALUE", help=doc.replace("%", "%%"))
        action.completer = ChoicesCompleter(dict.fromkeys(values, ""))  # pyright: ignore[reportAttributeAccessIssue]
        yield f"--{name}"


def _keys() -> dict[str, tuple[str, list[str]]]:
    """What each key of a config means, and its values where they can be listed."""
    from nmoe.config.fields import every_key, is_table, kinds, members
    from nmoe.config.sections import Config

    found: dict[str, tuple[str, list[str]]] = {}
    for path, key in every_key(Config):
        name = ".".join(path)
        if chosen := kinds(key.type):
            found[f"{name}.kind"] = (f"{key.doc}: which", list(chosen))
        allowed = members(key.type)
        if not any(map(is_table, allowed)):
            _, values = found.setdefault(name, (key.doc, []))
            listed = (("true", "false") if member is bool else typing.get_args(member) for member in allowed)
            values += (text for text in map(str, chain.from_iterable(listed)) if text not in values)
    return found


def _completer(action: argparse.Action) -> Callable[..., Iterable[str]] | None:
    """What lists the values of an argument; None: the parser knows them, or they are files."""
    if action.type is config_path:
        return _configs
    if action.type is run_path or action.metavar == "RUN":
        return _runs
    return _key_names if action.metavar == "KEY" and not action.option_strings else None


def _key_names(prefix: str, **_: object) -> Iterable[str]:
    return sorted(_keys())


def _configs(prefix: str, **_: object) -> Iterable[str]:
    """Presets, and TOML files."""
    from nmoe.config import preset

    return (*preset.names(), *FilesCompleter(("toml",))(prefix))


def _runs(prefix: str, parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
    """Runs under the root folder; folders once there is a slash."""
    if "/" in prefix:
        return DirectoriesCompleter()(prefix)
    root = Path(getattr(parsed_args, "root", None) or "runs")
    return sorted(path.parent.name for path in root.glob("*/config.toml"))
