"""`nmoe data tokenizer`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group
from nmoe.effects.terminal import say


def verbs(data: Verbs) -> None:
    """Make, add and list tokenizers."""
    tokenizer = group(data, "tokenizer", "make, add and list tokenizers")

    train = add(
        tokenizer, "train", _train, "train byte-pair encoding on a source", "configs/sources/stdlib.toml --size 4096"
    )
    train.add_argument("source", type=Path, metavar="SOURCE", help="TOML file; its `tokenizer` is the name to give")
    train.add_argument("--size", type=int, default=32768, metavar="N", help="tokens (default: %(default)s)")
    train.add_argument("--name", help="name to give instead")
    train.add_argument(
        "--megabytes", type=int, default=500, metavar="N", help="text to learn from at most (default: %(default)s)"
    )

    added = add(
        tokenizer, "add", _add, "add a published tokenizer from its file", "o200k_harmony --from o200k_base.tiktoken"
    )
    added.add_argument(
        "name",
        metavar="NAME",
        help="r50k_base, cl100k_base, o200k_base or o200k_harmony; any name for a tokenizer.json",
    )
    added.add_argument(
        "--from",
        dest="path",
        type=Path,
        required=True,
        metavar="FILE",
        help="tokenizer.json of Hugging Face or its folder; of the four named the .tiktoken file, or its .gz",
    )

    add(tokenizer, "list", _list, "list the tokenizers of this machine", "", reads=True)


def _train(args: argparse.Namespace) -> int:
    from nmoe.config.data_source import load_source
    from nmoe.effects import files
    from nmoe.effects.data.tokenizers import check_free, install, learn

    source, home = load_source(args.source), files.home(os.environ)
    name = args.name or source.tokenizer
    check_free(name, home)
    base = args.source.parent.resolve()
    trained = learn(source, base, args.size, args.megabytes * 1_000_000, say, home)
    folder = install(trained, name, home)
    say(f"{folder}: {trained.size} tokens, fingerprint {trained.identity}")
    return 0


def _add(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data.tokenizers import add, install

    tokenizer = add(args.name, args.path)
    folder = install(tokenizer, args.name, files.home(os.environ))
    say(f"{folder}: {tokenizer.size} tokens, fingerprint {tokenizer.identity}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.data.tokenizers import list_tokenizers

    return list_tokenizers(files.home(os.environ), say, args.json)
