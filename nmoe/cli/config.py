"""`nmoe config`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nmoe.cli.parser import Verbs, add, group, load


def verbs(root: Verbs) -> None:
    """Look at a config."""
    config = group(root, "config", "look at a config")
    show = add(
        config, "show", _config_show, "print a config with every key", "configs/dsv2.toml --sources", config=True
    )
    show.add_argument("--sources", action="store_true", help="say where each value came from")
    add(config, "check", _config_check, "say everything that is wrong with a config", "configs/dsv2.toml", config=True)
    diff = add(
        config,
        "diff",
        _config_diff,
        "compare two files, without the environment; exit code 1 when they differ",
        "configs/moonlet.toml configs/moonlet-16b.toml",
    )
    diff.add_argument("left", type=Path, metavar="A")
    diff.add_argument("right", type=Path, metavar="B")
    add(config, "schema", _config_schema, "print the JSON Schema of config files", "> nmoe.schema.json")


def _config_show(args: argparse.Namespace) -> int:
    from nmoe.config import annotated, dump, load

    loaded = load(args.config, os.environ, args.overrides)
    print(annotated(loaded.config, loaded.sources) if args.sources else dump(loaded.config), end="")
    return 0


def _config_check(args: argparse.Namespace) -> int:
    from nmoe.config import identity

    config = load(args).config
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
