"""Routing, load and balance against hand-computed cases and literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.pure.model.route import (
    balance,
    entropy,
    health,
    load,
    replay,
    report,
    route,
    route_tokens,
    scores,
    sequence_imbalance,
    top_k,
)


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random scores in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype) * 0.98 + 0.01


def imbalance(score: Tensor, num: int) -> Tensor:
    """With the experts the scores themselves favour."""
    return sequence_imbalance(score, top_k(score.detach(), num))


def test_scores_are_sigmoids_of_wide_logits() -> None:
    """In bf16 this logit, 1 + 2**-9, would round to 1."""
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    router = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.bfloat16)
    expected = [1 / (1 + math.exp(-1 - 2.0**-9)), 0.5]
    torch.testing.assert_close(scores(x, router), torch.tensor([expected]), rtol=1e-7, atol=0)


def test_two_of_four() -> None:
    score = torch.tensor([[0.1, 0.6, 0.2, 0.3], [0.8, 0.1, 0.1, 0.2]])
    routing = route(score, torch.zeros(4), top_k=2, scale=3.0)
    assert routing.expert.tolist() == [[1, 3], [0, 3]]
    torch.testing.assert_close(routing.weight, torch.tensor([[2.0, 1.0], [2.4, 0.6]]))


def test_bias_steers_selection_but_not_weights() -> None:
    score = torch.tensor([[0.1, 0.6, 0.2, 0.3]])
    routing = route(score, torch.tensor([1.0, 0.0, 0.0, -1.0]), top_k=2)
    assert routing.expert.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weight, torch.tensor([[1.0, 6.0]]) / 7)


def test_bias_gets_no_gradient_and_scores_get_it_through_the_weights_only() -> None:
    score = uniform(5, 6, seed=0, dtype=torch.float64).requires_grad_()
    bias = (0.3 * uniform(6, seed=1, dtype=torch.float64)).requires_grad_()
    routing = route(score, bias, top_k=3, scale=2.5)
    assert not routing.expert.requires_grad
    gates = uniform(5, 3, seed=2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((routing.weight * gates).sum(), score, retain_graph=True)
    assert torch.autograd.grad(routing.weight.sum(), bias, allow_unused=True) == (None,)
    chosen = torch.zeros(5, 6, dtype=torch.bool).scatter(1, routing.expert, True)
    assert gradient[~chosen].abs().max() == 0
    assert gradient[chosen].abs().min() > 0


def test_ties_go_to_the_lower_expert() -> None:
    score = torch.full((3, 64), 0.5)
    assert route(score, torch.zeros(64), top_k=3).expert.tolist() == [[0, 1, 2]] * 3
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [1, 3, 0]


def test_ties_go_to_the_lower_group() -> None:
    score = torch.full((1, 64), 0.5)
    routing = route(score, torch.zeros(64), top_k=10, num_groups=8, top_k_groups=2)
    assert routing.expert.tolist() == [list(range(10))]


def test_a_group_is_worth_its_two_best() -> None:
    """The best single expert is in the group that loses."""
    score = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.0]])
    routing = route(score, torch.zeros(6), top_k=2, num_groups=2, top_k_groups=1)
    assert routing.expert.tolist() == [[3, 4]]


def test_a_softmax_router_ranks_groups_by_their_best_and_weighs_by_shares_of_all() -> None:
    """The router of DeepSeek-V2; of two experts each group's best decides, though the other group's sum is larger."""
    logits = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.0]], dtype=torch.float64)
    routed = route_tokens(
        logits,
        torch.eye(6, dtype=torch.float64),
        torch.zeros(6),
        top_k=2,
        num_groups=2,
        top_k_groups=1,
        scale=3.0,
        normalize=False,
        softmax=True,
    )
    assert routed.routing.expert.tolist() == [[0, 1]]
    total = sum(math.exp(each) for each in logits[0].tolist())
    expected = [3 * math.exp(0.9) / total, 3 * math.exp(0.1) / total]
    torch.testing.assert_close(routed.routing.weight, torch.tensor([expected], dtype=torch.float64))


def test_no_excluded_group_however_low_the_kept_one() -> None:
    """Biases may be below any score; an excluded expert must still lose."""
    score = torch.full((1, 4), 0.5)
    routing = route(score, torch.tensor([-7.0, -8.0, -9.0, -9.0]), top_k=2, num_groups=2, top_k_groups=1)
    assert routing.expert.tolist() == [[0, 1]]


def chosen_by_loop(row: list[float], top_k: int, num_groups: int, top_k_groups: int) -> list[int]:
    """Experts of one token in the order of their biased scores, ties to the lower id."""
    size = len(row) // num_groups
    groups = [range(start, start + size) for start in range(0, len(row), size)]
    if num_groups > 1:
        worth = [torch.tensor(sorted((row[e] for e in group), reverse=True)[:2]).sum().item() for group in groups]
        groups = [groups[g] for g in sorted(range(num_groups), key=lambda g: (-worth[g], g))[:top_k_groups]]
    return sorted((e for group in groups for e in group), key=lambda e: (-row[e], e))[:top_k]


@given(st.data())
def test_routing_against_a_loop(data: st.DataObject) -> None:
    """Scores on a coarse grid, so that there are ties; sums of two are exact."""
    num_groups = data.draw(st.integers(1, 5))
    size = data.draw(st.integers(2, 5))
    top_k_groups = data.draw(st.integers(1, num_groups)) if num_groups > 1 else 1
    top_k = data.draw(st.integers(1, size * top_k_groups))
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    num_experts = num_groups * size
    score = torch.randint(1, 16, (6, num_experts), generator=generator) / 16
    bias = torch.randint(-8, 9, (num_experts,), generator=generator) / 16

    routing = route(score, bias, top_k=top_k, num_groups=num_groups, top_k_groups=top_k_groups, scale=scale)

    for token in range(6):
        expected = chosen_by_loop((score[token] + bias).tolist(), top_k, num_groups, top_k_groups)
        assert routing.expert[token].tolist() == expected
        total = sum(score[token, expert].item() for expert in expected)
        weights = [scale * score[token, expert].item() / total for expert in expected]
        assert routing.weight[token].tolist() == pytest.approx(weights, rel=1e-6)
    assert all(len(set(row)) == top_k for row in routing.expert.tolist())
    torch.testing.assert_close(routing.weight.sum(-1), torch.full((6,), scale))


@given(st.integers(0, 2**32 - 1), st.integers(0, 15))
def test_a_token_is_routed_whatever_its_neighbours_are(seed: int, token: int) -> None:
    """Bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 16, 8, generator=generator)
    router, bias = torch.randn(8, 12, generator=generator), torch.randn(12, generator=generator)
    other[token] = x[token]
    alone = scores(x, router)[token : token + 1]
    results = [route(scores(each, router), bias, top_k=4, num_groups=3, top_k_groups=2) for each in (x, other)]
    single = route(alone, bias, top_k=4, num_groups=3, top_k_groups=2)
    for routing in results:
        assert torch.equal(routing.expert[token], single.expert[0])
        assert torch.equal(routing.weight[token], single.weight[0])


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=20))
def test_load_counts(rows: list[list[int]]) -> None:
    expert = torch.tensor(rows)
    flat = [each for row in rows for each in row]
    assert load(expert, 6).tolist() == [flat.count(each) for each in range(6)]


