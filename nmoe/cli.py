"""The command line: the only reader of argv. Each verb imports what it needs when it is called."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nmoe.errors import InputError

if TYPE_CHECKING:
    from nmoe.config import Loaded

__all__ = ["main"]

EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
"""128 + SIGPIPE: whoever read the output has gone."""

OVERRIDE = re.compile(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
"""`--section.key=value`, or the same without its value."""


class Parser(argparse.ArgumentParser):
    """argparse, with its errors raised as InputError instead of printed with the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('nmoe ')}: {message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    argv     arguments after the program's name; None: this process's
    returns  exit code: the verb's own, 2 for bad input, 130 interrupted, 141 when the reader of stdout has gone
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        from nmoe.config.toml import printable

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
        print(f"nmoe {_version()}")
        return 0
    parser, verbs = _parser()
    _check_verb(arguments, verbs)
    overrides, rest = _split(arguments)
    try:
        args, unknown = parser.parse_known_args(rest)
    except SystemExit as done:  # after --help
        return int(done.code or 0)
    if unknown:
        known = "its own arguments and --section.key=value" if args.takes_overrides else "its own arguments"
        raise InputError(*(f"{args.verb}: {known}, got {each}; see `nmoe {args.verb} --help`" for each in unknown))
    if overrides and not args.takes_overrides:
        raise InputError(*(f"{args.verb}: no overrides, got {each}; remove it" for each in overrides))
    args.overrides, args.command = overrides, ("nmoe", *arguments)
    return args.call(args)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nmoe")
    except PackageNotFoundError:
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
            problems.append(f"{argument}: --section.key=value in one argument, got no value; write {argument}={value}")
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
            raise InputError(f"{where}: a verb, one of {', '.join(known)}, got {word or 'nothing'}; {remedy}")
        said, known = f"{said} {word}", tuple(verbs.get(word, ()))


def _parser() -> tuple[Parser, Mapping[str, Sequence[str]]]:
    """The parser of everything but overrides, and every verb with the verbs under it."""
    root = Parser(
        prog="nmoe",
        description="Train Mixture-of-Experts language models.",
        epilog="`nmoe VERB --help` shows an example. CONFIG is a TOML file; --section.key=value sets one of its keys.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(metavar="VERB", required=True)

    _add(verbs, "run", _run, "train a config", "configs/quickstart.toml --train.steps=100", config=True)

    plan = _add(verbs, "plan", _plan, "say what a config will cost", "configs/dsv3.toml --gpus 128", config=True)
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks to plan for (default: parallel.ranks)")
    plan.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation to assume (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    doctor = _add(verbs, "doctor", _doctor, "what this machine can do", "--json")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    config = _group(verbs, "config", "look at a config")
    show = _add(
        config, "show", _config_show, "print a config with every key", "configs/dsv2.toml --sources", config=True
    )
    show.add_argument("--sources", action="store_true", help="say where each value came from")
    _add(config, "check", _config_check, "say everything that is wrong with a config", "configs/dsv2.toml", config=True)
    diff = _add(
        config,
        "diff",
        _config_diff,
        "compare two files, without the environment; exit code 1 when they differ",
        "configs/moonlet.toml configs/moonlight.toml",
    )
    diff.add_argument("left", type=Path, metavar="A")
    diff.add_argument("right", type=Path, metavar="B")
    _add(config, "schema", _config_schema, "print the JSON Schema of config files", "> nmoe.schema.json")

    runs = _group(verbs, "runs", "look at past runs")
    _add(runs, "list", _runs_list, "list the runs in a folder", "--root runs")
    _add(runs, "show", _runs_show, "show one run", "NAME", run=True)
    export = _add(runs, "export", _runs_export, "write a run's metrics as CSV", "NAME --to metrics.csv", run=True)
    export.add_argument("--to", type=Path, metavar="FILE", help="file to write (default: standard output)")
    for each in runs.choices.values():
        each.add_argument(
            "--root", type=Path, default=Path("runs"), help="folder of run folders (default: %(default)s)"
        )

    generate = _add(verbs, "generate", _generate, "continue a text with a trained model", 'runs/NAME --prompt "def "')
    generate.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to add (default: %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest token (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")

    bench = _group(verbs, "bench", "measure")
    step = _add(
        bench,
        "step",
        _bench_step,
        "time a config's step on random tokens",
        "configs/quickstart.toml --against transformers",
        config=True,
    )
    step.add_argument("--against", choices=("transformers",), help="time the same model there too")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="steps to time (default: %(default)s)")
    groups = {"config": config, "runs": runs, "bench": bench}
    return root, {name: tuple(groups[name].choices) if name in groups else () for name in verbs.choices}


Verbs = Any  # argparse names no public type for what add_subparsers returns


def _add(
    verbs: Verbs,
    name: str,
    call: Callable[[argparse.Namespace], int],
    about: str,
    example: str,
    *,
    config: bool = False,
    run: bool = False,
) -> Parser:
    """A verb's parser.

    example  arguments that make sense, shown in its help
    config   whether it takes a config and overrides
    run      whether it takes a run's name
    """
    parser: Parser = verbs.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    verb = parser.prog.removeprefix("nmoe ")
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(call=call, verb=verb, takes_overrides=config)
    if config:
        parser.usage = f"{parser.prog} CONFIG [options] [--section.key=value ...]"
        parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file")
    if run:
        parser.add_argument("name", metavar="NAME", help="name of the run folder")
    return parser


def _group(verbs: Verbs, name: str, about: str) -> Verbs:
    """A verb that has verbs of its own."""
    parser: Parser = verbs.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    return parser.add_subparsers(metavar="VERB", required=True)


def _load(args: argparse.Namespace, world: int | None = None) -> Loaded:
    from nmoe.config import load_valid

    return load_valid(args.config, os.environ, args.overrides, world)


def _run(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from nmoe.effects import run

    return run.main(loaded.config, loaded.sources, args.command, args.config.stem)


def _plan(args: argparse.Namespace) -> int:
    loaded = _load(args, args.gpus)
    from nmoe.effects import plan

    ranks = loaded.config.parallel.ranks if args.gpus is None else args.gpus
    return plan.main(loaded.config, ranks, args.mfu, args.json)


def _doctor(args: argparse.Namespace) -> int:
    from nmoe.effects import doctor

    return doctor.main(args.json)


def _config_show(args: argparse.Namespace) -> int:
    from nmoe.config import annotated, dump, load

    loaded = load(args.config, os.environ, args.overrides)
    print(annotated(loaded.config, loaded.sources) if args.sources else dump(loaded.config), end="")
    return 0


def _config_check(args: argparse.Namespace) -> int:
    from nmoe.config import identity

    config = _load(args).config
    print(f"{args.config}: valid for {config.parallel.ranks} rank(s), identity {identity(config)[:12]}")
    return 0


def _config_diff(args: argparse.Namespace) -> int:
    from nmoe.config import diff, load
    from nmoe.config.toml import shown

    differences = diff(*(load(path, {}, ()).config for path in (args.left, args.right)))
    for each in differences:
        left, right = ("absent" if value is None else shown(value) for value in (each.left, each.right))
        print(f"{each.path}: {left} -> {right}")
    return 1 if differences else 0


def _config_schema(args: argparse.Namespace) -> int:
    import json

    from nmoe.config import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _runs_list(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.list_runs(args.root)


def _runs_show(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.show(args.root, args.name)


def _runs_export(args: argparse.Namespace) -> int:
    from nmoe.effects import runs

    return runs.export(args.root, args.name, args.to)


def _generate(args: argparse.Namespace) -> int:
    from nmoe.effects import generate

    return generate.main(args.folder, args.prompt, args.tokens, args.temperature, args.seed)


def _bench_step(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from nmoe.effects import bench

    return bench.step(loaded.config, args.against, args.steps)
