"""Where every row of an expert-parallel mixture goes, from counts that all ranks know; no row says where it is from.

A rank holds the experts `rank * E / W` and the next ones. A *pair* is a token and one of its choices, a *row* a pair
where its expert is held. The pairs of a rank are numbered by expert and, within one, by token; the rows of a rank by
expert and, within one, by source rank and token, which is the order of the tokens of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_divisor, expect_member
from nmoe.pure.core.tree import record


@record
class Plan:
    """What one rank needs to know of an exchange. All zero where some rank would have to hold too much."""

    shift: Tensor  # [E] row of a pair, less its number; by its expert
    token_shift: Tensor  # [W] place of a token in a landing buffer, less its number among those sent there; by rank
    count: Tensor  # [E/W] rows of each expert held here
    end: Tensor  # [E/W] one past its last row
    origin_end: Tensor  # [E/W·W] one past the last row of each expert held here and, within one, each source
    origin_shift: Tensor  # [E/W·W] number of the pair at its source, less its row here
    valid: Tensor  # [3] pairs of this rank, its tokens' places in landing buffers, rows held here
    crossing: Tensor  # [3] of those, what crosses to another rank: pairs, places, and rows that came from another rank
    needed: Tensor  # 0-d, 0, or the most rows a rank would have to hold where it cannot


def owners(expert: Tensor, *, ranks: int, experts: int) -> Tensor:
    """For each choice of a token the rank that holds it, and `ranks` where an earlier choice goes to that rank already.

    expert   [N K]
    returns  [N K] i64
    Raises:  ValueError when `ranks` does not divide the number of experts.
    """
    expect_divisor("owners: expected ranks", ranks, experts, "experts")
    owner = expert // (experts // ranks)
    earlier = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(-1)
    return owner.masked_fill(earlier, ranks)


def plan(counts: Tensor, *, rank: int, capacity: int) -> Plan:
    """Turn what every rank sends into where this rank's rows go and where those it holds came from.

    counts    [W E+W]   of each rank its pairs for each expert, then its tokens for each rank
    capacity  rows a rank can hold
    Raises:   ValueError for a rank that is not one of them, or when the ranks do not divide the experts.
    """
    counts = counts.long()
    ranks = counts.shape[0]
    expect_divisor("plan: expected ranks", ranks, counts.shape[1] - ranks, "experts of the counts")
    expect_member("plan: expected a rank", rank, ranks)
    pairs, tokens = counts[:, :-ranks], counts[:, -ranks:]
    local = pairs.shape[1] // ranks
    total = pairs.sum(0)  # [E]
    held = total.unflatten(0, (ranks, local))
    most = held.sum(1).amax()
    fits = most <= capacity
    start = (held.cumsum(1) - held).flatten()  # first row of each expert at its holder
    base = start + pairs.cumsum(0) - pairs  # [W E] first row of each source's run
    number = pairs.cumsum(1) - pairs  # [W E] number of the first pair of each run, at its source
    mine = slice(rank * local, (rank + 1) * local)
    token_number = tokens.cumsum(1) - tokens
    token_base = tokens.cumsum(0) - tokens
    runs, here = pairs[:, mine].T, base[:, mine].T  # [E/W W]
    valid = torch.stack([pairs[rank].sum(), tokens[rank].sum(), total[mine].sum()])
    stays = torch.stack([pairs[rank, mine].sum(), tokens[rank, rank], pairs[rank, mine].sum()])
    return Plan(
        (base[rank] - number[rank]) * fits,
        (token_base[rank] - token_number[rank]) * fits,
        total[mine] * fits,
        total[mine].cumsum(0) * fits,
        ((here + runs) * fits).flatten(),
        ((number[:, mine].T - here) * fits).flatten(),
        valid * fits,
        (valid - stays) * fits,
        most * ~fits,
    )


def origins(p: Plan, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where each row came from: source rank and its number among that rank's pairs.

    num_rows  rows to tell of; those that are held are the first
    returns   [P], [P]
    """
    row = p.origin_end.new_ones(num_rows).cumsum(0) - 1
    run = (p.origin_end[None, :] <= row[:, None]).sum(1).clamp(max=p.origin_end.shape[0] - 1)
    ranks = p.origin_end.shape[0] // p.count.shape[0]
    return run % ranks, row + p.origin_shift[run]
