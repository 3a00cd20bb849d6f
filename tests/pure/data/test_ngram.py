"""The n-gram baselines, against a case done by hand and against counting one by one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.data import ngram

TOKENS = st.lists(st.integers(0, 4), min_size=2, max_size=40)


def test_unigram_by_hand() -> None:
    """Vocabulary 3, train 0 0 1: probabilities 3/6, 2/6, 1/6."""
    loss = ngram.unigram_loss(np.array([0, 0, 1]), np.array([0, 2]), 3)
    assert loss == pytest.approx((math.log(2) + math.log(6)) / 2)


def test_bigram_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train 0 1 0 1 1, vocabulary 2, m = 1: p(0) = 3/7, p(1) = 4/7; c(0 1) = c(0) = c(1) = 2, c(1 0) = c(1 1) = 1.

    Held out 0 1 0 0: p(1|0) = (2 + 4/7) / 3, p(0|1) = (1 + 3/7) / 3, p(0|0) = (3/7) / 3.
    """
    monkeypatch.setattr(ngram, "BACKOFFS", (1.0,))
    loss = ngram.bigram_loss(np.array([0, 1, 0, 1, 1]), np.array([0, 1, 0, 0]), 2)
    assert loss == pytest.approx(-(math.log(18 / 21) + math.log(10 / 21) + math.log(3 / 21)) / 3)


@given(train=TOKENS, held_out=TOKENS)
def test_both_against_counting_one_by_one(train: list[int], held_out: list[int]) -> None:
    single, pair, before = Counter(train), Counter(zip(train, train[1:], strict=False)), Counter(train[:-1])
    chance = {token: (single[token] + 1) / (len(train) + 5) for token in range(5)}
    unigram = -sum(math.log(chance[token]) for token in held_out) / len(held_out)
    bigram = min(
        -sum(
            math.log((pair[a, b] + m * chance[b]) / (before[a] + m))
            for a, b in zip(held_out, held_out[1:], strict=False)
        )
        / (len(held_out) - 1)
        for m in ngram.BACKOFFS
    )
    for dtype in ("<u2", "<u4", np.int64):
        assert ngram.unigram_loss(np.array(train, dtype), np.array(held_out, dtype), 5) == pytest.approx(unigram)
        assert ngram.bigram_loss(np.array(train, dtype), np.array(held_out, dtype), 5) == pytest.approx(bigram)


def test_a_chain_that_only_counts_is_predicted_by_the_bigram_alone() -> None:
    """Equal frequencies leave the unigram at log V, the pairs leave nothing open; products of u2 ids must not wrap."""
    vocab_size = 50_000
    chain = np.tile(np.arange(vocab_size, dtype="<u2"), 3)
    assert ngram.unigram_loss(chain, chain, vocab_size) == pytest.approx(math.log(vocab_size))
    thrice, twice = (3 + 0.5 / vocab_size) / 3.5, (2 + 0.5 / vocab_size) / 2.5
    expected = -(149_997 * math.log(thrice) + 2 * math.log(twice)) / 149_999
    assert ngram.bigram_loss(chain, chain, vocab_size) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ([0, 7], [0, 1], "train: expected tokens in 0..4, got 0 to 7; "),
        ([0, 1], [0, -1], "held_out: expected tokens in 0..4, got -1 to 0; "),
        ([0, 1], [3], "held_out: expected at least 2 tokens, got 1; "),
    ],
)
def test_what_can_not_be_counted_is_refused(train: list[int], held_out: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram.bigram_loss(np.array(train), np.array(held_out), 5)
