"""Formulas against counting: routings are drawn or enumerated, rows and chunks are moved one by one."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.cost.machines import H200, Link
from nmoe.pure.cost.traffic import (
    Traffic,
    collective,
    collective_seconds,
    distinct_ranks,
    exchange,
    exchange_seconds,
    forwarded,
)
from nmoe.pure.model.route import route
from nmoe.pure.parallel.exchange_arena import expert_rows


@pytest.mark.parametrize(
    ("num_experts", "top_k", "ranks", "num_groups", "top_k_groups"),
    [
        (8, 2, 4, 1, 1),
        (8, 3, 8, 1, 1),
        (12, 4, 3, 1, 1),
        (12, 3, 6, 4, 2),  # a group on two ranks, unevenly: ranks of 2 in groups of 3
        (12, 3, 3, 4, 2),  # a rank holds parts of two groups
        (12, 2, 2, 6, 3),  # a rank holds three groups
        (12, 4, 4, 2, 1),
        (6, 6, 3, 1, 1),
    ],
)
def test_ranks_a_token_reaches_counted_over_every_choice(
    num_experts: int, top_k: int, ranks: int, num_groups: int, top_k_groups: int
) -> None:
    size, reached, cases = num_experts // num_groups, 0, 0
    for groups in itertools.combinations(range(num_groups), top_k_groups):
        open_to_it = [e for e in range(num_experts) if e // size in groups]
        for chosen in itertools.combinations(open_to_it, top_k):
            reached += len({e * ranks // num_experts for e in chosen})
            cases += 1
    counted = Fraction(reached, cases)
    found = distinct_ranks(
        num_experts=num_experts, top_k=top_k, ranks=ranks, num_groups=num_groups, top_k_groups=top_k_groups
    )
    assert found == float(counted)


@pytest.mark.parametrize(("ranks", "per_host"), [(4, 2), (8, 2), (8, 4), (6, 6)])
def test_rows_that_cross_once_to_a_host_counted_over_every_choice(ranks: int, per_host: int) -> None:
    """Each of a token's rows goes to its host's rank of the sender's number, which passes it on to the others there."""
    experts, top_k, hosts = 2 * ranks, 3, ranks // per_host
    crossing = passed_on = cases = 0
    for source in range(ranks):
        for chosen in itertools.combinations(range(experts), top_k):
            there = {expert // 2 for expert in chosen if expert // 2 // per_host != source // per_host}
            crossing += len({rank // per_host for rank in there})
            passed_on += len([rank for rank in there if rank % per_host != source % per_host])
            cases += 1
    reached = distinct_ranks(num_experts=experts, top_k=top_k, ranks=hosts)
    copies = distinct_ranks(num_experts=experts, top_k=top_k, ranks=ranks)
    sent = exchange(rows=reached, row_bytes=10, ranks=hosts, ranks_per_host=1).between
    assert sent == pytest.approx(10 * crossing / cases)
    found = forwarded(rows=copies, row_bytes=10, ranks=ranks, ranks_per_host=per_host)
    assert found == pytest.approx(10 * passed_on / cases)


@pytest.mark.parametrize(
    ("groups", "kept", "tolerance"),
    # even choices are what the router makes of even scores; with groups it keeps those with two good experts, so that a
    # token spreads further than an even choice among kept groups
    [(1, 1, 0.005), (8, 4, 0.1)],
)
@pytest.mark.parametrize("ranks", [4, 16, 64])
def test_ranks_a_token_reaches_with_the_real_router(ranks: int, groups: int, kept: int, tolerance: float) -> None:
    score = torch.rand(20_000, 64, generator=torch.Generator().manual_seed(1))
    expert = route(score, torch.zeros(64), top_k=6, num_groups=groups, top_k_groups=kept).expert
    held = torch.nn.functional.one_hot(expert * ranks // 64, ranks).amax(1)
    found = distinct_ranks(num_experts=64, top_k=6, ranks=ranks, num_groups=groups, top_k_groups=kept)
    drawn = held.sum(1).double().mean().item()
    assert found == pytest.approx(drawn, rel=tolerance)
    assert groups == 1 or found <= drawn


@pytest.mark.parametrize(("ranks", "per_host"), [(2, 2), (8, 8), (8, 4), (8, 1)])
@pytest.mark.parametrize("dedup", [False, True])
def test_bytes_of_an_exchange_counted_row_by_row(ranks: int, per_host: int, dedup: bool) -> None:
    tokens, top_k, num_experts, row_bytes = 4000, 4, 32, 64
    generator = torch.Generator().manual_seed(2)
    inside, between = [0] * ranks, [0] * ranks
    for rank in range(ranks):
        score = torch.rand(tokens, num_experts, generator=generator)
        owner = (route(score, torch.zeros(num_experts), top_k=top_k).expert * ranks // num_experts).tolist()
        for row in owner:
            for to in set(row) if dedup else row:
                if to != rank and to // per_host == rank // per_host:
                    inside[rank] += row_bytes
                elif to != rank:
                    between[rank] += row_bytes
    distinct = distinct_ranks(num_experts=num_experts, top_k=top_k, ranks=ranks)
    found = exchange(
        rows=tokens * (distinct if dedup else top_k), row_bytes=row_bytes, ranks=ranks, ranks_per_host=per_host
    )
    assert sum(inside) / ranks == pytest.approx(found.inside, rel=0.01)
    assert sum(between) / ranks == pytest.approx(found.between, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden", "num_experts", "ranks", "rows_mb", "rows_us", "dedup_mb", "dedup_us"),
    # the research notes' table: megabytes, and microseconds at 360 GB/s
    [
        (4096, 8, 2048, 64, 2, 67.1, 186, 16.7, 46),
        (8192, 8, 2048, 64, 2, 134.2, 373, 33.5, 93),
        (8192, 8, 2048, 64, 8, 234.9, 652, 159.5, 443),
        (8192, 8, 4096, 128, 2, 268.4, 746, 66.9, 186),
        (8192, 8, 4096, 128, 8, 469.8, 1305, 313.5, 871),
        (8192, 8, 7168, 256, 8, 822.1, 2284, 544.1, 1511),
    ],
)
def test_an_exchange_inside_a_host_is_that_of_the_notes(
    tokens: int,
    top_k: int,
    hidden: int,
    num_experts: int,
    ranks: int,
    rows_mb: float,
    rows_us: int,
    dedup_mb: float,
    dedup_us: int,
) -> None:
    distinct = distinct_ranks(num_experts=num_experts, top_k=top_k, ranks=ranks)
    link = Link(alpha_s=0.0, bytes_per_s=360e9, source="notes")
    for copies, megabytes, microseconds in ((top_k, rows_mb, rows_us), (distinct, dedup_mb, dedup_us)):
        sent = exchange(rows=tokens * copies, row_bytes=2 * hidden, ranks=ranks, ranks_per_host=8)
        assert sent.between == 0
        assert round(sent.inside / 1e6, 1) == megabytes
        assert round(link.seconds(sent.inside) * 1e6) == microseconds


@pytest.mark.parametrize(
    ("hosts", "pairs_mb", "pairs_ms", "ranks_mb", "ranks_ms"),
    # the same, between hosts of 8 at 45 GB/s a GPU
    [(2, 470, 10.4, 383, 8.5), (4, 705, 15.7, 640, 14.2), (8, 822, 18.3, 789, 17.5)],
)
def test_an_exchange_between_hosts_is_that_of_the_notes(
    hosts: int, pairs_mb: int, pairs_ms: float, ranks_mb: int, ranks_ms: float
) -> None:
    ranks = 8 * hosts
    distinct = distinct_ranks(num_experts=256, top_k=8, ranks=ranks)
    for copies, megabytes, milliseconds in ((8, pairs_mb, pairs_ms), (distinct, ranks_mb, ranks_ms)):
        sent = exchange(rows=8192 * copies, row_bytes=2 * 7168, ranks=ranks, ranks_per_host=8)
        assert round(sent.between / 1e6) == megabytes
        assert round(sent.between / 45e9 * 1e3, 1) == milliseconds


def test_an_exchange_takes_what_was_measured_on_two_gpus() -> None:
    """Rows of 4 KiB, all to the other GPU, with a barrier: 4,096 in 54.4 to 56.8 us, 16,384 in 196.3 to 201.4."""
    few, many = (exchange_seconds(Traffic(inside=rows * 4096, between=0.0), H200) for rows in (4096, 16384))
    assert 54.4e-6 < few < 56.8e-6 and 196.3e-6 < many < 201.4e-6


def test_the_slower_wire_counts() -> None:
    both = Traffic(inside=350e6, between=45e6)
    assert exchange_seconds(both, H200) == pytest.approx(400e-6 + 1e-3)
    assert exchange_seconds(Traffic(inside=3500e6, between=45e6), H200) == pytest.approx(7.5e-6 + 10e-3)


@pytest.mark.parametrize(("per_host", "hosts"), [(2, 1), (8, 1), (1, 4), (2, 3), (4, 2), (8, 4)])
def test_bytes_of_a_collective_counted_chunk_by_chunk(per_host: int, hosts: int) -> None:
    """An all-gather: as many rings as a host has GPUs, each leaving a host by another one of them."""
    ranks, num_bytes = per_host * hosts, 1_000_000
    inside, between = [Fraction()] * ranks, [Fraction()] * ranks
    for ring in range(per_host):
        order = [host * per_host + (ring + 1 + gpu) % per_host for host in range(hosts) for gpu in range(per_host)]
        chunk = Fraction(num_bytes, ranks * per_host)
        for _ in range(ranks - 1):
            for place, rank in enumerate(order):
                to = order[(place + 1) % ranks]
                (inside if to // per_host == rank // per_host else between)[rank] += chunk
    found = collective(num_bytes=num_bytes, ranks_per_host=per_host, hosts=hosts)
    assert [float(each) for each in inside] == pytest.approx([found.inside] * ranks)
    assert [float(each) for each in between] == pytest.approx([found.between] * ranks)


SHAPES = st.tuples(
    st.integers(1, 300), st.integers(1, 6), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 2), st.integers(1, 4)
)


@given(SHAPES)
def test_dedup_never_sends_more(shape: tuple[int, int, int, int, int]) -> None:
    tokens, top_k, ranks, experts_a_rank, per_host = shape
    num_experts = max(ranks * experts_a_rank, 16)
    distinct = distinct_ranks(num_experts=num_experts, top_k=top_k, ranks=ranks)
    assert 1 <= distinct <= min(top_k, ranks)
    once, each = (
        exchange(rows=tokens * copies, row_bytes=64, ranks=ranks, ranks_per_host=per_host)
        for copies in (distinct, top_k)
    )
    assert once.inside <= each.inside and once.between <= each.between
    if ranks == 1:
        assert once == each == Traffic(inside=0.0, between=0.0)


@given(SHAPES)
def test_more_tokens_choices_or_ranks_never_send_less(shape: tuple[int, int, int, int, int]) -> None:
    tokens, top_k, ranks, _, per_host = shape

    def sent(tokens: int, top_k: int, ranks: int) -> list[float]:
        distinct = distinct_ranks(num_experts=64, top_k=top_k, ranks=ranks)
        traffics = [
            exchange(rows=tokens * copies, row_bytes=64, ranks=ranks, ranks_per_host=per_host)
            for copies in (top_k, distinct)
        ]
        rows = [expert_rows(tokens=tokens, top_k=top_k, num_experts=64, ranks=ranks, capacity=2.0)]
        return [
            *(each.inside + each.between for each in traffics),
            *(exchange_seconds(t, H200) for t in traffics),
            *rows,
        ]

    least = sent(tokens, top_k, ranks)
    for more in (sent(tokens + 1, top_k, ranks), sent(tokens, top_k + 1, ranks)):
        assert all(a <= b * (1 + 1e-12) for a, b in zip(least, more, strict=True))
    wider = sent(tokens, top_k, 2 * ranks)
    assert all(a <= b * (1 + 1e-12) for a, b in zip(least[:2], wider[:2], strict=True))


@given(st.floats(1, 1e12), st.integers(1, 8), st.integers(1, 32))
def test_a_collective_of_one_says_nothing(num_bytes: float, per_host: int, hosts: int) -> None:
    found = collective(num_bytes=num_bytes, ranks_per_host=per_host, hosts=hosts)
    ranks = per_host * hosts
    assert found.inside + found.between == pytest.approx(num_bytes * (ranks - 1) / ranks)
    assert (collective_seconds(found, H200) == 0) == (ranks == 1)
