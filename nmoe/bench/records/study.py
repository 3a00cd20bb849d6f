"""A study: one TOML that says which variants of a config are trained, with how many seeds, and what is compared.

    base = "quickstart"
    seeds = 3

    [set.train]
    steps = 350

    [variants.adamw]
    [variants.muon-2e-3]
    seeds = 1
    set.optim.dense = { optimizer = "muon", lr = 2e-3 }

    [comparisons.optimizer]
    baseline = "adamw"
    variants = ["muon-2e-3"]

As strict as a training config: no value is coerced, no key ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import tomli_w

from nmoe.config import Config, load_valid, preset
from nmoe.config.check import out_of_bounds
from nmoe.config.convert import Fault, structure
from nmoe.config.fields import flat, table
from nmoe.config.setting import setting
from nmoe.config.toml import dotted, literal, read, shown
from nmoe.errors import InputError

Keys = Mapping[str, Any]
"""Values by dotted key."""


@attrs.frozen(kw_only=True)
class Variant:
    """A config that is trained."""

    like: str | None = setting("variant whose keys it takes over; absent: those of the base", default=None)
    seeds: int | None = setting("seeds it is trained with; absent: those of the study", default=None, low=1, high=1000)
    best_of: tuple[str, ...] = setting("variants of which it is the one that seed 0 trains best", default=())
    time_of: str | None = setting(
        "variant whose time it trains for, by the steps a second that both have had; absent: its own steps",
        default=None,
    )


@attrs.frozen(kw_only=True)
class Comparison:
    """What is set side by side."""

    baseline: str = setting("variant the others are compared with")
    variants: tuple[str, ...] = setting("the others")
    fit: str | None = setting(
        "number of a run that a power law of bits a byte is fitted to: active_parameters, parameters or tokens; "
        "absent: none is fitted",
        default=None,
    )


@attrs.frozen(kw_only=True)
class Head:
    """A study without its tables."""

    base: str = setting("preset, or path of a config, relative to the study")
    seeds: int = setting("seeds a variant is trained with", default=3, low=1, high=1000)


@attrs.frozen(kw_only=True)
class Study:
    """A whole study. Comparisons are in the order of their value: what a budget has no room for is left out last first.

    values  of the base, by dotted key
    keys    that all variants have in the place of them; own: that each has in the place of those
    """

    base: Path
    values: Keys
    seeds: int
    keys: Keys
    own: Mapping[str, Keys]
    variants: Mapping[str, Variant]
    comparisons: Mapping[str, Comparison]


@attrs.frozen(kw_only=True)
class Job:
    """One training: a variant and a seed, and the keys they come to.

    key  hash of base, keys and seed; a result belongs to them, whatever the variant is called
    """

    variant: str
    seed: int
    keys: Keys
    key: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.variant}-s{self.seed}-{self.key[:8]}"


@attrs.frozen(kw_only=True)
class Result:
    """What a training came to.

    code                exit code of `nmoe run`; all that follows is of one that finished
    bits_per_byte       of held-out text, at the end
    step_s              time of a step, the middle of those that were logged
    experts             busiest expert over the mean, of the last quarter of the run; the worst layer's
    """

    key: str
    code: int
    seconds: float
    bits_per_byte: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    parameters: int = 0
    active_parameters: int = 0
    experts: float | None = None


Section = TypeVar("Section")

FITTED = ("active_parameters", "parameters", "tokens")


def load_study(path: Path, more: Sequence[str] = ()) -> Study:
    """The study of a TOML file.

    more     keys of all variants, which those of a variant replace

    Raises:  InputError with everything that is wrong, each with file, line and key.
    """
    document = read(path)
    tables = dict(document.tables)
    keys, faults = _keys(tables.pop("set", {}), ("set",))
    variants: dict[str, Variant] = {}
    own: dict[str, Keys] = {}
    comparisons: dict[str, Comparison] = {}
    for name, found in _named(tables.pop("variants", {}), "variants", faults):
        rest = dict(found)
        own[name], wrong = _keys(rest.pop("set", {}), ("variants", name, "set"))
        faults += wrong
        if (variant := _section(rest, Variant, ("variants", name), faults)) is not None:
            variants[name] = variant
    for name, found in _named(tables.pop("comparisons", {}), "comparisons", faults):
        if (comparison := _section(found, Comparison, ("comparisons", name), faults)) is not None:
            comparisons[name] = comparison
    head = _section(tables, Head, (), faults)
    faults += _unknown(variants, own, comparisons)
    if faults or head is None:
        raise InputError(*(document.fault(fault.path, fault.text) for fault in faults))
    base = preset.path_of(head.base) if head.base in preset.names() else path.parent / head.base
    given = {name.removeprefix("--"): literal(text) for name, _, text in (argument.partition("=") for argument in more)}
    study = Study(
        base=base,
        values={dotted(key): value for key, value in flat(table(load_valid(base, {}, ()).config))},
        seeds=head.seeds,
        keys={**keys, **given},
        own=own,
        variants=variants,
        comparisons=comparisons,
    )
    for name in variants:
        if (whole := keys_of(study, name, {})) is not None:
            config_of(study, job_of(study, name, whole, 0))
    return study


def keys_of(study: Study, name: str, results: Mapping[str, Result]) -> Keys | None:
    """The keys of a variant; None as long as what they depend on is not trained."""
    variant = study.variants[name]
    if variant.best_of:
        return _best(study, variant.best_of, results)
    keys = study.keys if variant.like is None else keys_of(study, variant.like, results)
    if keys is None:
        return None
    keys = {**keys, **study.own[name]}
    if variant.time_of is None:
        return keys
    other = keys_of(study, variant.time_of, results)
    return None if other is None else _for_time(study, keys, other, results)


def jobs(study: Study, results: Mapping[str, Result]) -> Iterator[Job]:
    """The trainings that have no result yet and are known, the most valuable first, each once.

    A seed of all variants of a comparison comes before the next seed, so that what a budget ends can be compared.
    """
    seen = set(results)
    for comparison in study.comparisons.values():
        names = list(_needed(study, (comparison.baseline, *comparison.variants)))
        most = max(study.variants[name].seeds or study.seeds for name in names)
        for seed in range(most):
            for name in names:
                if seed >= (study.variants[name].seeds or study.seeds):
                    continue
                keys = keys_of(study, name, results)
                if keys is None:
                    continue
                job = job_of(study, name, keys, seed)
                if job.key not in seen:
                    seen.add(job.key)
                    yield job


def job_of(study: Study, name: str, keys: Keys, seed: int) -> Job:
    """The training of a variant whose keys are known."""
    differ = {key: value for key, value in sorted(keys.items()) if study.values.get(key) != value}
    text = json.dumps([dict(study.values), differ, seed])
    return Job(variant=name, seed=seed, keys=differ, key=hashlib.sha256(text.encode()).hexdigest())


def config_of(study: Study, job: Job) -> Config:
    """The config of a training, without what the machine's environment would add.

    Raises:  InputError when its keys are wrong.
    """
    lines = [f"--{key}={tomli_w.dumps({'': value}).partition(' = ')[2].strip()}" for key, value in job.keys.items()]
    return load_valid(study.base, {}, (*lines, f"--run.seed={job.seed}")).config


def of_variant(study: Study, name: str, results: Mapping[str, Result]) -> dict[int, Result]:
    """What a variant's trainings came to, by seed."""
    keys = keys_of(study, name, results)
    if keys is None:
        return {}
    seeds = range(study.variants[name].seeds or study.seeds)
    found = {seed: results.get(job_of(study, name, keys, seed).key) for seed in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def _needed(study: Study, names: Sequence[str]) -> Iterator[str]:
    """The variants and what they depend on, each behind it."""
    seen: set[str] = set()
    for name in names:
        variant = study.variants[name]
        before = (*variant.best_of, *filter(None, (variant.time_of,)))
        for other in (*_needed(study, before), *_timed(variant), name):
            if other not in seen:
                seen.add(other)
                yield other


def _timed(variant: Variant) -> tuple[str, ...]:
    """Whose time of a step decides how long a variant trains, beside that of the variant it is compared with."""
    return (variant.like,) if variant.time_of is not None and variant.like is not None else ()


def _best(study: Study, names: Sequence[str], results: Mapping[str, Result]) -> Keys | None:
    """The keys of the variant that seed 0 trained best; None until all of them are trained."""
    found: list[tuple[bool, float, Keys]] = []
    for name in names:
        keys = keys_of(study, name, results)
        result = None if keys is None else results.get(job_of(study, name, keys, 0).key)
        if keys is None or result is None:
            return None
        found.append((result.code != 0, result.bits_per_byte, keys))
    return min(found, key=lambda entry: entry[:2])[2]


def _for_time(study: Study, keys: Keys, other: Keys, results: Mapping[str, Result]) -> Keys | None:
    """Keys with as many steps as take as long as the other variant takes; None until seed 0 of both is trained."""
    own, theirs = (results.get(job_of(study, "", each, 0).key) for each in (keys, other))
    if own is None or theirs is None:
        return None
    if own.code or theirs.code:
        return keys
    return {**keys, "train.steps": max(1, round(theirs.steps * theirs.step_s / own.step_s))}


def _named(tables: Any, at: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables under a name of the study's own. Writes: `faults`."""
    if not isinstance(tables, dict) or not tables:
        faults.append(Fault((at,), f"expected a table each, got {shown(tables)}; write [{at}.NAME]"))
        return
    for name, found in cast("dict[str, Any]", tables).items():
        if not re.fullmatch(r"[\w-]+", name):
            faults.append(Fault((at, name), "expected a name of letters, digits, _ and -, got others; rename it"))
        elif not isinstance(found, dict):
            faults.append(Fault((at, name), f"expected a table, got {shown(found)}; write [{at}.{name}]"))
        else:
            yield name, cast("dict[str, Any]", found)


def _section(
    found: dict[str, Any], section: type[Section], path: tuple[str, ...], faults: list[Fault]
) -> Section | None:
    """A section, or None where it is wrong. Writes: `faults`."""
    made = structure(found, section)
    if isinstance(made, tuple):
        faults += [Fault((*path, *fault.path), fault.text) for fault in made]
        return None
    faults += [Fault((*path, *key), text) for key, text in out_of_bounds(made)]
    return made


def _keys(tables: Any, path: tuple[str, ...]) -> tuple[Keys, list[Fault]]:
    """The values of a table `set`."""
    if not isinstance(tables, dict):
        return {}, [Fault(path, f"expected a table, got {shown(tables)}; write keys of a config in it")]
    return {dotted(key): value for key, value in flat(cast("dict[str, Any]", tables))}, []


def _unknown(
    variants: Mapping[str, Variant], own: Mapping[str, Keys], comparisons: Mapping[str, Comparison]
) -> list[Fault]:
    """Names that no variant has, variants that depend on themselves, and fits to a number that no run has."""
    faults: list[Fault] = []
    order = list(variants)
    for name, variant in variants.items():
        for key, others in (("like", variant.like), ("best_of", variant.best_of), ("time_of", variant.time_of)):
            for other in (others,) if isinstance(others, str) else others or ():
                if other not in order[: order.index(name)]:
                    text = f"expected a variant before it, got {shown(other)}; name or move one"
                    faults.append(Fault(("variants", name, key), text))
        if variant.best_of and (variant.like or variant.time_of or own[name]):
            text = "expected nothing beside it but seeds, got keys of its own; write them into those variants"
            faults.append(Fault(("variants", name, "best_of"), text))
    for name, comparison in comparisons.items():
        for key, others in (("baseline", (comparison.baseline,)), ("variants", comparison.variants)):
            for other in others:
                if other not in variants:
                    known = ", ".join(order) or "none"
                    text = f"expected one of {known}, got {shown(other)}; correct it"
                    faults.append(Fault(("comparisons", name, key), text))
        if comparison.fit is not None and comparison.fit not in FITTED:
            text = f"expected one of {', '.join(FITTED)}, got {shown(comparison.fit)}; choose one of them"
            faults.append(Fault(("comparisons", name, "fit"), text))
    return faults
