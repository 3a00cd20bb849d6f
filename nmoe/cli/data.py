"""`nmoe data`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nmoe.cli import tokenizer
from nmoe.cli.parser import Verbs, add, group, load
from nmoe.effects.terminal import say, warn
from nmoe.errors import InputError

if TYPE_CHECKING:
    from nmoe.config.data_source import Source

VOCAB = 8192
LEARN_BYTES = 500_000_000
"""Text that a tokenizer is trained on at most."""


def verbs(root: Verbs) -> None:
    """From files to shards, and what is in them."""
    data = group(root, "data", "prepare data, and look at it")

    prep = add(data, "prep", _prep, "turn a folder of files, or what a TOML names, into shards", "FOLDER OUT")
    prep.add_argument(
        "source",
        type=Path,
        metavar="FOLDER",
        help="text, code, .jsonl, .parquet, .arrow, .gz, .zst; or TOML: a source, a mixture",
    )
    prep.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="folder to write; a begun one is continued; of a mixture none"
    )
    prep.add_argument(
        "--vocab", type=int, metavar="N", help=f"tokens of the tokenizer that is trained (default: {VOCAB})"
    )
    prep.add_argument("--tokenizer", metavar="NAME", help="name or path of a tokenizer to use instead")
    prep.add_argument("--exclude", action="append", metavar="GLOB", help="files of the folder to leave out; repeatable")
    prep.add_argument("--text-field", metavar="KEY", help="key of the text in .jsonl and .parquet (default: text)")
    prep.add_argument("--dry-run", action="store_true", help="say what would be read and written, and stop")
    prep.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    prep.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster, tcp://HOST:PORT")
    prep.add_argument("--worker", metavar="I/N", help="do every N-th task from the I-th, beside N - 1 others")

    verify = add(data, "verify", _verify, "read every byte of prepared folders and compare digests", "OUT", reads=True)
    verify.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")

    digest = add(data, "digest", _digest, "write digests of blocks that an earlier version did not", "OUT")
    digest.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")

    info = add(data, "info", _info, "what a prepared folder holds", "OUT --json", reads=True)
    info.add_argument("folder", type=Path, metavar="FOLDER")

    head = add(data, "head", _head, "print documents of a prepared folder", "OUT --split validation", reads=True)
    head.add_argument("folder", type=Path, metavar="FOLDER")
    head.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    head.add_argument("--skip", type=int, default=0, metavar="N", help="documents to pass over (default: %(default)s)")
    head.add_argument("--documents", type=int, default=3, metavar="N", help="documents (default: %(default)s)")
    head.add_argument("--chars", type=int, default=500, metavar="N", help="characters of each (default: %(default)s)")

    convert = add(data, "convert", _convert, "to and from other trainers' token files", "OUT tokens --to megatron")
    convert.add_argument("source", type=Path, metavar="FROM", help="prepared folder, or the other trainer's path")
    convert.add_argument("out", type=Path, metavar="TO", help="what to write")
    formats = ("megatron", "nanogpt", "llmc", "olmo", "original")
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=formats, help="write this format from a prepared folder")
    direction.add_argument("--from", dest="origin", choices=formats, help="write a prepared folder from this format")
    convert.add_argument("--split", default="train", help="split to read or to write (default: %(default)s)")
    convert.add_argument(
        "--dtype", choices=("u16", "u32"), help="of nanogpt and olmo tokens (default: the one the tokenizer needs)"
    )
    convert.add_argument("--tokenizer", metavar="NAME", help="with --from: name or path of the tokenizer it is in")

    add(data, "plan", _plan, "print what a config will read", "quickstart", config=True, reads=True)

    tokenizer.verbs(data)


def _prep(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data.prepare import folder
    from nmoe.effects.data.prepare.execute import open_pool
    from nmoe.effects.data.prepare.prep import begun, prepare, report_lines
    from nmoe.effects.data.tokenizer import load
    from nmoe.effects.data.tokenizers import learn, resolve

    if args.source.suffix == ".toml" and not args.source.is_dir():
        _refuse_folder_options(args)
        if _is_mixture(args.source):
            return _prep_mixture(args)
    if args.out is None:
        raise InputError("nmoe data prep: expected a folder OUT to write, got none; name it behind the source")
    share, workers = _work(args)
    home, out = files.home(os.environ), args.out.resolve()
    source, base, named = _source(args, out)
    known = None if named is None else resolve(source.tokenizer, home, named)
    if known is None and (before := begun(out)) is not None:
        known = load(before)
    if args.dry_run:
        about = (
            f"{args.vocab} tokens, trained on these files" if known is None else f"{known.name}, {known.size} tokens"
        )
        say("\n".join(folder.dry_run_lines(source, base, out, about, say)))
        return 0
    known = known or learn(source, base, args.vocab, LEARN_BYTES, say, home)
    with open_pool(workers=workers, dask=args.dask) as pool:
        report = prepare(source, known, base, out, pool, say, share)
    if report is not None:
        say("\n".join((*report_lines(report), *folder.next_lines(out, str(args.out)))))
    return 0


def _prep_mixture(args: argparse.Namespace) -> int:
    from nmoe.config.data_mixture import load_mixture
    from nmoe.effects import files
    from nmoe.effects.data.prepare import mixture
    from nmoe.effects.data.prepare.execute import open_pool
    from nmoe.effects.data.prepare.prep import prepare, report_lines

    if args.out is not None:
        raise InputError(
            f"{args.out}: expected no folder behind a mixture, which names one a source, got it; remove it"
        )
    share, workers = _work(args)
    loaded = load_mixture(args.source)
    every = mixture.jobs(loaded, files.home(os.environ))
    if args.dry_run:
        say("\n".join(mixture.plan_lines(every, say)))
        return 0
    finished = True
    with open_pool(workers=workers, dask=args.dask) as pool:
        for job in every:
            say(f"source     {job.name} -> {job.out}")
            report = prepare(job.source, job.tokenizer, job.base, job.out, pool, say, share)
            finished = finished and report is not None
            if report is not None:
                say("\n".join(report_lines(report)))
    if finished:
        say("\n".join(mixture.next_lines(loaded, every)))
    return 0


def _is_mixture(path: Path) -> bool:
    """Whether a TOML file is a data mixture; a source has no table of sources."""
    from nmoe.config.toml import read

    return "sources" in read(path).tables


def _work(args: argparse.Namespace) -> tuple[tuple[int, int], int]:
    """The share of the tasks that is done here, and in how many processes."""
    share = (0, 1) if args.worker is None else _share(args.worker)
    workers = args.workers if args.workers is not None else (1 if args.worker else len(os.sched_getaffinity(0)))
    if workers < 1:
        raise InputError(f"--workers: expected at least 1, got {workers}; raise it")
    if args.dask is not None and (args.worker or args.workers):
        raise InputError("--dask: expected it without --worker and --workers, got both; leave those to the cluster")
    return share, workers


def _refuse_folder_options(args: argparse.Namespace) -> None:
    """Refuse options that a folder alone has."""
    options = {
        **{"--vocab": args.vocab, "--tokenizer": args.tokenizer},
        **{"--exclude": args.exclude, "--text-field": args.text_field},
    }
    if said := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{said[0]}: expected it with a folder, got {args.source}; write it into that file")


def _source(args: argparse.Namespace, out: Path) -> tuple[Source, Path, Path | None]:
    """What is prepared, and the folders that its paths and its tokenizer's start from; None: no tokenizer is named."""
    from nmoe.config.data_source import load_source
    from nmoe.effects.data.prepare import folder

    if args.source.suffix == ".toml" and not args.source.is_dir():
        return load_source(args.source), args.source.parent.resolve(), args.source.parent
    if args.tokenizer is not None and args.vocab is not None:
        raise InputError(f"--vocab: expected it without --tokenizer, got both; {args.tokenizer} has its own size")
    args.vocab = VOCAB if args.vocab is None else args.vocab
    if args.vocab < 257:
        raise InputError(f"--vocab: expected at least 257, 256 bytes and end of text, got {args.vocab}; raise it")
    name = args.tokenizer or f"bpe-{args.vocab}"
    source = folder.folder_source(args.source, args.exclude or (), args.text_field or "text", name, out, say)
    return source, folder.base_of(args.source), None if args.tokenizer is None else Path()


