"""`nmoe config`."""

from __future__ import annotations

import argparse
import os

from nmoe.cli.parser import Verbs, add, config_path, group, load
from nmoe.errors import InputError


def verbs(root: Verbs) -> None:
    """Look at a config."""
    config = group(root, "config", "look at a config")
    add(config, "list", _config_list, "list the presets", "", reads=True)
    show = add(config, "show", _config_show, "print a config with every key", "dsv2 --sources", config=True, reads=True)
    show.add_argument("--sources", action="store_true", help="say where each value came from")
    add(config, "check", _config_check, "say everything that is wrong with a config", "dsv2", config=True, reads=True)
    diff = add(
        config,
        "diff",
        _config_diff,
        "compare two configs, without the environment; exit code 1 when they differ",
        "moonlet moonlet-16b",
        reads=True,
    )
    diff.add_argument("left", type=config_path, metavar="A")
    diff.add_argument("right", type=config_path, metavar="B")
    explain = add(
        config, "explain", _config_explain, "say what a key means and may be", "train.steps quickstart", reads=True
    )
    explain.add_argument("key", metavar="KEY", help="key or table, such as train.steps or model.moe")
    explain.add_argument("config", type=config_path, metavar="CONFIG", nargs="?", help="say its value there too")
    explain.set_defaults(takes_overrides=True)
    add(config, "reference", _config_reference, "print docs/config.md, the reference of all keys", "> docs/config.md")
    add(config, "schema", _config_schema, "print the JSON Schema of config files", "> nmoe.schema.json")


def _config_list(args: argparse.Namespace) -> int:
    from nmoe.config import load, preset
    from nmoe.effects.terminal import say, say_json, table

    runs = {name: load(preset.path_of(name), {}, ()).config for name in preset.names()}
    rows = [(name, config.run.device, str(config.parallel.ranks), preset.about(name)) for name, config in runs.items()]
    if args.json:
        say_json([dict(zip(("preset", "device", "ranks", "about"), row, strict=True)) for row in rows])
        return 0
    say(table(("preset", "device", "ranks", "about"), rows, left=4))
    return 0


def _config_show(args: argparse.Namespace) -> int:
    from nmoe.config import annotated, dump, load, unset
    from nmoe.config.fields import table
    from nmoe.effects.terminal import say_json

    loaded = load(args.config, os.environ, args.overrides)
    if args.json:
        say_json({"config": table(loaded.config), "sources": loaded.sources})
        return 0
    print(annotated(loaded.config, loaded.sources) if args.sources else dump(loaded.config))
    print(unset(loaded.config), end="")
    return 0


def _config_check(args: argparse.Namespace) -> int:
    from nmoe.config import identity
    from nmoe.config.check import remarks
    from nmoe.effects.terminal import say_json
    from nmoe.pure.units import counted

    config = load(args, to_run=True).config
    if args.json:
        about = {"config": str(args.config), "ranks": config.parallel.ranks, "fingerprint": identity(config)}
        say_json({**about, "remarks": remarks(config)})
        return 0
    print(f"{args.config}: valid for {counted(config.parallel.ranks, 'rank')}, fingerprint {identity(config)[:12]}")
    for remark in remarks(config):
        print(f"{args.config}: {remark}")
    return 0


def _config_diff(args: argparse.Namespace) -> int:
    from nmoe.config import diff, load
    from nmoe.config.toml import shown
    from nmoe.effects.terminal import say_json

    differences = diff(*(load(path, {}, ()).config for path in (args.left, args.right)))
    if args.json:
        say_json({difference.path: [difference.left, difference.right] for difference in differences})
        return 1 if differences else 0
    for difference in differences:
        left, right = ("absent" if value is None else shown(value) for value in (difference.left, difference.right))
        print(f"{difference.path}: {left} -> {right}")
    return 1 if differences else 0


def _config_explain(args: argparse.Namespace) -> int:
    from nmoe.config import load
    from nmoe.config.fields import flat, table
    from nmoe.config.reference import explain
    from nmoe.config.toml import dotted, shown
    from nmoe.effects.terminal import say_json

    rows = explain(args.key)
    if args.config is None and args.overrides:
        raise InputError(f"config explain: expected a CONFIG before overrides, got none; write one behind {args.key}")
    if args.config is not None:
        loaded = load(args.config, os.environ, args.overrides)
        for path, value in flat(table(loaded.config)):
            if f"{dotted(path)}.".startswith(f"{args.key}."):
                rows.append((dotted(path), f"= {shown(value)}, from {loaded.sources[dotted(path)]}"))
    if args.json:
        say_json([{"what": label, "is": text} for label, text in rows if text])
        return 0
    width = max(len(label) for label, _ in rows)
    print("".join(f"{label:<{width}}  {text}\n" for label, text in rows if text), end="")
    return 0


def _config_reference(args: argparse.Namespace) -> int:
    from nmoe.config.reference import reference

    print(reference(), end="")
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    import json

    from nmoe.config import schema

    print(json.dumps(schema(), indent=2))
    return 0
