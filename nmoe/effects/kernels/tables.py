"""Tile tables: which block sizes a kernel uses for which sizes, one TOML file a GPU generation; no tuning at run time.

`nmoe bench kernels --tune` measures and prints entries. A size without an entry takes the entry `default`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.errors import InputError

DEFAULT = "default"
"""Key of the entry for sizes that have none of their own."""


@attrs.frozen(kw_only=True)
class GemmTile:
    """Block sizes and launch options of one grouped GEMM: out[m, n] is a sum over k."""

    block_m: int  # rows of the output a program makes; of a weight gradient its first axis
    block_n: int  # columns of the output a program makes
    block_k: int  # of the summed axis, a step
    num_warps: int
    num_stages: int


@attrs.frozen(kw_only=True)
class AttentionTile:
    """Block sizes and launch options of one attention kernel."""

    block_m: int  # queries a step; where a program of `gqa` owns queries, queries times heads
    block_n: int  # keys a step
    heads: int  # heads whose programs run side by side, longest first, so that their keys stay in the L2 cache
    num_warps: int
    num_stages: int


@attrs.frozen(kw_only=True)
class DeltaTile:
    """Block size and launch options of one kernel of the chunked delta rule."""

    values: int  # channels of a head that a program owns, or takes a step
    num_warps: int
    num_stages: int


@attrs.frozen(kw_only=True)
class SparseTile:
    """Block sizes and launch options of one kernel of sparse attention; 1 is what it does not cut up."""

    block_m: int = (
        1  # heads of a query a step or program; of the indexer's scores queries, of `nsa` queries times heads
    )
    block_n: int = 1  # keys a step or program
    block_k: int = 1  # channels a step or program
    num_warps: int
    num_stages: int


Tile = GemmTile | AttentionTile | DeltaTile | SparseTile

RECORDS: Mapping[str, type[Tile]] = MappingProxyType(
    {
        "moe": GemmTile,
        "mla": AttentionTile,
        "gqa": AttentionTile,
        "kda": DeltaTile,
        "dsa": SparseTile,
        "dsa_dense": SparseTile,
        "nsa": SparseTile,
    }
)
"""The record of a tile, by op; attention goes by its kind, and by its stage where that has kernels of its own."""


@attrs.frozen(kw_only=True)
class Entry:
    """What one op uses for one size."""

    tiles: Mapping[str, Any]  # name of the GEMM or pass -> the op's record
    group: int  # row tiles next to each other in the order of work
    measured: bool  # on a GPU of this generation, for this size
    size: str  # the key it stands under, "default" if the size has none


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
            op: MappingProxyType({size: entry(RECORDS[op], size, fields) for size, fields in sizes.items()})
            for op, sizes in text.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path.name}: expected a table of tiles, got {type(error).__name__}: {error}; regenerate it with "
            "`nmoe bench kernels --tune`, or install nmoe anew"
        ) from error
    return Table(where=path.name, entries=MappingProxyType(entries))


def entry(record: type[Tile], size: str, fields: Mapping[str, Any]) -> Entry:
    """One entry of a table.

    fields  `measured`; `group`, 1 if absent; all others are tiles, by their fields' names
    Raises:  ValueError, TypeError or KeyError for another form.
    """
    measured, group = fields["measured"], fields.get("group", 1)
    if type(measured) is not bool:
        raise ValueError(f"measured of {size}: expected true or false, got {measured!r}")
    if type(group) is not int or group < 1:
        raise ValueError(f"group of {size}: expected a positive integer, got {group!r}")
    tiles = {name: value for name, value in fields.items() if name not in ("measured", "group")}
    for name, tile in tiles.items():
        if any(type(value) is not int or value < 1 for value in tile.values()):
            raise ValueError(f"{name} of {size}: expected positive integers, got {tile!r}")
    records = {name: record(**tile) for name, tile in tiles.items()}
    return Entry(tiles=MappingProxyType(records), group=group, measured=measured, size=size)


def find(table: Table, op: str, *sizes: int) -> Entry:
    """The entry of an op for these sizes, or the op's default one."""
    known = table.entries[op]
    return known.get("x".join(map(str, sizes)), known[DEFAULT])
