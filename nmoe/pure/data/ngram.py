"""Losses of n-gram models, the baselines of a validation loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Weight of the unigram in the bigram, in observations of the context.
BACKOFFS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 10_000.0)


def unigram_loss(train: NDArray[Any], held_out: NDArray[Any], vocab_size: int) -> float:
    """Mean loss, in nats a token, of predicting each held-out token by its frequency in `train` plus one.

    train, held_out  [any length >= 1] integers in 0..vocab_size - 1

    Raises:  ValueError when a token lies outside or there is no held-out token.
    """
    _check(train, held_out, vocab_size, shortest=1)
    return float(-np.log(_unigram(train, vocab_size))[held_out].mean())


def bigram_loss(train: NDArray[Any], held_out: NDArray[Any], vocab_size: int) -> float:
    """Mean loss, in nats a token, of predicting each held-out token but the first from the one before it.

    Token b after a has probability (c(a, b) + m·p(b)) / (c(a) + m): counts of `train`, backed off to the unigram p. The
    weight m is the best of a small grid *for the held-out tokens*: which favours the baseline.

    train, held_out  [any length >= 1, >= 2] integers in 0..vocab_size - 1

    Raises:  ValueError when a token lies outside or there is no held-out pair.
    Cost:    sorts the pairs of `train`: about a second for 10 M tokens.
    """
    _check(train, held_out, vocab_size, shortest=2)
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    wanted, repeats = np.unique(_pairs(held_out, vocab_size), return_counts=True)
    before, after = wanted // vocab_size, wanted % vocab_size
    known = np.searchsorted(pairs, wanted + 1) - np.searchsorted(pairs, wanted) > 0
    pair_count = np.zeros(len(wanted))
    pair_count[known] = counts[np.searchsorted(pairs, wanted[known])]
    before_count = np.bincount(train[:-1], minlength=vocab_size)[before]
    back_off = _unigram(train, vocab_size)[after]
    return min(
        float(-(repeats * np.log((pair_count + m * back_off) / (before_count + m))).sum() / repeats.sum())
        for m in BACKOFFS
    )


def _check(train: NDArray[Any], held_out: NDArray[Any], vocab_size: int, *, shortest: int) -> None:
    """Refuse tokens outside the vocabulary, whose pairs would be taken for others, and means of nothing."""
    if len(held_out) < shortest:
        raise ValueError(f"held_out: expected at least {shortest} tokens, got {len(held_out)}; give more")
    for name, tokens in (("train", train), ("held_out", held_out)):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(
                f"{name}: expected tokens in 0..{vocab_size - 1}, got {tokens.min()} to {tokens.max()}; "
                "give the size of their tokenizer"
            )


def _unigram(train: NDArray[Any], vocab_size: int) -> NDArray[np.float64]:
    """Add-one probability of each token: [vocab_size]."""
    return (np.bincount(train, minlength=vocab_size) + 1.0) / (len(train) + vocab_size)


def _pairs(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Each token and the next as one number."""
    token = tokens.astype(np.int64)
    return token[:-1] * vocab_size + token[1:]
