"""Levels of a sum over ranks, and which part of it each rank has: a function of their number alone."""

from __future__ import annotations


def level_sizes(size: int) -> list[int]:
    """Ranks of a group at each level of a sum over `size` of them: its prime factors, the smallest first.

    Neighbours sum first, so hosts whose ranks are a power of two sum within themselves before anything leaves them. The
    order of sums is a function of the number of ranks, not of hosts, and among pairs there is only one.
    """
    sizes: list[int] = []
    factor = 2
    while size > 1:
        while size % factor == 0:
            sizes.append(factor)
            size //= factor
        factor += 1
    return sizes


def part_of(rank: int, size: int) -> int:
    """Which of as many equal parts a rank has after a reduce-scatter: a level cuts what the one before left."""
    part = 0
    for level in level_sizes(size):
        part = part * level + rank % level
        rank //= level
    return part
