"""`nmoe bench`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import MappingProxyType

from nmoe.cli.parser import Verbs, add, group, load
from nmoe.errors import InputError

KERNELS = MappingProxyType(
    {
        "moe": "compare the routed experts of a layer with reference implementations",
        "precision": "compare the routed experts in fp8 with those in bf16, by tokens and sizes",
        "attention": "compare attention with reference implementations",
        "loss": "compare the head and its loss with reference implementations",
        "optimizer": "compare the optimizer's passes with reference implementations",
        "kernels": "compare all of these with reference implementations",
    }
)


def verbs(root: Verbs) -> None:
    """Measure."""
    bench = group(root, "bench", "measure")
    step = add(
        bench,
        "step",
        _bench_step,
        "time a config's step on random tokens",
        "quickstart --against transformers",
        config=True,
    )
    step.add_argument("--against", choices=("transformers",), help="time the same model there too")
    step.add_argument("--jsonl", type=Path, metavar="FILE", help="also write one line a trainer there")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="steps to time (default: %(default)s)")
    for kind, what in KERNELS.items():
        verb = add(bench, kind, _bench_kernels, what, "--jsonl rows.jsonl")
        verb.set_defaults(kind=kind)
        verb.add_argument("--jsonl", type=Path, metavar="FILE", help="also write one line a row there")
        if kind == "kernels":
            verb.add_argument("--tune", action="store_true", help="look for the fastest tiles and print their table")
            verb.add_argument(
                "--size",
                action="append",
                metavar="DxF",
                help="hidden and expert size of an MoE layer to tune for (default: 2048x1408)",
            )
    gate = add(
        bench,
        "gate",
        _bench_gate,
        "measure all kernels and name those that fell by more than 5 % beside their peers; exit code 1 if one did",
        "--jsonl rows.jsonl",
    )
    gate.add_argument("--rows", type=Path, metavar="FILE", help="judge rows measured earlier, without a GPU")
    gate.add_argument(
        "--against", type=Path, metavar="FILE", help="rows to compare with (default: those shipped for this GPU)"
    )
    gate.add_argument("--jsonl", type=Path, metavar="FILE", help="also write one line a row there")
    loader = add(
        bench,
        "loader",
        _bench_loader,
        "time how long a step waits for its batch",
        "quickstart",
        config=True,
    )
    loader.add_argument("--steps", type=int, default=200, metavar="N", help="batches to time (default: %(default)s)")
    loader.add_argument(
        "--pause", type=float, default=0.05, metavar="S", help="seconds a step takes (default: %(default)s)"
    )
    log = add(
        bench,
        "log",
        _bench_log,
        "time what a logged step writes",
        "quickstart --model.num_layers=61 --model.moe.num_experts=256",
        config=True,
    )
    log.add_argument("--steps", type=int, default=1000, metavar="N", help="reports to time (default: %(default)s)")
    data = add(
        bench,
        "data",
        _bench_data,
        "time preparation, batches of 8 x 4096 tokens, and the planning of a large data mixture",
        "quickstart --megabytes 200",
        config=True,
    )
    data.add_argument("--megabytes", type=int, default=64, metavar="N", help="text to prepare (default: %(default)s)")
    data.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    swap = add(
        bench, "exchange", _bench_exchange, "time the expert exchange among GPUs, or virtual ranks on one", "--ranks 2"
    )
    swap.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="virtual ranks of one process (default: %(default)s)"
    )
    save = add(
        bench,
        "checkpoint",
        _bench_checkpoint,
        "time a save and a load of a config's state, and what a save costs the steps beside it",
        "quickstart --to /data",
        config=True,
    )
    save.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="where to write, and delete (default: here)"
    )
    save.add_argument("--steps", type=int, default=10, metavar="N", help="steps beside a save (default: %(default)s)")
    save.add_argument("--rounds", type=int, default=3, metavar="N", help="how often (default: %(default)s)")
    records = add(
        bench,
        "records",
        _bench_records,
        "train variants of a config with several seeds, and compare them by bits a byte of held-out text; the same "
        "command resumes where it was stopped",
        "docs/records/cpu-study.toml out --jobs 2",
    )
    records.set_defaults(takes_overrides=True)
    records.usage = f"{records.prog} STUDY OUT [options] [--section.key=value ...]"
    records.add_argument("study", type=Path, metavar="STUDY", help="TOML file that says what is trained and compared")
    records.add_argument("out", type=Path, metavar="OUT", help="folder of the results and the table")
    records.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once (default: %(default)s)")
    records.add_argument(
        "--threads", type=int, default=2, metavar="N", help="CPU threads of each (default: %(default)s)"
    )
    records.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs, one training each at once, in the place of --jobs"
    )
    records.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="N", help="time after which trainings are stopped"
    )


def _bench_records(args: argparse.Namespace) -> int:
    from nmoe.bench.records.train import main

    return main(
        args.study,
        args.out,
        jobs_at_once=args.jobs,
        threads=args.threads,
        gpus=args.gpus,
        minutes=args.minutes,
        more=tuple(args.overrides),
    )


def _bench_kernels(args: argparse.Namespace) -> int:
    from nmoe.bench import kernels as kernel_bench

    if args.kind != "kernels":
        return kernel_bench.kernels((args.kind,), args.jsonl)
    if args.size and not args.tune:
        raise InputError(f"--size: expected --tune beside it, got {args.size[0]} alone; add it, or remove --size")
    if args.tune and args.jsonl is not None:
        raise InputError(f"--jsonl: expected none beside --tune, got {args.jsonl}; remove it, tuning prints a table")
    return (
        kernel_bench.tune(args.size or ["2048x1408"])
        if args.tune
        else kernel_bench.kernels(kernel_bench.KINDS, args.jsonl)
    )


def _bench_gate(args: argparse.Namespace) -> int:
    from nmoe.bench import kernels as kernel_bench

    return kernel_bench.gated(args.rows, args.against, args.jsonl)


def _bench_step(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.bench import step as bench

    return bench.step(loaded.config, args.against, args.steps, args.jsonl)


def _bench_exchange(args: argparse.Namespace) -> int:
    from nmoe.bench import exchange as bench_exchange
    from nmoe.effects.parallel.launch import from_environment

    return bench_exchange.main(from_environment(os.environ), args.ranks)


def _bench_loader(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.bench import loader
    from nmoe.effects.parallel.launch import from_environment

    return loader.bench(loaded.config, from_environment(os.environ), steps=args.steps, pause_s=args.pause)


def _bench_log(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.bench import log as bench_log

    return bench_log.log(loaded.config, args.steps)


def _bench_data(args: argparse.Namespace) -> int:
    from nmoe.bench import data as bench
    from nmoe.effects import files
    from nmoe.effects.parallel.launch import from_environment

    bench.preparation(args.megabytes, args.workers, files.home(os.environ), lambda line: print(line, flush=True))
    from nmoe.bench import loader
    from nmoe.config import load_valid

    sizes = ("--train.batch_size=8", "--train.microbatch_size=8", "--train.sequence_length=4096")
    config = load_valid(args.config, os.environ, (*sizes, "--model.max_positions=4096", *args.overrides), None).config
    loader.bench(config, from_environment(os.environ), steps=100, pause_s=0.05)
    return loader.bench_scale()


def _bench_checkpoint(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.bench import checkpoint as bench_checkpoint

    return bench_checkpoint.main(loaded.config, args.to, args.steps, args.rounds)
