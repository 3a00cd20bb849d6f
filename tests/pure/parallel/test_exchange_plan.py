"""The plan of an exchange against rows counted one by one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.pure.model import route
from nmoe.pure.parallel import exchange_plan as exchange


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    local=st.integers(1, 3),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_row_has_its_place_in_the_order_of_the_whole_batch(
    tokens: list[int], local: int, top_k: int, seed: int
) -> None:
    ranks = len(tokens)
    experts = ranks * local
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    chosen = [route.top_k(torch.rand(n, experts, generator=generator), top_k) for n in tokens]
    owners = [exchange.owners(each, ranks=ranks, experts=experts) for each in chosen]
    counts = torch.stack(
        [
            torch.cat([each.flatten().bincount(minlength=experts), to[to < ranks].bincount(minlength=ranks)])
            for each, to in zip(chosen, owners, strict=True)
        ]
    )
    # (expert, source, token) of each row, and its number at its source, by holder
    wanted: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    numbers: list[dict[tuple[int, int], int]] = []
    for source, each in enumerate(chosen):
        pairs = sorted((e, t) for t, row in enumerate(each.tolist()) for e in row)
        numbers.append({pair: number for number, pair in enumerate(pairs)})
        for e, t in pairs:
            wanted[e // local].append((e, source, t))
    most = max(map(len, wanted))
    plans = [exchange.plan(counts, rank=rank, capacity=most) for rank in range(ranks)]
    for holder, rows in enumerate(wanted):
        to, at = exchange.origins(plans[holder], len(rows))
        for row, (e, source, t) in enumerate(sorted(rows)):
            number = numbers[source][e, t]
            assert number + int(plans[source].shift[e]) == row
            assert (int(to[row]), int(at[row])) == (source, number)
        away = sum(source != holder for _, source, _ in rows)
        assert plans[holder].valid.tolist() == [tokens[holder] * top_k, int(counts[holder, experts:].sum()), len(rows)]
        assert int(plans[holder].crossing[2]) == away and int(plans[holder].needed) == 0
    # tokens that go to a rank: by source, in their order, each once
    for holder in range(ranks):
        at = 0
        for source, to in enumerate(owners):
            before = int(counts[source, experts : experts + holder].sum())
            assert before + int(plans[source].token_shift[holder]) == at
            at += int((to == holder).any(-1).sum())
    if most:
        for rank in range(ranks):
            over = exchange.plan(counts, rank=rank, capacity=most - 1)
            assert int(over.needed) == most
            assert all(not getattr(over, name).any() for name in ("shift", "token_shift", "count", "end", "valid"))
            assert all(not getattr(over, name).any() for name in ("origin_end", "origin_shift", "crossing"))
