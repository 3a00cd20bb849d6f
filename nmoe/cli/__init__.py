"""The command line: the only reader of argv. Each verb imports what it needs when it is called; one file a family."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence

from nmoe.cli import bench, ckpt, completion, config, data, hf, launch, runs, soak, track, train, viz
from nmoe.cli.parser import Parser, under
from nmoe.errors import InputError, printable

__all__ = ["build_parser", "main"]

EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
"""128 + SIGPIPE: whoever read the output has gone."""

OVERRIDE = re.compile(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
"""`--section.key=value`, or the same without its value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    argv     arguments after the program's name; None: this process's
    returns  exit code: the verb's own, 2 for bad input, 130 interrupted, 141 when the reader of stdout has gone
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP reads these when torch is imported. Threads that spin while they wait hold the cores against all others:
    # 585 tokens/s instead of 4,610 on two busy cores. Some 1,000 turns before they sleep cost nothing there, and give
    # 8.7 k instead of 7.0 k on two quiet ones; the same bits (docs/log.md, 2026-11-28).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # What a terminal's encoding cannot print is shown as its escape: a sample of another script ends no run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        for problem in error.problems:
            print(f"nmoe: {printable(problem)}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # what is still buffered has to go somewhere when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE


def _call(arguments: Sequence[str]) -> int:
    """Parse a command line and call its verb."""
    if list(arguments) == ["--version"]:
        print(f"nmoe {version()}")
        return 0
    parser, verbs = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        from nmoe.cli.complete import complete

        complete(parser)
    arguments = _asking_for_help(arguments, verbs)
    _check_verb(arguments, verbs)
    overrides, rest = _split(arguments)
    try:
        args, unknown = parser.parse_known_args(rest)
    except SystemExit as done:  # after --help
        return int(done.code or 0)
    if unknown:
        known = "options of this verb and --section.key=value" if args.takes_overrides else "only options of this verb"
        options = _options(parser, args.verb)
        raise InputError(
            *(
                f"{args.verb}: expected {known}, got {argument}; {_meant(argument, options, args)}"
                for argument in unknown
            )
        )
    if overrides and not args.takes_overrides:
        raise InputError(*(f"{args.verb}: expected no overrides, got {override}; remove it" for override in overrides))
    args.overrides, args.command = overrides, ("nmoe", *arguments)
    return args.call(args)


def _options(parser: argparse.ArgumentParser, verb: str) -> list[str]:
    """The options of a verb."""
    for word in verb.split():
        parser = under(parser)[word]
    return [option for action in parser._actions for option in action.option_strings]  # pyright: ignore[reportPrivateUsage]


def _meant(argument: str, options: Sequence[str], args: argparse.Namespace) -> str:
    """What to do about an argument that a verb does not know: the option or key it probably means, or its help."""
    from nmoe.config.convert import meant
    from nmoe.config.sections import Config

    name, equals, value = argument.lstrip("-").partition("=")
    near = difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.8) if argument.startswith("-") else []
    if near:
        return f"did you mean {near[0]}?"
    if name == "dry-run" and args.verb == "run":
        return "`nmoe plan` says what a run would cost, `nmoe config check` whether its config is valid"
    key = (
        meant(name.replace("-", "_"), Config) if args.takes_overrides and (equals or argument.startswith("-")) else None
    )
    if key is None:
        return f"see `nmoe {args.verb} --help`"
    return f"did you mean --{key}={value or 'VALUE'}?"


def _asking_for_help(arguments: Sequence[str], verbs: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The arguments, with `--help` behind them where they ask for it: `nmoe`, `nmoe runs`, `nmoe help runs`."""
    if arguments and arguments[0] == "help":
        return [*arguments[1:], "--help"]
    return [*arguments, "--help"] if not arguments or (len(arguments) == 1 and verbs.get(arguments[0])) else arguments


def version() -> str:
    """Of the package that is installed."""
    from importlib import metadata

    try:
        return metadata.version("nmoe")
    except metadata.PackageNotFoundError:
        return "not installed, from a checkout"


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides among the arguments, and the rest.

    Raises:  InputError for an override whose value is not attached to it.
    """
    overrides: list[str] = []
    rest: list[str] = []
    problems: list[str] = []
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=True):
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            rest.append(argument)
        elif match[2] is None:
            value = following if following and not following.startswith("--") else "VALUE"
            problems.append(
                f"{argument}: expected --section.key=value in one argument, got no value; write {argument}={value}"
            )
        else:
            overrides.append(argument)
    if problems:
        raise InputError(*problems)
    return overrides, rest


def _check_verb(arguments: Sequence[str], verbs: Mapping[str, Sequence[str]]) -> None:
    """Refuse a verb that does not exist, with the one that was probably meant.

    verbs  every verb, with the verbs under it
    """
    said, known = "nmoe", tuple(verbs)
    for word in (*arguments[:2], "")[:2]:
        if word.startswith("-") or not known:
            return
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            remedy = f"did you mean {said} {near[0]}?" if near else f"see `{said} --help`"
            where = said.removeprefix("nmoe").strip() or "command line"
            raise InputError(f"{where}: expected a verb, one of {', '.join(known)}, got {word or 'nothing'}; {remedy}")
        said, known = f"{said} {word}", tuple(verbs.get(word, ()))


def build_parser() -> tuple[Parser, Mapping[str, Sequence[str]]]:
    """The parser of everything but overrides, and every verb with the verbs under it."""
    root = Parser(
        prog="nmoe",
        description="Train Mixture-of-Experts language models.",
        epilog="`nmoe VERB --help` shows an example. CONFIG: a TOML file or a preset; --section.key=value sets a key.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(metavar="VERB", required=True)
    for family in (train, launch, config, data, runs, viz, ckpt, hf, track, soak, bench, completion):
        family.verbs(verbs)
    return root, {name: tuple(under(parser)) for name, parser in verbs.choices.items()}
