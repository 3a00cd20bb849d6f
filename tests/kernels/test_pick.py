"""The most likely token against `decode.pick`; interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels import pick
from nmoe.pure.model import decode
from nmoe.pure.model.decode import Sampling
from tests.kernels.truth import normal


def right(logits: Tensor, vocab: int, scale: float) -> Tensor:
    return decode.pick(logits[:, :vocab].float() * scale, torch.zeros(len(logits)), Sampling())


@pytest.mark.parametrize("vocab", [1, 7, 2048, 5000])
def test_the_largest_logit_is_chosen(vocab: int) -> None:
    """Many are equal in fp16, all may be negative, and the largest of all is beyond the vocabulary."""
    logits = torch.cat((normal(3, vocab, dtype=torch.float16).round(decimals=1), torch.full((3, 5), 9.0).half()), 1)
    logits[1] = -logits[1].abs() - 1
    for scale in (0.125, 3.0):
        assert torch.equal(pick.greedy(logits, vocab, scale), right(logits, vocab, scale))


def test_of_equal_logits_the_first_is_chosen() -> None:
    logits = torch.full((2, 5000), -3.0)
    logits[1, [2047, 2048, 4999]] = -2.0
    assert pick.greedy(logits, 5000, 1.0).tolist() == [0, 2047]
    logits = torch.tensor([[-1.0, -0.0, 0.0]])
    assert pick.greedy(logits, 3, 1.0).tolist() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_choose_none(bad: float) -> None:
    logits = normal(3, 5000)
    logits[0, 4999], logits[1, 0], logits[2, 4999] = bad, bad, 1.0
    assert pick.greedy(logits, 5000, 1.0).tolist()[:2] == [-1, -1]
    assert torch.equal(pick.greedy(logits, 5000, 1.0), right(logits, 5000, 1.0))
    assert torch.equal(pick.greedy(logits[:, :4999], 4999, 1.0), right(logits[:, :4999], 4999, 1.0))
    assert pick.greedy(normal(1, 9), 9, 3e38).tolist() == [-1]
