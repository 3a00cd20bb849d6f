"""`nmoe export hf` and `nmoe import hf`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group, run_path


def verbs(root: Verbs) -> None:
    """Take models out and in."""
    export = add(
        group(root, "export", "write a model for others"), "hf", _export, "write a Hugging Face folder", "NAME out"
    )
    export.add_argument(
        "path",
        type=run_path,
        metavar="RUN",
        help="name of a run in runs, or path of a run, checkpoint or imported folder",
    )
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    export.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare its logits in transformers (default: below a billion parameters)",
    )
    export.add_argument(
        "--shard-bytes", type=int, default=5_000_000_000, metavar="N", help="bytes of a file (default: %(default)s)"
    )
    imported = add(
        group(root, "import", "read a model of others"), "hf", _import, "read a Hugging Face folder", "folder out"
    )
    imported.add_argument(
        "folder", type=Path, metavar="FOLDER", help="config.json, safetensors files and tokenizer.json"
    )
    imported.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")


def _export(args: argparse.Namespace) -> int:
    from nmoe.effects import files
    from nmoe.effects.checkpoint import hf_export, hf_verify
    from nmoe.effects.checkpoint.fs import Disk
    from nmoe.effects.data import hf_tokenizer, tokenizer

    source = hf_export.open_source(Disk(), args.path)
    small = source.parameters() < hf_export.VERIFIED_PARAMETERS
    verify = partial(hf_verify.verify, source=source) if (small if args.verify is None else args.verify) else None
    extra, end_of_text = {}, None
    if files.is_file(source.folder / tokenizer.FILE):
        ours = tokenizer.load(source.folder)
        extra, end_of_text = hf_tokenizer.convert(ours, hf_tokenizer.texts()), ours.end_of_text
    hf_export.export(
        source, args.out, shard_bytes=args.shard_bytes, extra=extra, end_of_text=end_of_text, verify=verify
    )
    return 0


def _import(args: argparse.Namespace) -> int:
    from nmoe.effects.checkpoint.hf_import import import_folder
    from nmoe.effects.data import hf_tokenizer

    import_folder(args.folder, args.out, extra=partial(hf_tokenizer.of_folder, args.folder))
    return 0
