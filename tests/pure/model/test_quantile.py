"""Quantile balancing against hand-computed cases and exact quantiles of sorted margins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.pure.model.route import BINS, balance_quantile, load, margin_histogram, route

BIN = 2 / BINS


def uniform(*shape: int, seed: int) -> Tensor:
    """Random scores in (0.05, 0.95), busier experts to the right."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * torch.linspace(0.4, 0.9, shape[-1]) + 0.05


def quantile_by_sorting(score: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The smallest margin that at least top_k / E of an expert's margins do not exceed, one expert at a time."""
    tokens, experts = score.shape
    found: list[float] = []
    for expert in range(experts):
        margins: list[float] = []
        for token in range(tokens):
            biased = sorted((score[token] + bias).tolist(), reverse=True)
            margins.append((biased[top_k - 1] + biased[top_k]) / 2 - score[token, expert].item())
        found.append(sorted(margins)[-(-tokens * top_k // experts) - 1])
    return torch.tensor(found)


def test_two_experts_by_hand() -> None:
    """All four tokens choose expert 1, twice by 0.5 and twice by 0.25; an even load takes a bias between these."""
    score = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.25, 0.5], [0.25, 0.5]])
    bias = torch.zeros(2)
    expert = route(score, bias, top_k=1).expert
    assert expert.flatten().tolist() == [1, 1, 1, 1]
    margins = margin_histogram(score, bias, expert)
    # Cutoffs 0.5, 0.5, 0.375, 0.375: margins 0.25, 0.25, 0.125, 0.125, and the same below zero for expert 1.
    where = [(index, [place, margins[index, place].item()]) for index, place in margins.nonzero().tolist()]
    assert where == [(0, [576, 2]), (0, [640, 2]), (1, [384, 2]), (1, [448, 2])]
    # Two of four tokens: the upper ends of the bins of 0.125 and of -0.25, less their mean.
    moved = balance_quantile(bias, margins, top_k=1, decay=0.0)
    assert moved.tolist() == [0.1875, -0.1875]
    assert balance_quantile(bias, margins, top_k=1, decay=0.75).tolist() == [0.046875, -0.046875]
    assert load(route(score, moved, top_k=1).expert, 2).tolist() == [2, 2]


def test_an_old_bias_is_kept_in_part_and_centred() -> None:
    """Margins in one bin in the middle: quantiles BIN/2 for both experts, which centring takes away."""
    margins = torch.zeros(2, BINS, dtype=torch.int64)
    margins[:, BINS // 2] = 6
    moved = balance_quantile(torch.tensor([0.5, 0.25]), margins, top_k=1, decay=0.5)
    torch.testing.assert_close(moved, torch.tensor([0.0625, -0.0625]))


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(20, 60), st.data())
def test_quantiles_are_those_of_sorted_margins(seed: int, experts: int, tokens: int, data: st.DataObject) -> None:
    """To less than a bin, whatever the bias was."""
    top_k = data.draw(st.integers(1, experts - 1))
    score = uniform(tokens, experts, seed=seed)
    bias = 0.2 * (uniform(experts, seed=seed + 1) - 0.5)
    margins = margin_histogram(score, bias, route(score, bias, top_k=top_k).expert)
    assert (margins.sum(-1) == tokens).all()
    exact = quantile_by_sorting(score, bias, top_k)
    moved = balance_quantile(bias, margins, top_k=top_k, decay=0.0)
    assert ((moved - moved[0]) - (exact - exact[0])).abs().max() < 2 * BIN
    assert moved.sum().abs() < 1e-6


def test_repeated_quantiles_even_out_the_load_of_fixed_scores() -> None:
    """torch.quantile as the second implementation: after some steps the load is even, and the biases agree."""
    score = uniform(4096, 8, seed=3)
    ours = theirs = torch.zeros(8)
    assert load(route(score, ours, top_k=2).expert, 8).max() > 1.9 * 1024
    for _ in range(20):
        ours = balance_quantile(
            ours, margin_histogram(score, ours, route(score, ours, top_k=2).expert), top_k=2, decay=0.0
        )
        cutoff = (score + theirs).topk(3).values[:, 1:].mean(-1, keepdim=True)
        theirs = torch.quantile(cutoff - score, 2 / 8, dim=0)
        theirs = theirs - theirs.mean()
    counts = load(route(score, ours, top_k=2).expert, 8)
    assert counts.max() < 1.003 * 1024 and counts.min() > 0.997 * 1024
    assert (ours - theirs).abs().max() < 2 * BIN


def test_histograms_of_parts_add_up_in_any_order() -> None:
    score, bias = uniform(64, 6, seed=5), 0.1 * uniform(6, seed=6)
    whole = margin_histogram(score, bias, route(score, bias, top_k=2).expert)
    parts = [margin_histogram(part, bias, route(part, bias, top_k=2).expert) for part in score.split(16)]
    assert torch.equal(parts[3] + parts[1] + parts[0] + parts[2], whole)


def test_layers_are_balanced_each_by_its_own_margins() -> None:
    score = uniform(2, 64, 4, seed=7)
    bias = torch.zeros(2, 4)
    margins = torch.stack([margin_histogram(rows, bias[0], route(rows, bias[0], top_k=1).expert) for rows in score])
    moved = balance_quantile(bias, margins, top_k=1, decay=0.0)
    for layer in range(2):
        assert torch.equal(moved[layer], balance_quantile(bias[layer], margins[layer], top_k=1, decay=0.0))


@pytest.mark.parametrize(("bias", "place"), [(9.0, BINS - 1), (-9.0, 0)])
def test_margins_beyond_the_range_count_at_its_ends(bias: float, place: int) -> None:
    """One token, scores of 0.5, cutoff 0.5 + bias / 2: both margins are bias / 2."""
    both = torch.tensor([bias, 0.0])
    score = torch.full((1, 2), 0.5)
    margins = margin_histogram(score, both, route(score, both, top_k=1).expert)
    assert margins.nonzero().tolist() == [[0, place], [1, place]]


def test_margins_of_scores_that_are_not_numbers_stay_in_the_table() -> None:
    """Such a step is skipped; until that is decided, nothing may be written outside."""
    margins = margin_histogram(torch.full((3, 4), float("nan")), torch.zeros(4), torch.zeros(3, 1, dtype=torch.int64))
    assert margins.sum(-1).tolist() == [3, 3, 3, 3]


def test_margins_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"balance_quantile: expected margins of shape \[4, 1024\], got \[4, 8\]"):
        balance_quantile(torch.zeros(4), torch.ones(4, 8, dtype=torch.int64), top_k=1, decay=0.0)
