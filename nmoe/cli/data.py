"""`nmoe data`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nmoe.cli import tokenizer
from nmoe.cli.parser import Verbs, add, group, load
from nmoe.errors import InputError


def verbs(root: Verbs) -> None:
    """From files to shards, and what is in them."""
    data = group(root, "data", "prepare data, and look at it")

    prep = add(data, "prep", _prep, "turn the files of a source TOML into shards", "configs/sources/stdlib.toml OUT")
    prep.add_argument("source", type=Path, metavar="SOURCE", help="TOML file")
    prep.add_argument("out", type=Path, metavar="OUT", help="folder to write; a begun one is continued")
    prep.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    prep.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster, tcp://HOST:PORT")
    prep.add_argument("--worker", metavar="I/N", help="do every N-th task from the I-th, beside N - 1 others")

    verify = add(data, "verify", _verify, "read every byte of prepared folders and compare digests", "OUT")
    verify.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")

    info = add(data, "info", _info, "what a prepared folder holds", "OUT --json")
    info.add_argument("folder", type=Path, metavar="FOLDER")
    info.add_argument("--json", action="store_true", help="print JSON")

    head = add(data, "head", _head, "print documents of a prepared folder", "OUT --split validation")
    head.add_argument("folder", type=Path, metavar="FOLDER")
    head.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    head.add_argument("--skip", type=int, default=0, metavar="N", help="documents to pass over (default: %(default)s)")
    head.add_argument("--documents", type=int, default=3, metavar="N", help="documents (default: %(default)s)")
    head.add_argument("--chars", type=int, default=500, metavar="N", help="characters of each (default: %(default)s)")

    convert = add(data, "convert", _convert, "to and from other trainers' token files", "OUT tokens --to megatron")
    convert.add_argument("source", type=Path, metavar="FROM", help="prepared folder, or the other trainer's path")
    convert.add_argument("out", type=Path, metavar="TO", help="what to write")
    formats = ("megatron", "nanogpt", "llmc", "olmo", "original")
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=formats, help="write this format from a prepared folder")
    way.add_argument("--from", dest="origin", choices=formats, help="write a prepared folder from this format")
    convert.add_argument("--split", default="train", help="split to read or to write (default: %(default)s)")
    convert.add_argument("--tokenizer", metavar="NAME", help="with --from: name or path of the tokenizer it is in")

    plan = add(data, "plan", _plan, "print what a config will read", "quickstart", config=True)
    plan.add_argument("--json", action="store_true", help="print JSON")

    tokenizer.verbs(data)


def _prep(args: argparse.Namespace) -> int:
    from nmoe.config.data_source import load_source
    from nmoe.effects import files
    from nmoe.effects.data import tokenizers as vocabulary
    from nmoe.effects.data.prepare.execute import open_pool
    from nmoe.effects.data.prepare.prep import prepare, report_lines

    share = (0, 1) if args.worker is None else _share(args.worker)
    workers = args.workers if args.workers is not None else (1 if args.worker else len(os.sched_getaffinity(0)))
    if workers < 1:
        raise InputError(f"--workers: expected at least 1, got {workers}; raise it")
    if args.dask is not None and (args.worker or args.workers):
        raise InputError("--dask: expected it without --worker and --workers, got both; leave those to the cluster")
    source = load_source(args.source)
    known = vocabulary.resolve(source.tokenizer, files.home(os.environ), args.source.parent)
    with open_pool(workers=workers, dask=args.dask) as pool:
        report = prepare(source, known, args.source.parent.resolve(), args.out.resolve(), pool, _say, share)
    if report is not None:
        _say("\n".join(report_lines(report)))
    return 0


def _share(text: str) -> tuple[int, int]:
    """`i/n` as two numbers."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise InputError(f"--worker: expected I/N with 0 <= I < N, got {text}; write 0/4 to 3/4 for four workers")
    return int(first), int(count)


def _verify(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.verify(args.folders, _say)


def _info(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.info(args.folder, args.json, _say)


def _head(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.head(args.folder, args.split, args.skip, args.documents, args.chars, _say)


def _convert(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data import tokenizers as vocabulary
    from nmoe.effects.data.store import foreign as convert

    if args.to is not None:
        convert.to_foreign(args.source, args.split, args.to, args.out, _say)
        return 0
    if args.tokenizer is None:
        raise InputError("--tokenizer: expected a name or path with --from, got none; say what the tokens are")
    tokens = vocabulary.resolve(args.tokenizer, files.home(os.environ), Path())
    convert.from_foreign(args.source, args.origin, tokens, args.out, args.split, _say)
    return 0


def _plan(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects.data import plan as reading
    from nmoe.effects.parallel.launch import from_environment

    return reading.main(loaded.config, from_environment(os.environ), as_json=args.json)


def _say(text: str) -> None:
    print(text, flush=True)