def _share(text: str) -> tuple[int, int]:
    """`i/n` as two numbers."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise InputError(f"--worker: expected I/N with 0 <= I < N, got {text}; write 0/4 to 3/4 for four workers")
    return int(first), int(count)


def _verify(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.verify(args.folders, warn if args.json else say, args.json)


def _digest(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.digest(args.folders, say)


def _info(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.info(args.folder, args.json, say)


def _head(args: argparse.Namespace) -> int:
    from nmoe.effects.data import inspect

    return inspect.head(args.folder, args.split, args.skip, args.documents, args.chars, say, args.json)


def _convert(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data.store.foreign import from_foreign, to_foreign
    from nmoe.effects.data.tokenizers import resolve

    if args.to is not None:
        if args.dtype is not None:
            raise InputError(f"--dtype: expected it with --from only, got {args.dtype}; leave it out")
        to_foreign(args.source, args.split, args.to, args.out, say)
        return 0
    if args.tokenizer is None:
        raise InputError("--tokenizer: expected a name or path with --from, got none; say what the tokens are")
    tokenizer = resolve(args.tokenizer, files.home(os.environ), Path())
    from_foreign(args.source, args.origin, tokenizer, args.out, args.split, say, args.dtype)
    return 0


def _plan(args: argparse.Namespace) -> int:
    loaded = load(args)
    from nmoe.effects.data import plan as reading
    from nmoe.effects.parallel.launch import from_environment

    return reading.main(loaded.config, from_environment(os.environ), as_json=args.json)
