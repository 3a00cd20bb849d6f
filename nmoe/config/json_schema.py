"""The JSON Schema of a config file, for editors: generated from the section classes.

`properties` say what a key may hold. What a file has to hold is a condition of its own, since a file that extends
another may leave any key to it.
"""

from __future__ import annotations

import typing
from types import MappingProxyType
from typing import Any, Literal

from nmoe.config.fields import Key, is_table, keys, kind, kinds, members
from nmoe.config.sections import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PRIMITIVES = MappingProxyType({bool: "boolean", int: "integer", float: "number", str: "string"})


def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of a config file."""
    root = _section(Config)
    extends = {"type": "string", "description": "preset this file is laid over, or a file relative to it"}
    return {
        "$schema": DIALECT,
        "title": "nmoe config",
        **root,
        "properties": {"extends": extends, **root["properties"]},
        "if": {"required": ["extends"]},
        "else": _needed(Config),
        "$defs": {section.__name__: _section(section) for section in _sections(Config) if section is not Config},
    }


def _sections(section: type) -> dict[type, None]:
    """A section class and those of its tables, each once, in the order they are written."""
    sections: dict[type, None] = {section: None}
    for key in keys(section):
        for member in members(key.type):
            if is_table(member):
                sections |= _sections(member)
    return sections


def _section(section: type) -> dict[str, Any]:
    """What the keys of one table may hold."""
    name = kind(section)
    tag = {} if name is None else {"kind": {"const": name, "description": "chooses the table's keys"}}
    return {
        "type": "object",
        "description": (section.__doc__ or "").partition("\n")[0],
        "properties": tag | {key.name: _value(key) for key in keys(section)},
        "additionalProperties": False,
    }


def _value(key: Key) -> dict[str, Any]:
    """What one key may hold."""
    allowed = [_type(member) for member in members(key.type)]
    described: dict[str, Any] = {"description": f"{key.doc} [{key.unit}]" if key.unit else key.doc}
    described |= allowed[0] if len(allowed) == 1 else {"anyOf": allowed}
    bounds = {"minimum": key.low, "maximum": key.high, "exclusiveMinimum": key.above}
    described |= {word: bound for word, bound in bounds.items() if bound is not None}
    if type(key.default) in PRIMITIVES:
        described["default"] = key.default
    return described


def _type(tp: Any) -> dict[str, Any]:
    if is_table(tp):
        return {"$ref": f"#/$defs/{tp.__name__}"}
    if typing.get_origin(tp) is Literal:
        return {"enum": list(typing.get_args(tp))}
    return {"type": PRIMITIVES[tp]}


def _needed(section: type) -> dict[str, Any]:
    """Which keys of a table, and of the tables in it, have to be there."""
    inner = {key.name: needed for key in keys(section) if (needed := _needed_in(key.type))}
    required = [*(["kind"] if kind(section) else []), *(key.name for key in keys(section) if key.required())]
    return ({"required": required} if required else {}) | ({"properties": inner} if inner else {})


def _needed_in(tp: Any) -> dict[str, Any]:
    """Which keys have to be there in what one key holds; of tagged tables, by their kind."""
    tagged = kinds(tp)
    if len(tagged) > 1:
        by_kind = [
            {"if": {"properties": {"kind": {"const": name}}}, "then": _needed(section)}
            for name, section in tagged.items()
        ]
        return {"required": ["kind"], "allOf": by_kind}
    table = next((member for member in members(tp) if is_table(member)), None)
    return {} if table is None else _needed(table)
