"""What the section classes say of each key, for a person: the page docs/config.md, and one key alone."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Literal

import attrs

from nmoe.config.fields import Key, KeyPath, is_table, keys, kind, members
from nmoe.config.sections import Config
from nmoe.config.toml import closest, dotted, shown
from nmoe.errors import InputError

TYPES = MappingProxyType({bool: "true or false", int: "integer", float: "number", str: "string"})

HEAD = """# Config reference

Every key of a config file, from the section classes (`nmoe/config/sections.py`). `nmoe config explain KEY` prints one
of them, `nmoe config show CONFIG --sources` the values of a config and where each comes from. This page is generated:
`nmoe config reference > docs/config.md`.

A key is set in the file, as `NMOE_TRAIN__STEPS=10` in the environment, or as `--train.steps=10` on the command line;
later ones win. A table of another `kind` replaces the whole table below it, and `schedule.decay` the `hold_tokens` and
`decay_tokens` below it: lengths of the schedule are tokens, or shares of the run. `extends = "base.toml"` at
the top of a file lays it over another one, relative to it, and `extends = "quickstart"` over a preset.

On resume: `free`, the next start may have another value; `accept`, only with `--accept KEY`; `fixed`, never, because
the tensors have other shapes or dtypes.
"""


@attrs.frozen(kw_only=True)
class Table:
    """A table of a config: its path, and the class of its keys; of one with a `kind` there are several."""

    path: KeyPath
    section: type

    def title(self) -> str:
        """Its header, with its kind."""
        chosen = kind(self.section)
        return f"[{dotted(self.path)}]" + ("" if chosen is None else f' kind = "{chosen}"')

    def plain_keys(self) -> tuple[Key, ...]:
        """Its keys that are no tables."""
        return tuple(key for key in keys(self.section) if not any(map(is_table, members(key.type))))


def tables(section: type = Config, path: KeyPath = ()) -> Iterator[Table]:
    """Every table a config can have, of every kind, in the order they are written."""
    for key in keys(section):
        for member in filter(is_table, members(key.type)):
            yield Table(path=(*path, key.name), section=member)
            yield from tables(member, (*path, key.name))


def reference() -> str:
    """The reference page, in Markdown."""
    return "\n".join((HEAD, *(_page(table) for table in tables() if not _again(table))))


def _again(table: Table) -> bool:
    """Whether a table is of a kind that the page has already: those of a mixed attention are the attentions."""
    return table.path[:2] == ("model", "attention") and len(table.path) > 2 and table.path[2] in ("a", "b", "c")


def explain(name: str) -> list[tuple[str, str]]:
    """What there is to say of a key, of each kind of its table, or of a table: pairs of a label and a text.

    Raises:  InputError for a key that no section has.
    """
    lines: list[tuple[str, str]] = []
    names: list[str] = []
    for table in tables():
        where = dotted(table.path)
        names += [where, *(f"{where}.{key.name}" for key in table.plain_keys())]
        if name == where:
            lines.append((table.title(), _about(table.section)))
            lines += [(f"{where}.{key.name}", key.doc) for key in table.plain_keys()]
        for key in table.plain_keys():
            if name == f"{where}.{key.name}":
                lines += [(name, key.doc), ("table", table.title()), *zip(LABELS, _facts(key), strict=True)]
    if not lines:
        last = closest(name.rpartition(".")[2], [other.rpartition(".")[2] for other in names])
        near = closest(name.rpartition(".")[2], names) or closest(name, names)
        near = near or next((other for other in names if other.rpartition(".")[2] == last), None)
        remedy = f"did you mean {near}?" if near else "every key is in docs/config.md"
        raise InputError(f"{name}: expected a key of a config, got {shown(name)}; {remedy}")
    return lines


LABELS = ("type", "default", "unit", "bounds", "on resume")


def _facts(key: Key) -> tuple[str, ...]:
    """Type, default, unit, bounds of a key, and whether it may change on resume."""
    types = " or ".join(_type(member) for member in members(key.type))
    default = "required" if key.required() else "absent" if key.default is None else shown(key.default)
    on_resume = "fixed" if key.shapes else "accept" if key.identity else "free"
    return types, default, key.unit, _bounds(key), on_resume


def _page(table: Table) -> str:
    """A table of the page."""
    rows = [(f"`{key.name}`", *_facts(key), key.doc) for key in table.plain_keys()]
    if (chosen := kind(table.section)) is not None:
        rows.insert(0, ("`kind`", f'"{chosen}"', "required", "", "", "accept", "chooses the table's keys"))
    lines = [f"## `{table.title()}`", "", _about(table.section), ""]
    if rows:
        lines += ["| key | type | default | unit | bounds | on resume | meaning |", "|---|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _about(section: type) -> str:
    return (section.__doc__ or "").partition("\n")[0]


def _type(tp: Any) -> str:
    if typing.get_origin(tp) is Literal:
        return ", ".join(map(shown, typing.get_args(tp)))
    return TYPES[tp]


def _bounds(key: Key) -> str:
    low = f"above {_number(key.above)}" if key.above is not None else None if key.low is None else _number(key.low)
    high = None if key.high is None else _number(key.high)
    if low is None or high is None:
        return f"at least {low}" if low is not None else "" if high is None else f"at most {high}"
    return f"{low} to {high}"


def _number(value: float) -> str:
    """`value` as TOML reads it, with groups of digits."""
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"
