"""The one way a config is written, what makes two runs the same run, and how two configs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import attrs
import tomli_w

from nmoe.config.fields import flat, table, walk
from nmoe.config.sections import Config
from nmoe.config.toml import dotted


@attrs.frozen(kw_only=True)
class Difference:
    """A key that two configs do not agree on; None where one has no such key."""

    path: str
    left: Any
    right: Any


def dump(config: Config) -> str:
    """Canonical TOML: every key that has a value, in the order of the classes. Loading it gives `config` again."""
    return tomli_w.dumps(table(config))


def identity(config: Config) -> str:
    """SHA-256, in hex, of the canonical TOML of what makes a run this run: two configs with the same one may resume
    each other's runs."""
    return hashlib.sha256(tomli_w.dumps(_identity_table(config)).encode()).hexdigest()


def identity_values(config: Config) -> dict[str, Any]:
    """What makes a run this run: the values `identity` hashes, by dotted path, to be compared one by one."""
    return {dotted(path): value for path, value in flat(_identity_table(config))}


def _identity_table(config: Config) -> dict[str, Any]:
    """What makes a run this run. A schedule counts by its tokens, in whatever form they are written, and sign steps by
    their size, which another number of steps may move."""
    c = config.model
    if c.num_dense_layers < c.num_layers and c.moe.balance == "sign":
        c = attrs.evolve(c, moe=attrs.evolve(c.moe, bias_update_rate=config.sign_step()))
    return table(attrs.evolve(config, schedule=config.schedule_in_tokens(), model=c), lambda key: key.identity)


def identity_diff(stored: Mapping[str, Any], config: Config) -> tuple[Difference, ...]:
    """The keys on which what `identity_values` gave earlier and `config` do not agree, in the order they are written.

    A key that was not known then has its default there: a new key does not end old runs.
    """
    defaults = {dotted(path): key.default for path, key, _ in walk(config)}
    now = identity_values(config)
    return tuple(
        Difference(path=path, left=stored.get(path), right=now.get(path))
        for path in dict.fromkeys((*now, *stored))
        if now.get(path) != stored.get(path) and not (path not in stored and now[path] == defaults.get(path))
    )


def annotated(config: Config, sources: Mapping[str, str]) -> str:
    """TOML of one line a value, as `train.steps = 10  # default`.

    sources  what to say of each value, by dotted path
    """
    lines = [(dotted(path), tomli_w.dumps({"": value}).partition(" = ")[2]) for path, value in flat(table(config))]
    texts = [(path, f"{path} = {value.strip()}") for path, value in lines]
    width = max(len(text) for _, text in texts)
    return "".join(f"{text:<{width}}  # {sources[path]}\n" for path, text in texts)


def unset(config: Config) -> str:
    """Comments of one line a key that has no value: what `dump` leaves out, with what its absence means."""
    absent = [(dotted(path), key.doc) for path, key, value in walk(config) if value is None]
    width = max((len(path) for path, _ in absent), default=0)
    return "".join(f"# {path:<{width}}  not set: {doc}\n" for path, doc in absent)


def diff(left: Config, right: Config) -> tuple[Difference, ...]:
    """The keys two configs do not agree on, in the order they are written; those only `right` has come last."""
    one, other = dict(flat(table(left))), dict(flat(table(right)))
    return tuple(
        Difference(path=dotted(path), left=one.get(path), right=other.get(path))
        for path in dict.fromkeys((*one, *other))
        if one.get(path) != other.get(path)
    )
