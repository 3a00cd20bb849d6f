"""Nested tables to sections, strictly: no value is coerced, no key ignored, and every fault found at once."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar, cast

import attrs
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from nmoe.config.fields import KeyPath, every_key, is_table, keys, kind, kinds
from nmoe.config.toml import closest, dotted, shown

FP32_SMALLEST, FP32_LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Every number reaches a tensor in fp32 sooner or later, where 1e-46 is 0 and 1e39 is infinity."""

MOST_FAULTS = 100
"""Faults said at once: looking for what was meant by 10,000 unknown keys takes a minute."""

Section = TypeVar("Section")
Hook = Callable[[Any, Any], Any]


@attrs.frozen
class Fault:
    """Why a key cannot be converted: `expected <what>, got <value>; <what to do>`."""

    path: KeyPath
    text: str


class Mismatch(TypeError):
    """A value that does not fit.

    key  the key of the table being converted that is at fault, where it is not the table itself
    """

    def __init__(self, text: str, key: KeyPath = ()) -> None:
        super().__init__(text)
        self.key = key


def structure(tables: dict[str, Any], section: type[Section]) -> Section | tuple[Fault, ...]:
    """A section from nested tables, or what is wrong with them: all of it, up to `MOST_FAULTS`."""
    try:
        return _converter().structure(tables, section)
    except (ClassValidationError, Mismatch) as error:
        faults = tuple(islice(_faults(error, (), section, section), MOST_FAULTS + 1))
        if len(faults) > MOST_FAULTS:
            last = Fault(faults[-1].path, f"expected at most {MOST_FAULTS} faults, got more; fix those above first")
            return (*faults[:-1], last)
        return faults