def test_balance_moves_each_bias_by_one_step_towards_even_load() -> None:
    """Signs 1, -1, 1, 0 less their mean, 1/4."""
    bias = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    rows = torch.tensor([[0, 10, 2, 4], [3, 3, 3, 3]])
    moved = balance(bias, rows, rate=0.25)
    assert moved.tolist() == [[0.6875, 0.1875, 0.6875, 0.4375], [0.0, 0.0, 0.0, 0.0]]


@given(st.lists(st.integers(0, 40), min_size=2, max_size=9), st.integers(0, 2**16))
def test_balance_is_the_papers_but_for_a_common_shift(counts: list[int], seed: int) -> None:
    """Algorithm 1, an expert at a time: e = mean load - its load, bias + rate sign(e); only differences count."""
    bias = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = balance(bias, torch.tensor(counts), rate=0.125)
    expected: list[float] = []
    for own, count in zip(bias.tolist(), counts, strict=True):
        error = sum(counts) / len(counts) - count
        expected.append(own + 0.125 * (error > 0) - 0.125 * (error < 0))
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(moved - moved[0], wanted - wanted[0], rtol=0, atol=1e-12)
    assert moved.sum().item() == pytest.approx(bias.sum().item(), abs=1e-12)


def test_balance_of_loads_beyond_fp32_integers() -> None:
    """A step of 2**25 rows an expert: a difference of one part in 2**20 still counts."""
    rows = torch.full((4,), 2**25)
    rows[2] += 2**5
    assert balance(torch.zeros(4), rows, rate=1.0).sign().tolist() == [1.0, 1.0, -1.0, 1.0]


