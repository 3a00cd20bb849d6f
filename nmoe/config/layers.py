"""From files, environment and command line to one config, and where each of its values came from.

Later layers win over earlier ones:

    defaults of the classes  <  the files named by `extends`  <  the file  <  environment  <  command line

`extends = "base.toml"` stands at the top of a file, relative to it, or names a preset; a base may extend another.
`NMOE_TRAIN__STEPS=10` in the environment and `--train.steps=10` on the command line set one key; of the same key
twice, the last one holds. Their values are TOML literals, or bare strings where they are not TOML. Tables are merged
key by key, everything else is replaced; a table of another `kind` replaces the whole table below it, because other
keys belong to it, and a key in one form replaces the other forms of the same thing (`OTHER_FORMS`). An environment
variable without `__` after `NMOE_` is one of `OTHER_VARIABLES` or an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs

from nmoe.config import preset
from nmoe.config.canonical import Difference, diff
from nmoe.config.check import fitting, unrunnable, validate, validate_model
from nmoe.config.convert import structure
from nmoe.config.fields import KeyPath, every_key, flat, is_table, keys, members, table
from nmoe.config.secrets import masked
from nmoe.config.sections import OTHER_FORMS, Config, Model, Precision
from nmoe.config.toml import Document, closest, dotted, literal, read_kind, shown
from nmoe.errors import InputError, printable

DEFAULT = "default"
PREFIX = "NMOE_"
OTHER_VARIABLES = ("NMOE_HOME", "NMOE_HEARTBEATS")
"""Variables that are no keys of a config: where nmoe keeps its files, and what a launcher gives its ranks."""


@attrs.frozen(kw_only=True)
class Loaded:
    """A config, and where each value its canonical TOML holds came from.

    sources  "default", "configs/x.toml:12", "environment NMOE_TRAIN__STEPS", "command line --train.steps=10", "--fit",
             by dotted path
    fitted   what `fit` changed
    """

    config: Config
    sources: Mapping[str, str]
    fitted: tuple[Difference, ...] = ()


@attrs.frozen(kw_only=True)
class Layer:
    """Nested tables, and where the tables and values in them were written."""

    tables: dict[str, Any]
    where: dict[KeyPath, str]


def load(path: Path, environ: Mapping[str, str], overrides: Sequence[str]) -> Loaded:
    """The config of a file under its overrides: complete and of the right types, not yet checked by `validate`.

    environ    variables, of which those of the form NMOE_A__B count, and others that begin with NMOE_ are refused
    overrides  arguments of the form --a.b=value

    Raises:  InputError with everything that is wrong, each with its place.
    """
    layer = _laid_over(*_files(path), _laid_over(*_environment(environ)), _laid_over(*_command_line(overrides)))
    config = structure(layer.tables, Config)
    if isinstance(config, tuple):
        raise InputError(
            *(f"{_place(fault.path, layer.where)}: {dotted(fault.path)}: {fault.text}" for fault in config)
        )
    written = {key for key, _ in flat(layer.tables)}
    sources = {dotted(key): _place(key, layer.where) if key in written else DEFAULT for key, _ in flat(table(config))}
    return Loaded(config=config, sources=sources)


def load_valid(
    path: Path,
    environ: Mapping[str, str],
    overrides: Sequence[str],
    world: int | None = None,
    *,
    to_run: bool = False,
    fit: bool = False,
) -> Loaded:
    """As `load`, and checked by `validate`.

    world    ranks it has to fit; None: as many as the config is meant for
    to_run   whether `unrunnable` may have nothing against it either
    fit      whether batch and microbatch become the nearest that the ranks share evenly

    Raises:  InputError with everything that is wrong, each with its place.
    """
    loaded = load(path, environ, overrides)
    problems: list[str] = []
    world = loaded.config.parallel.ranks if world is None else world
    if fit and world > 0 and loaded.config.train.microbatch_size > 0:
        loaded = _fitted(loaded, world)
    for problem in (*validate(loaded.config, world), *(unrunnable(loaded.config, world) if to_run else ())):
        source = loaded.sources.get(problem.partition(":")[0], DEFAULT)
        problems.append(f"{path if source == DEFAULT else source}: {problem}")
    if problems:
        raise InputError(*problems)
    return loaded


def _fitted(loaded: Loaded, world: int) -> Loaded:
    """A config with the batch and microbatch that `world` ranks share evenly."""
    train = loaded.config.train
    changes = fitting(train, world)
    config = attrs.evolve(loaded.config, train=attrs.evolve(train, **changes))
    sources = {**loaded.sources, **{f"train.{key}": "--fit" for key in changes}}
    return Loaded(config=config, sources=sources, fitted=diff(loaded.config, config))


def load_model(path: Path) -> tuple[Model, Precision]:
    """The tables `model` and `precision` of a file, whatever else is in it.

    Raises:  InputError with everything that is wrong with them, each with its place.
    """
    layer = _laid_over(*_files(path))
    sections: list[Any] = []
    problems: list[str] = []
    for name, section in (("model", Model), ("precision", Precision)):
        made = structure(layer.tables.get(name, {}), section)
        faults = made if isinstance(made, tuple) else ()
        places = [((name, *fault.path), fault.text) for fault in faults]
        problems += [f"{_place(key, layer.where)}: {dotted(key)}: {text}" for key, text in places]
        sections.append(made)
    problems = problems or [f"{path}: {problem}" for problem in validate_model(sections[0])]
    if problems:
        raise InputError(*problems)
    return sections[0], sections[1]


def _laid_over(*layers: Layer) -> Layer:
    """One layer of several, later ones win. The keys of one layer belong together, in whatever order they are given."""
    tables: dict[str, Any] = {}
    where: dict[KeyPath, str] = {}
    for layer in layers:
        forms = tuple(_other_forms(layer.tables))
        for path in forms:
            tables = _without(tables, path)
        replaced = (*forms, *_of_another_kind(tables, layer.tables))
        kept = {key: place for key, place in where.items() if not any(key[: len(path)] == path for path in replaced)}
        tables, where = _merged(tables, layer.tables), kept | layer.where
    return Layer(tables=tables, where=where)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for name, value in over.items():
        below = under.get(name)
        both = isinstance(below, dict) and isinstance(value, dict) and not _differ_in_kind(below, value)
        result[name] = _merged(cast("dict[str, Any]", below), cast("dict[str, Any]", value)) if both else value
    return result


def _of_another_kind(under: dict[str, Any], over: dict[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """The tables that `over` replaces because it gives them another `kind`."""
    for name, value in over.items():
        below = under.get(name)
        if not isinstance(below, dict) or not isinstance(value, dict):
            continue
        if _differ_in_kind(below, value):
            yield (*path, name)
        else:
            inner = cast("dict[str, Any]", below), cast("dict[str, Any]", value)
            yield from _of_another_kind(*inner, (*path, name))


def _other_forms(over: dict[str, Any]) -> Iterator[KeyPath]:
    """The keys that `over` replaces because it has the same thing in another form."""
    for path, _ in flat(over):
        if len(path) == 2:
            yield from ((path[0], name) for name in OTHER_FORMS.get((path[0], path[1]), ()))


def _without(tables: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """Nested tables but the key at `path`, if there is one."""
    name, *rest = path
    inner = tables.get(name)
    if not rest:
        return {key: value for key, value in tables.items() if key != name}
    return tables | {name: _without(cast("dict[str, Any]", inner), tuple(rest))} if isinstance(inner, dict) else tables


def _differ_in_kind(below: dict[Any, Any], above: dict[Any, Any]) -> bool:
    return "kind" in below and "kind" in above and below["kind"] != above["kind"]


def _place(key: KeyPath, where: Mapping[KeyPath, str]) -> str:
    """Where a key was written, or else the first in it, or else the nearest table around it."""
    while key not in where:
        inner = next((place for inside, place in where.items() if inside[: len(key)] == key), None)
        if inner is not None:
            return inner
        key = key[:-1]
    return where[key]


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Layer]:
    """The bases, the lowest first, and the file.

    above  the files that extend this one
    """
    document = read_kind(path, "model")
    extends = document.tables.pop("extends", None)
    if extends is not None:
        place = f"{path}:{document.lines[('extends',)]}"
        if not isinstance(extends, str) or not extends.isprintable():
            raise InputError(
                f"{place}: extends: expected a preset or the path of a TOML file, got {shown(extends)}; put it in "
                "quotes"
            )
        try:
            base = path.parent / preset.resolve(extends)
        except InputError as error:
            raise InputError(*(f"{place}: extends: {problem}" for problem in error.problems)) from error
        if os.path.realpath(base) in map(os.path.realpath, (*above, path)):
            raise InputError(
                f"{place}: extends: expected a file that is not laid over this one, got {shown(extends)}; remove one "
                "of the two"
            )
        try:
            yield from _files(base, (*above, path))
        except InputError as error:
            raise InputError(*(f"{place}: extends: {problem}" for problem in error.problems)) from error
    yield _layer_of(path, document)


def _layer_of(path: Path, document: Document) -> Layer:
    name = printable(str(path))
    return Layer(
        tables=document.tables, where={(): name} | {key: f"{name}:{line}" for key, line in document.lines.items()}
    )


def _environment(environ: Mapping[str, str]) -> Iterator[Layer]:
    """One layer a variable, by name."""
    ours = sorted(name for name in environ if name.startswith(PREFIX) and name not in OTHER_VARIABLES)
    names = [name for name in ours if "__" in name.removeprefix(PREFIX)]
    if unknown := [name for name in ours if name not in names]:
        raise InputError(*map(_unknown_variable, unknown))
    if wrong := [name for name in names if name != name.upper()]:
        raise InputError(
            *(f"environment {name}: expected upper case, got {name}; write {name.upper()}" for name in wrong)
        )
    for name in names:
        key = tuple(name.removeprefix(PREFIX).lower().split("__"))
        yield _override(key, environ[name], f"environment {name}")


def _unknown_variable(name: str) -> str:
    """What to say of a variable that is neither a key nor one of `OTHER_VARIABLES`."""
    known = (*OTHER_VARIABLES, *(PREFIX + "__".join(path).upper() for path, _ in every_key(Config) if len(path) > 1))
    near = closest(name.upper(), known)
    remedy = f"did you mean {near}?" if near else "rename or unset it, keys are set as NMOE_SECTION__KEY"
    return f"environment {name}: expected NMOE_SECTION__KEY or {' or '.join(OTHER_VARIABLES)}, got {name}; {remedy}"


def _command_line(overrides: Sequence[str]) -> Iterator[Layer]:
    """One layer an argument, in order."""
    parsed = [(override, re.fullmatch(r"--([^=]+)=(.*)", override, re.DOTALL)) for override in overrides]
    if wrong := [override for override, match in parsed if match is None]:
        raise InputError(
            *(
                f"command line {override}: expected --section.key=value, got {override}; write it so"
                for override in wrong
            )
        )
    for override, match in parsed:
        if match is not None:
            yield _override(tuple(match[1].split(".")), match[2], f"command line {override}")


def _holds_text(key: KeyPath) -> bool:
    """Whether a key of the config may hold any text."""
    sections: list[Any] = [Config]
    for depth, name in enumerate(key, 1):
        types = [
            tp for section in sections for inner in keys(section) if inner.name == name for tp in members(inner.type)
        ]
        if depth == len(key):
            return str in types
        sections = [tp for tp in types if is_table(tp)]
    return False


def _override(key: KeyPath, text: str, where: str) -> Layer:
    """A layer of one key. One that holds text takes it as it is, quoted or not: the shell takes quotes away, and
    $SLURM_JOB_ID is a number."""
    value = literal(text)
    tables: dict[str, Any] = {key[-1]: text if not isinstance(value, str) and _holds_text(key) else value}
    for name in reversed(key[:-1]):
        tables = {name: tables}
    place = printable(masked(where))
    return Layer(tables=tables, where={key: place} | {path: place for path, _ in flat(tables)})
