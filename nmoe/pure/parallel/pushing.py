"""How many programs push rows into other ranks' memory."""

from __future__ import annotations

IN_FLIGHT = 2 << 20
"""Bytes on the way from a GPU at which its 18 NVLinks of the fourth generation are full. The number of peers does not
matter: the same links lead to all. Rows of 2048 go 16 KiB a program at once: 32 programs moved 278 to 341 GB/s, 132
347, 264 once 346 and once 322; rows of 7168 go 8 KiB at once: 132 moved 350, 264 355 (docs/log.md, 2026-11-28 and
2026-11-29)."""


def programs(*, rows: int, rows_at_once: int, bytes_at_once: int, most: int) -> int:
    """Programs that fill the links, or as many as there are, in equal shares where `rows` allows them.

    rows_at_once, bytes_at_once  that one program has on the way
    most                         that run at once on the device, or may be taken from it
    """
    turns = -(-rows // rows_at_once)
    wanted = max(1, min(turns, most, IN_FLIGHT // bytes_at_once))
    # with as many turns for the busiest program, fewer programs do: the last turn is then not that of a few
    return max(1, -(-turns // -(-turns // wanted))) if turns else 1