def test_health() -> None:
    """One row a layer: the worst expert over the mean, deviation over the mean, experts nobody chose."""
    seen = health(torch.tensor([[2, 2, 2, 2], [0, 8, 0, 0], [0, 1, 4, 3]]))
    assert seen.max_over_mean.tolist() == [1.0, 4.0, 2.0]
    assert seen.cv.tolist() == pytest.approx([0.0, math.sqrt(3), math.sqrt(2.5) / 2])
    assert seen.dead.tolist() == [0, 3, 1]


def imbalance_by_loop(score: list[list[float]], top_k: int) -> float:
    """DeepSeek-V3 equations 17 to 20 for one sequence, weight left out, one scalar at a time."""
    positions, experts = len(score), len(score[0])
    total = 0.0
    for i in range(experts):
        f = 0.0
        mean = 0.0
        for t in range(positions):
            top = sorted(range(experts), key=lambda e: (-score[t][e], e))[:top_k]
            f += experts / (top_k * positions) * (1.0 if i in top else 0.0)
            mean += score[t][i] / sum(score[t]) / positions
        total += f * mean
    return total


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 7), st.integers(2, 6), st.data())
def test_imbalance_is_the_papers(seed: int, sequences: int, positions: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    score = uniform(sequences, positions, experts, seed=seed, dtype=torch.float64)
    expected = sum(imbalance_by_loop(sequence, top_k) for sequence in score.tolist())
    assert imbalance(score, top_k).item() == pytest.approx(expected, rel=1e-12)


def test_imbalance_of_even_and_of_collapsed_scores() -> None:
    assert imbalance(torch.full((3, 8, 4), 0.3), 4).item() == pytest.approx(3.0)
    turns = torch.eye(4).repeat(2, 1)[None] * 0.9 + 0.05
    assert imbalance(turns, 1).item() == pytest.approx(1.0)
    collapsed = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 8, 4)
    assert imbalance(collapsed, 2).item() == pytest.approx(2.0)


def test_gradient_of_imbalance() -> None:
    """By finite differences; the choice is a constant between ties."""
    score = uniform(2, 5, 4, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda score: imbalance(score, 2), (score,))


def test_entropy() -> None:
    assert entropy(torch.full((3, 8), 0.2)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[1.0, 0.0], [0.3, 0.3]])).item() == pytest.approx(math.log(2) / 2)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
