"""Which tiles a kernel uses for which sizes: tables shipped with nmoe, one a GPU generation; no tuning at run time.

`nmoe bench kernels --tune` measures and prints a table. A size without an entry uses the entry `default`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import attrs

from nmoe.effects.kernels.tile import Tile
from nmoe.errors import InputError

DEFAULT = "default"
"""Key of the entry for sizes that nobody measured."""


@attrs.frozen(kw_only=True)
class Entry:
    """What one op uses for one size."""

    tiles: Mapping[str, Tile]  # by the name of the product or pass
    group: int  # row tiles next to each other in the order of work
    size: str  # the key it was found under, "default" if there was none


@attrs.frozen(kw_only=True)
class Table:
    """All entries of a GPU generation."""

    where: str
    entries: Mapping[str, Mapping[str, Entry]]  # op, size


def load(capability: tuple[int, int]) -> Table:
    """The table of a compute capability.

    Raises:  InputError when the file is not a table.
    """
    path = Path(__file__).parent / f"sm_{capability[0]}{capability[1]}.toml"
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = {
            op: MappingProxyType({size: entry(size, fields) for size, fields in sizes.items()})
            for op, sizes in text.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path.name}: a table of tiles, got {type(error).__name__}: {error}; regenerate it with "
            "`nmoe bench kernels --tune`, or install nmoe anew"
        ) from error
    return Table(where=path.name, entries=MappingProxyType(entries))


def entry(size: str, fields: Mapping[str, object]) -> Entry:
    """One entry: `group`, and a tile [m, n, k, warps, stages] for each product."""
    tiles: dict[str, Tile] = {}
    for name, value in fields.items():
        if name == "group":
            continue
        if not (isinstance(value, list) and len(value) == 5 and all(type(each) is int for each in value)):
            raise ValueError(f"{name} of {size} is [m, n, k, warps, stages], not {value!r}")
        m, n, k, warps, stages = value
        tiles[name] = Tile(m=m, n=n, k=k, warps=warps, stages=stages)
    group = fields.get("group", 1)
    if type(group) is not int or group < 1:
        raise ValueError(f"group of {size} is a positive integer, not {group!r}")
    return Entry(tiles=MappingProxyType(tiles), group=group, size=size)


def find(table: Table, op: str, *sizes: int) -> Entry:
    """The entry of an op for these sizes, or the op's default one."""
    known = table.entries[op]
    return known.get("x".join(str(each) for each in sizes), known[DEFAULT])
