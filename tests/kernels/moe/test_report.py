"""What is told of a router, by kernels, against `pure.route`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.moe import report
from nmoe.pure.model import route
from tests.kernels.truth import check, graded, normal

SHAPES = [(3, 37, 64, 4), (2, 100, 40, 3), (1, 5, 8, 2), (2, 70, 256, 8), (2, 300, 256, 8), (1, 1, 2, 1)]
"""Sequences, tokens of one, experts and choices: spans and columns that are not full, one that is; more spans than are
summed at once."""


def scores(sequences: int, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Those of a router; of one token in seven they are small."""
    drawn = torch.sigmoid(2 * normal(sequences, tokens, experts, seed=seed))
    drawn[:, ::7] *= 1e-3
    return drawn


def told(shape: tuple[int, int, int, int], score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of the largest scores, a bias that changes choices, and the choices."""
    bias = normal(shape[2], seed=1) / 8
    favoured, expert = route.top_k(score, shape[3]), route.top_k(score.flatten(0, 1) + bias, shape[3])
    assert shape[1] == 1 or not torch.equal(favoured.flatten(0, 1), expert)
    return favoured, bias, expert


def reported(which: Callable[..., Any], *rest: Tensor) -> Callable[[Tensor], Any]:
    """Entropy and imbalance of scores."""
    return lambda score: which(score, rest[0], rest[1].to(score.dtype), rest[2], margins=False)[:2]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Within fp32's rounding of each token's largest number: gradients of tokens lie 1e20 apart."""
    for ours, other in zip(found, wanted, strict=True):
        most = other.abs().amax(-1, keepdim=True) if other.ndim else other.abs()
        assert ((ours - other).abs() <= 2e-5 * most + 1e-8).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy_and_imbalance_are_as_near_the_truth(shape: tuple[int, int, int, int]) -> None:
    score = scores(*shape[:3])
    rest = told(shape, score)
    pulls = [torch.tensor(0.7)]
    plain = graded(reported(route.report, *rest), [score], pulls)
    truth = graded(reported(route.report, *rest), [score], pulls, torch.float64)
    check(graded(reported(report.report, *rest), [score], pulls), plain, truth, factor=2, steps=4)


@pytest.mark.parametrize("lower", [0.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_margins_are_counted_as_by_the_reference(shape: tuple[int, int, int, int], lower: float) -> None:
    """Beyond the range of the histogram too, with biased scores that are all below zero, and exactly."""
    score = scores(*shape[:3])
    favoured, bias, expert = told(shape, score)
    if shape[1] > 1:
        bias[0], bias[-1] = 2.5, -1.5
    bias = bias - lower
    expert = route.top_k(score.flatten(0, 1) + bias, shape[3])
    wanted = route.report(score, favoured, bias, expert, margins=True)[2]
    found = report.report(score, favoured, bias, expert, margins=True)[2]
    assert found.dtype is torch.int64 and torch.equal(found, wanted)
    assert report.report(score, favoured, bias, expert, margins=False)[2].shape == (shape[2], 0)


def test_scores_that_vanish_have_a_gradient() -> None:
    """All are zero, all but one, all are so small that their sum is filled up, to the half or almost whole."""
    score = scores(2, 9, 6)
    score[0, 1], score[0, 2, 1:], score[1, 3] = 0.0, 0.0, 1e-25 * score[1, 3]
    score[1, 4] *= route.VANISHING / 2 / score[1, 4].sum()
    rest = (route.top_k(score, 2), torch.zeros(6), route.top_k(score.flatten(0, 1), 2))
    plain, found = (
        graded(reported(which, *rest), [score], [torch.tensor(1.0)]) for which in (route.report, report.report)
    )
    close(found, plain)
    assert found[2].isfinite().all() and found[2][0, 1].abs().max() > 1e15


def test_what_is_no_number_is_told() -> None:
    score = scores(1, 5, 6)
    score[0, 2, 3] = float("nan")
    rest = (route.top_k(score, 2), torch.zeros(6), route.top_k(score.flatten(0, 1), 2))
    entropy, imbalance, _ = report.report(score, *rest, margins=True)
    assert entropy.isnan() and imbalance.isnan()
