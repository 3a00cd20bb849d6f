"""A mixture: one TOML that says which prepared folders are read together, in which parts, and for how many tokens.

As strict as a training config: no value is coerced, no key ignored, everything wrong is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import attrs

from nmoe.config.check import out_of_bounds
from nmoe.config.convert import Fault, structure
from nmoe.config.sections import MOST_TOKENS
from nmoe.config.setting import setting
from nmoe.config.toml import read_kind, shown
from nmoe.errors import InputError

STAGES = ("pretrain", "mid", "long")
"""Stages, in the order they are read."""


@attrs.frozen(kw_only=True)
class Part:
    """One source. A weight says how much of a stage it is, relative to the others' weights; 0: it is never read."""

    path: str = setting("folder that holds manifest.json, relative to the mixture file")
    prepare: str | None = setting(
        "source TOML that `nmoe data prep` prepares into that folder, relative to the mixture file; absent: it is "
        "prepared already",
        default=None,
    )
    at_end: Literal["repeat", "stop"] = setting(
        "when all is read: again, in another order, or no more; what is missing comes from the others",
        default="repeat",
    )
    max_passes: float | None = setting(
        "passes over the source at most; absent: any number", default=None, above=0, high=1e9
    )
    pretrain: float | None = setting(
        "weight in this stage; absent: its number of tokens", default=None, low=0, high=1e18
    )
    mid: float | None = setting("weight in this stage; absent: its number of tokens", default=None, low=0, high=1e18)
    long: float | None = setting("weight in this stage; absent: its number of tokens", default=None, low=0, high=1e18)


@attrs.frozen(kw_only=True)
class Stage:
    """How weights become parts of a stage."""

    temperature: float = setting("weights count as weight**(1 / temperature)", default=1.0, low=0.01, high=100)
    max_share: float = setting("largest part of the stage that one source has", default=1.0, above=0, high=1)


@attrs.frozen(kw_only=True)
class Stages:
    """The stages, in the order they are read."""

    pretrain: Stage = setting("most of the tokens", default=attrs.Factory(Stage))
    mid: Stage = setting("after it", default=attrs.Factory(Stage))
    long: Stage = setting("last", default=attrs.Factory(Stage))


@attrs.frozen(kw_only=True)
class Flow:
    """How many tokens are read, and their parts by stage."""

    tokens: int | None = setting("tokens", unit="tokens", default=None, low=1, high=MOST_TOKENS)
    tokens_per_parameter: float | None = setting("tokens a parameter that is active", default=None, above=0, high=1e9)
    pretrain: float = setting("weight of this stage", default=1.0, low=0, high=1e18)
    mid: float = setting("weight of this stage", default=0.0, low=0, high=1e18)
    long: float = setting("weight of this stage", default=0.0, low=0, high=1e18)


@attrs.frozen(kw_only=True)
class Flows:
    """What one mixture is used for."""

    dev: Flow | None = setting("to see that it runs", default=None)
    research: Flow | None = setting("to try an idea", default=None)
    ablation: Flow | None = setting("to compare ideas", default=None)
    proxy: Flow | None = setting("to predict a large run from a small model", default=None)
    full_train: Flow | None = setting("the run that counts", default=None)


@attrs.frozen(kw_only=True)
class Rest:
    """A mixture file without its sources, whose names are the user's."""

    stages: Stages = setting("how weights become parts", default=attrs.Factory(Stages))
    flows: Flows = setting("how many tokens")


@attrs.frozen(kw_only=True)
class DataMixture:
    """A whole mixture file.

    parts  by name, in the order of the file
    """

    path: Path
    parts: Mapping[str, Part]
    stages: Stages
    flows: Flows


def load_mixture(path: Path) -> DataMixture:
    """The mixture of a TOML file, checked.

    Raises:  InputError with everything that is wrong, each with file, line and key.
    """
    document = read_kind(path, "sources")
    tables = dict(document.tables)
    parts, faults = _parts(tables.pop("sources", {}))
    rest = structure(tables, Rest)
    if isinstance(rest, tuple):
        faults += rest
    else:
        faults += [Fault(key, text) for key, text in out_of_bounds(rest)]
        faults += _flows(rest.flows)
    if faults or isinstance(rest, tuple):
        raise InputError(*(document.fault(fault.path, fault.text) for fault in faults))
    return DataMixture(path=path, parts=parts, stages=rest.stages, flows=rest.flows)


def _parts(tables: Any) -> tuple[dict[str, Part], list[Fault]]:
    """The sources, and what is wrong with them."""
    if not isinstance(tables, dict) or not tables:
        return {}, [Fault(("sources",), f"expected a table a source, got {shown(tables)}; write [sources.NAME]")]
    parts: dict[str, Part] = {}
    faults: list[Fault] = []
    for name, table in cast("dict[str, Any]", tables).items():
        if not name:
            # the order of an unnamed source is that of a source that stands alone
            faults.append(Fault(("sources",), 'expected a name for every source, got ""; write [sources.NAME]'))
        part = structure(table, Part)
        if isinstance(part, tuple):
            faults += [Fault(("sources", name, *fault.path), fault.text) for fault in part]
            continue
        faults += [Fault(("sources", name, *key), text) for key, text in out_of_bounds(part)]
        if part.at_end == "stop" and part.max_passes is not None and part.max_passes > 1:
            got = f"{part.max_passes:g}"
            text = f'expected at most 1 when at_end is "stop", got {got}; lower it or write at_end = "repeat"'
            faults.append(Fault(("sources", name, "max_passes"), text))
        parts[name] = part
    for stage in STAGES:
        weights = [getattr(part, stage) for part in parts.values()]
        # a number of tokens and a weight of somebody's choice do not compare
        if any(weights) and None in weights:
            without = next(name for name, part in parts.items() if getattr(part, stage) is None)
            text = "expected a weight for every source or for none, got none here; write one, 0 for never"
            faults.append(Fault(("sources", without, stage), text))
    return parts, faults


def _flows(flows: Flows) -> Iterator[Fault]:
    for field in attrs.fields(Flows):
        flow: Flow | None = getattr(flows, field.name)
        if flow is None:
            continue
        if (flow.tokens is None) == (flow.tokens_per_parameter is None):
            got = "none" if flow.tokens is None else "both"
            yield Fault(("flows", field.name), f"expected one of tokens and tokens_per_parameter, got {got}; write one")
        if not flow.pretrain + flow.mid + flow.long:
            yield Fault(("flows", field.name), "expected a stage of weight above 0, got none; raise one")
