"""What the section classes say of their keys, and ways to walk over them and their values."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import attrs

KeyPath = tuple[str, ...]
"""Where a key is: the names of its tables, then its own."""


@attrs.frozen(kw_only=True)
class Key:
    """One key of a section, as `setting` describes it."""

    name: str
    type: Any
    default: Any  # attrs.NOTHING when the key is required
    doc: str
    unit: str
    low: float | None
    high: float | None
    above: float | None
    identity: bool
    shapes: bool

    def required(self) -> bool:
        """Whether a config without this key is incomplete."""
        return self.default is attrs.NOTHING


def keys(section: type) -> tuple[Key, ...]:
    """The keys of a section class, in the order they are written."""
    hints = typing.get_type_hints(section)
    return tuple(
        Key(
            name=field.name,
            type=hints[field.name],
            default=field.default,
            doc=field.metadata.get("doc", ""),
            unit=field.metadata.get("unit", ""),
            low=field.metadata.get("low"),
            high=field.metadata.get("high"),
            above=field.metadata.get("above"),
            identity=field.metadata.get("identity", True),
            shapes=field.metadata.get("shapes", False),
        )
        for field in attrs.fields(section)
    )


def every_key(section: type, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Key]]:
    """All keys a section class can have, of every kind, with their paths."""
    for key in keys(section):
        yield (*path, key.name), key
        for member in members(key.type):
            if is_table(member):
                yield from every_key(member, (*path, key.name))


def is_table(tp: Any) -> bool:
    """Whether a type is a section class."""
    return isinstance(tp, type) and attrs.has(tp)


def members(tp: Any) -> tuple[Any, ...]:
    """The types a key's type allows, without None: TOML has no null, an absent key stands for it."""
    if typing.get_origin(tp) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(tp) if member is not types.NoneType)
    return (tp,)


def kind(section: type) -> str | None:
    """The value of `kind` in this section's table, None where the table has no such key."""
    return getattr(section, "kind", None)


def kinds(tp: Any) -> dict[str, type]:
    """The classes a key's table may become, by their `kind`; empty for any other key."""
    sections = (member for member in members(tp) if is_table(member))
    return {name: section for section in sections if (name := kind(section)) is not None}


def walk(section: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Key, Any]]:
    """Every key of a config and the tables in it, with its path and value; a table comes before its keys."""
    for key in keys(section.__class__):
        value = getattr(section, key.name)
        yield (*path, key.name), key, value
        if is_table(value.__class__):
            yield from walk(value, (*path, key.name))


def table(section: Any, keep: Callable[[Key], bool] = lambda key: True) -> dict[str, Any]:
    """A section as the TOML table it is written as: `kind` first, then its keys; None and empty tables are left out.

    keep  which keys belong; of a table that does not, no key does
    """
    name = kind(section.__class__)
    written: dict[str, Any] = {} if name is None else {"kind": name}
    for key in keys(section.__class__):
        value = getattr(section, key.name)
        if value is None or not keep(key):
            continue
        if not is_table(value.__class__):
            written[key.name] = value
        elif inner := table(value, keep):
            written[key.name] = inner
    return written


def flat(tables: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Paths and values of everything in nested tables that is no table, and of empty tables."""
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            yield from flat(typing.cast("dict[str, Any]", value), (*path, name))
        else:
            yield (*path, name), value
