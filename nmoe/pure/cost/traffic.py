"""How many bytes leave a GPU, and what has to be held to receive them.

Routing is taken as even: each set of experts a router may choose is as likely as another. (A router with groups keeps
those with two good experts, so that its tokens reach up to a tenth more ranks.) Only rows are counted; gates, indices
and counts add less than a hundredth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import attrs

from nmoe.pure.core.shape import expect_divisor
from nmoe.pure.cost.machines import Machine


@attrs.frozen(kw_only=True)
class Traffic:
    """Bytes one GPU sends, and receives."""

    inside: float  # to GPUs of its host
    between: float  # to other hosts


def distinct_ranks(*, num_experts: int, top_k: int, ranks: int, num_groups: int = 1, top_k_groups: int = 1) -> float:
    """Expected number of ranks a token has to reach, E[d].

    With E experts of which n = E * top_k_groups / num_groups are in the groups a token kept, a rank that holds m of
    those n is met with probability 1 - C(n - m, K) / C(n, K). Summed over the ranks, and over the ways to keep groups.
    Without groups that is R * (1 - C(E - E/R, K) / C(E, K)).

    ranks    R; rank r holds experts r * E/R to (r + 1) * E/R
    Raises:  ValueError when ranks or groups do not divide the number of experts.
    """
    expect_divisor("distinct_ranks: expected ranks", ranks, num_experts, "experts")
    expect_divisor("distinct_ranks: expected groups", num_groups, num_experts, "experts")
    open_to_it = num_experts // num_groups * top_k_groups
    met = 0
    for rank in range(ranks):
        for inside, ways in _kept(rank, num_experts, ranks, num_groups, top_k_groups):
            met += ways * (math.comb(open_to_it, top_k) - math.comb(open_to_it - inside, top_k))
    return met / (math.comb(num_groups, top_k_groups) * math.comb(open_to_it, top_k))


def _kept(rank: int, num_experts: int, ranks: int, num_groups: int, top_k_groups: int) -> Iterator[tuple[int, int]]:
    """How many of a rank's experts can be in kept groups, and how many ways to keep groups lead there."""
    share, size = num_experts // ranks, num_experts // num_groups
    first, last = rank * share, (rank + 1) * share
    overlaps = [min(last, (g + 1) * size) - max(first, g * size) for g in range(first // size, -(-last // size))]
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (groups kept, experts in them)
    for overlap in overlaps:
        ways += Counter({(kept + 1, inside + overlap): n for (kept, inside), n in ways.items()})
    for (kept, inside), n in ways.items():
        if kept <= top_k_groups:
            yield inside, n * math.comb(num_groups - len(overlaps), top_k_groups - kept)


def exchange(*, rows: float, row_bytes: int, ranks: int, ranks_per_host: int) -> Traffic:
    """Rows that every rank has for ranks chosen evenly, its own among them.

    rows            of one rank: tokens * K, or tokens * E[d] where a token goes once to each rank
    ranks_per_host  of these ranks
    """
    sent = rows * row_bytes / ranks
    near = min(ranks, ranks_per_host)
    return Traffic(inside=sent * (near - 1), between=sent * (ranks - near))


def forwarded(*, rows: float, row_bytes: int, ranks: int, ranks_per_host: int) -> float:
    """Bytes a GPU passes on inside its host of what others sent there once: all but those for itself.

    rows  of one rank, as in `exchange`
    """
    near = min(ranks, ranks_per_host)
    return rows * row_bytes / ranks * (ranks - near) * (near - 1) / near


def exchange_seconds(traffic: Traffic, machine: Machine) -> float:
    """Of one exchange of rows, its signal included: both links at once, the slower one counts."""
    return max(machine.push.seconds(traffic.inside), machine.network.seconds(traffic.between))


def collective(*, num_bytes: float, ranks_per_host: int, hosts: int) -> Traffic:
    """A reduce-scatter or an all-gather of an array of `num_bytes`, by rings.

    Each GPU sends all but its own share; where rings cross hosts there is one a GPU of the host, and each GPU's wire to
    the next host carries one ring.
    """
    ranks = ranks_per_host * hosts
    sent = num_bytes * (ranks - 1) / ranks
    crossing = sent / ranks_per_host if hosts > 1 else 0.0
    return Traffic(inside=sent - crossing, between=crossing)


def collective_seconds(traffic: Traffic, machine: Machine) -> float:
    """Of one collective that is cut into pieces, so that both links are busy at once."""
    return max(machine.collective.seconds(traffic.inside), machine.network.seconds(traffic.between))