def test_weights_of_any_finite_logits(logits: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    """Weights sum to the scale; entropy, imbalance and the gradient are finite."""
    logit = torch.tensor([logits]).to(dtype).clamp(-3.0e38, 3.0e38).requires_grad_()
    check_finite(logit, top_k=data.draw(st.integers(1, len(logits))))


def check_finite(logit: Tensor, *, top_k: int) -> None:
    """What must hold of a router's results whatever its logits [N E] are."""
    score = torch.sigmoid(logit.float())
    routing = route(score, torch.zeros(score.shape[-1]), top_k=top_k, scale=2.5)
    torch.testing.assert_close(routing.weight.detach().sum(-1), torch.full((len(score),), 2.5), rtol=1e-6, atol=0)
    assert torch.isfinite(routing.weight).all()
    spread, uneven = entropy(score), imbalance(score[None], top_k)
    assert torch.isfinite(spread) and torch.isfinite(uneven)
    ramp = torch.arange(1.0, top_k + 1)
    (gradient,) = torch.autograd.grad((routing.weight * ramp).sum() + uneven, logit)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("logit", [-30.0, -44.0, -45.0, -80.0, -87.5, -88.8, -90.0, -103.0, -104.0, -3.0e38])
def test_weights_where_all_scores_vanish(logit: float) -> None:
    """Below -89 the sigmoid of fp32 is 0: the choices weigh the same, a router without an opinion."""
    logits = torch.full((2, 6), logit, requires_grad=True)
    check_finite(logits, top_k=3)
    score = torch.sigmoid(logits.detach())
    assert route(score, torch.zeros(6), top_k=3, scale=3.0).weight.tolist() == [[1.0] * 3] * 2
    assert entropy(score).item() == pytest.approx(math.log(6))
    assert imbalance(score[None], 3).item() == pytest.approx(1.0)


def test_one_score_among_vanished_ones_keeps_its_weight() -> None:
    score = torch.sigmoid(torch.tensor([[-40.0, -95.0, -100.0]]))
    assert route(score, torch.zeros(3), top_k=2).weight[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-20)


def test_weights_are_the_plain_quotient_bit_for_bit() -> None:
    """Down to the rule's threshold, so that no run changes."""
    generator = torch.Generator().manual_seed(3)
    score = torch.sigmoid(40 * torch.rand(500, 8, generator=generator) - 41)
    routing = route(score, torch.zeros(8), top_k=3, scale=2.446)
    chosen = score.gather(-1, routing.expert)
    assert torch.equal(routing.weight, 2.446 * chosen / chosen.sum(-1, keepdim=True))


def test_without_normalisation_a_weight_is_the_scaled_score() -> None:
    """With one choice its derivative is the score's; that of a normalised weight is zero and trains no router."""
    score = torch.tensor([[0.25, 0.5, 0.125]], requires_grad=True)
    routing = route(score, torch.zeros(3), top_k=1, scale=2.0, normalize=False)
    assert routing.weight.tolist() == [[1.0]]
    assert torch.autograd.grad(routing.weight.sum(), score)[0].tolist() == [[0.0, 2.0, 0.0]]
    again = replay(score, routing.expert, top_k=1, scale=2.0, normalize=False)
    assert again.weight.tolist() == [[1.0]]
    normalised = route(score, torch.zeros(3), top_k=1, scale=2.0)
    assert torch.autograd.grad(normalised.weight.sum(), score)[0].abs().max() == 0


def test_balance_does_not_shift_all_biases() -> None:
    """One busy expert of eight: uncentred, 1,000 steps of 0.01 add 7.5 to the mean."""
    bias = torch.zeros(2, 8)
    rows = torch.tensor([[100, 1, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3]])
    for _ in range(1000):
        bias = balance(bias, rows, rate=0.01)
    assert bias.mean(-1).abs().max() < 1e-3
    assert bias[0, 1] - bias[0, 0] == pytest.approx(20.0, rel=1e-4)
    assert bias[1].abs().max() == 0


def test_balance_sees_one_row_of_two_to_the_25() -> None:
    """In fp32 2**25 + 1 is 2**25."""
    rows = torch.full((4,), 2**25)
    rows[2] += 1
    assert balance(torch.zeros(4), rows, rate=1.0).sign().tolist() == [1.0, 1.0, -1.0, 1.0]


def test_a_report_has_the_gradient_of_the_imbalance_alone() -> None:
    score = uniform(2, 5, 4, seed=0).requires_grad_()
    favoured, bias = top_k(score.detach(), 2), torch.zeros(4)
    spread, uneven, margins = report(score, favoured, bias, favoured.flatten(0, 1), margins=False)
    assert uneven.requires_grad and not spread.requires_grad and margins.shape == (4, 0)
    assert report(score, favoured, bias, favoured.flatten(0, 1), margins=True)[2].sum() == 2 * 5 * 4
