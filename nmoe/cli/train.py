"""`nmoe run`, `plan`, `doctor`, `generate`, `eval`."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from nmoe.cli.parser import Verbs, add, add_fit, load, run_path
from nmoe.errors import InputError

if TYPE_CHECKING:
    from nmoe.config import Loaded


def verbs(root: Verbs) -> None:
    """Train a model, and what goes before and after."""
    run = add(root, "run", _run, "train a config", "quickstart --train.steps=100", config=True)
    run.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="resume from a checkpoint although this key differs from what it was saved with, such as optim.dense.lr",
    )

    run.add_argument(
        "--rewind",
        nargs="?",
        type=int,
        const=10**9,
        metavar="STEP",
        help="go back to an earlier checkpoint, the newest or that of at most STEP steps, and leave out for good what "
        "was read since; for a run that its data spoiled",
    )
    run.add_argument("--no-commands", action="store_true", help="refuse a config that names a command to run")
    run.add_argument("--gpus", type=int, metavar="N", help="processes to start, one a GPU (default: parallel.ranks)")
    add_fit(run)
    run.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="write a trace of three steps there, one a rank, and say what their time went to",
    )

    plan = add(
        root,
        "plan",
        _plan,
        "say what a config will cost; exit code 1 when it does not fit",
        "dsv3 --gpus 256 --hosts 32",
        config=True,
        reads=True,
    )
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks to plan for (default: parallel.ranks)")
    add_fit(plan)
    plan.add_argument("--hosts", type=int, metavar="N", help="hosts they are in (default: as few as hold 8 each)")
    plan.add_argument("--machine", default="h200", metavar="GPU", help="h100 or h200 (default: %(default)s)")
    plan.add_argument("--mfu", type=float, metavar="X", help="MFU of the computation alone (default: measured)")

    add(root, "doctor", _doctor, "what this machine can do", "--json", reads=True)

    generate = add(root, "generate", _generate, "continue a text with a trained model", 'NAME --prompt "def "')
    generate.add_argument("folder", type=run_path, metavar="RUN", help="name of a run in runs, or a path")
    generate.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; again for more of them"
    )
    generate.add_argument(
        "--tokens", type=int, metavar="N", help="tokens to add at most (default: 128, or what the model has room for)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest token (default: %(default)s)"
    )
    generate.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens (default: all)")
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw among the fewest likeliest tokens that have this much of the probability (default: %(default)s)",
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; again for more of them"
    )
    generate.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: the GPU if there is one)")
    generate.add_argument(
        "--no-cache", action="store_true", help="read the whole text again for every token, of any length"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")

    evaluate = add(root, "eval", _eval, "judge a trained model", "NAME --suite bits", reads=True)
    evaluate.add_argument("folder", type=run_path, metavar="RUN", help="name of a run in runs, or a path")
    suites = ("all", "bits", "choices", "probes", "syntax", "programs", "human-eval")
    evaluate.add_argument("--suite", choices=suites, help="what is asked of it (default: all)")
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="items of a task at most (default: 200; with --lm-eval all)"
    )
    evaluate.add_argument(
        "--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-eval in the place of a suite, such as hellaswag"
    )
    evaluate.add_argument(
        "--tasks", type=Path, metavar="FOLDER", help="with --lm-eval: YAML files of tasks, in the place of its own"
    )
    evaluate.add_argument(
        "--shots", type=int, metavar="N", help="with --lm-eval: examples in a prompt (default: as the task says)"
    )
    evaluate.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: the GPU if there is one)")


def _run(args: argparse.Namespace) -> int:
    from nmoe.effects.device import signals

    with signals.leave_on_signals():
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from nmoe.effects.parallel import launch
    from nmoe.effects.parallel.launch import from_environment

    started = from_environment(os.environ)
    if started.launched and args.gpus not in (None, started.world):
        raise InputError(
            f"--gpus: expected the {started.world} ranks that a launcher started, got {args.gpus}; leave it to the "
            "launcher"
        )
    ranks = started.world if started.launched else args.gpus
    if ranks is not None:
        args.overrides.append(f"--parallel.ranks={ranks}")
    loaded = load(args, to_run=True)
    config = loaded.config
    if started.rank == 0:
        _look_at_command(loaded, args.no_commands)
    if config.parallel.ranks > 1 and not started.launched:
        if config.run.device == "cuda":
            # before they are started: each takes seconds, and hundreds of megabytes, to find the same out
            from nmoe.effects.device import gpu

            gpu.check_count(config.parallel.ranks)
        patience = {"timeout_s": config.parallel.timeout_s, "grace_s": config.checkpoint.grace_s}
        return launch.start(config.parallel.ranks, args.command[1:], os.environ, **patience)
    from nmoe.config.run_name import label
    from nmoe.config.secrets import masked_arguments

    if started.rank == 0:
        # before torch, whose import takes longer than a person waits for a sign of life; a program does not wait
        from nmoe.effects.terminal import say, width

        if width() is not None:
            say(f"config         {args.config.stem} is checked; loading torch")
        _say_fitted(loaded)
    from nmoe.effects.train import run
    from nmoe.effects.train.profile import profiling
    from nmoe.effects.train.world import World

    command, name = masked_arguments(args.command), label(args.config.stem)
    judge = None
    if config.eval.every:
        from nmoe.effects.evals import suite

        judge = suite.judging(config.eval)
    with nullcontext(World()) if args.profile is None else profiling(args.profile, config) as world:
        world = attrs.evolve(world, judge=judge)
        return run.main(config, loaded.sources, command, name, args.accept, world, args.rewind)


def _say_fitted(loaded: Loaded, *, aside: bool = False) -> None:
    """Say what --fit changed. aside: on standard error, where standard output is for a program"""
    from nmoe.effects.terminal import say, warn

    for change in loaded.fitted:
        (warn if aside else say)(f"fitted         {change.path}: {change.left} -> {change.right}")


def _look_at_command(loaded: Loaded, refuse: bool) -> None:
    """Say which command a config from elsewhere names, before anything can call it.

    Raises:  InputError for any command where `refuse`.
    """
    from nmoe.config.toml import shown
    from nmoe.effects.terminal import say

    command, place = loaded.config.log.alert_command, loaded.sources.get("log.alert_command", "")
    if command is None:
        return
    if refuse:
        raise InputError(
            f"{place}: log.alert_command: expected no command with --no-commands, got {shown(command)}; remove the key"
        )
    file = Path(place.rpartition(":")[0])
    if file.suffix == ".toml" and not file.resolve().is_relative_to(Path.cwd()):
        say(f"command        {place} is not in this folder, and has each alert run {shown(command)}")
        say(f"{'':<15}through a shell; --no-commands refuses it")


def _plan(args: argparse.Namespace) -> int:
    loaded = load(args, args.gpus)
    _say_fitted(loaded, aside=args.json)
    from nmoe.cli import plan as scale

    gpus = loaded.config.parallel.ranks if args.gpus is None else args.gpus
    return scale.main(loaded.config, gpus, args.hosts, args.machine, args.mfu, args.json)


def _doctor(args: argparse.Namespace) -> int:
    from nmoe.effects.device import doctor

    return doctor.main(args.json)


def _generate(args: argparse.Namespace) -> int:
    from nmoe.effects.train import generate
    from nmoe.pure.model.decode import Sampling

    return generate.main(
        args.folder,
        args.prompt,
        num_tokens=args.tokens,
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
        seed=args.seed,
        stops=args.stop,
        device=args.device,
        cached=not args.no_cache,
    )


def _eval(args: argparse.Namespace) -> int:
    if args.lm_eval is None:
        from nmoe.effects.evals import suite

        for option, value in (("--tasks", args.tasks), ("--shots", args.shots)):
            if value is not None:
                raise InputError(f"{option}: expected --lm-eval beside it, got {value} alone; name tasks of lm-eval")
        limit = suite.LIMIT if args.limit is None else args.limit
        return suite.main(args.folder, args.suite or "all", limit, args.device, args.json)
    from nmoe.effects.evals import harness

    if args.suite is not None:
        raise InputError("--lm-eval: expected no --suite beside it, got both; call `nmoe eval` twice")
    about = {"include": args.tasks, "shots": args.shots, "limit": args.limit, "device": args.device}
    return harness.main(args.folder, args.lm_eval, **about, as_json=args.json)