def _converter() -> Converter:
    """The converter. A new one each time: it is quick to make, and nothing of it is shared."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for tp, hook in ((bool, _boolean), (int, _integer), (float, _number), (str, _string)):
        converter.register_structure_hook(tp, hook)
    converter.register_structure_hook_func(lambda tp: typing.get_origin(tp) is Literal, _choice)
    converter.register_structure_hook_func(lambda tp: tp == tuple[str, ...], _strings)
    converter.register_structure_hook_factory(is_table, _plain_or_tagged)
    converter.register_structure_hook_factory(lambda tp: len(kinds(tp)) > 1, _plain_or_tagged)
    return converter


def _refused(what: str, value: Any, remedy: str) -> Mismatch:
    if value in ("True", "False"):
        remedy = "TOML uses true/false"
    return Mismatch(f"expected {what}, got {shown(value)}; {remedy}")


def _boolean(value: Any, _: Any) -> bool:
    if type(value) is not bool:
        raise _refused("true or false", value, "TOML uses true/false")
    return value


def _integer(value: Any, _: Any) -> int:
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        raise _refused("an integer", value, f"write {int(value):_}")
    if type(value) is not int:
        raise _refused("an integer", value, _as_number(value) or "write a whole number without quotes")
    if not -(2**63) <= value < 2**63:
        raise _refused("an integer of 64 bits", value, "lower it")
    return value


def _as_number(value: Any) -> str | None:
    """How TOML writes the number that a text means: 1000 for "1,000", 0.001 for ".001"; None when it means none."""
    plain = value.strip().replace(",", "") if isinstance(value, str) and len(value) < 20 else ""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", plain):
        return None
    return f"write {int(plain) if plain.isdecimal() else float(plain)}"


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise _refused("a number", value, _as_number(value) or "write a number without quotes")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise _refused("an integer of 64 bits or a float", value, "lower it")
    if not math.isfinite(value):
        raise _refused("a finite number", value, "write one")
    if value and not FP32_SMALLEST <= abs(value) <= FP32_LARGEST:
        raise _refused(
            f"0 or a number between {FP32_SMALLEST:.1e} and {FP32_LARGEST:.1e}, as fp32 has", value, "write one"
        )
    return float(value)


def _string(value: Any, _: Any) -> str:
    if type(value) is not str:
        raise _refused("a string", value, "put it in quotes")
    if not all(character.isprintable() for character in value):
        raise _refused("a string of printable characters", value, "remove the others")
    return value


def _strings(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _refused("an array of strings", value, 'write ["..."]')
    return tuple(_string(item, str) for item in cast("list[Any]", value))


def _choice(value: Any, tp: Any) -> Any:
    choices = typing.get_args(tp)
    if type(value) is not str or value not in choices:
        raise _not_one_of(choices, value)
    return value


def _not_one_of(choices: Sequence[str], value: Any, key: KeyPath = ()) -> Mismatch:
    near = closest(value, choices) if isinstance(value, str) else None
    remedy = f"did you mean {shown(near)}?" if near else "choose one of them"
    return Mismatch(f"expected one of {', '.join(map(shown, choices))}, got {shown(value)}; {remedy}", key)


def _plain_or_tagged(tp: Any, converter: Converter) -> Hook:
    """The hook of a section class, or of a union of classes that `kind` tells apart."""
    choices = kinds(tp)
    sections: tuple[type, ...] = tuple(choices.values()) or (tp,)
    build: dict[type, Hook] = {
        section: make_dict_structure_fn(
            section,
            converter,
            _cattrs_forbid_extra_keys=True,
            _cattrs_detailed_validation=True,
            _cattrs_use_linecache=False,  # it would keep an entry for each converter ever made
        )
        for section in sections
    }

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise _refused("a table", value, "write its keys under a [table] header of their own")
        table = cast("dict[str, Any]", value)
        if not choices:
            return build[tp](table, tp)
        if "kind" not in table:
            raise Mismatch(f"expected one of {', '.join(map(shown, choices))}, got nothing; add it", ("kind",))
        chosen = table["kind"]
        if type(chosen) is not str or chosen not in choices:
            raise _not_one_of(tuple(choices), chosen, ("kind",))
        section = choices[chosen]
        return build[section]({name: value for name, value in table.items() if name != "kind"}, section)

    return hook


def _faults(error: Exception, path: KeyPath, section: type, root: type) -> Iterator[Fault]:
    """Every fault in what cattrs raised.

    section  the class being converted when it was raised
    root     the class of the whole config, to look for a key elsewhere
    """
    if isinstance(error, ClassValidationError):
        noted, others = error.group_exceptions()
        for inner, note in noted:
            yield from _faults(inner, (*path, note.name), error.cl, root)
        for inner in others:
            yield from _faults(inner, path, error.cl, root)
    elif isinstance(error, ForbiddenExtraKeysError):
        for name in sorted(error.extra_fields):
            yield Fault((*path, name), _unknown(name, path, section, root))
    elif isinstance(error, Mismatch):
        yield Fault((*path, *error.key), str(error))
    elif isinstance(error, KeyError):
        doc = next(key.doc for key in keys(section) if key.name == path[-1])
        yield Fault(path, f"expected a value, got nothing; add it ({doc})")
    else:
        raise error


def _unknown(name: str, path: KeyPath, section: type, root: type) -> str:
    """What to say of a key no section has: a near name in the same table, else elsewhere, else what there is."""
    of_kind = "" if kind(section) is None else f' of kind "{kind(section)}"'
    here = [key.name for key in keys(section)]
    everywhere = [other for other, _ in every_key(root) if other != (*path, name)]
    elsewhere = closest(name, [other[-1] for other in everywhere])
    if near := closest(name, here):
        hint = f"did you mean {dotted((*path, near))}?"
    elif synonym := closest(name, [dotted(other) for other in everywhere if len(other) > 1]):
        hint = f"did you mean {synonym}?"
    elif elsewhere:
        hint = f"did you mean {dotted(next(other for other in everywhere if other[-1] == elsewhere))}?"
    else:
        hint = f"known keys: {', '.join((*(['kind'] if of_kind else []), *here))}"
    return f"expected a known key{of_kind}, got {shown(name)}; {hint}"


def meant(word: str, root: type) -> str | None:
    """The key, by its dotted path, that a word without its tables probably means: `hidden_size`, `seq_len`; None: none
    or several."""
    paths = [dotted(path) for path, _ in every_key(root) if len(path) > 1]
    if (near := closest(word, paths)) is not None:
        return near
    last = closest(word, [path.rpartition(".")[2] for path in paths])
    named = list(dict.fromkeys(path for path in paths if last is not None and path.rpartition(".")[2] == last))
    return named[0] if len(named) == 1 else None
