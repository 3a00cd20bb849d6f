"""Which measurement speaks for a size, and the line that a run in fp8 begins with."""

from __future__ import annotations

import pytest

from nmoe.config.layers import load
from nmoe.pure.cost.fp8 import MEASURED, Gain, nearest, said
from tests.configs import ROOT


def test_a_measured_size_speaks_for_itself() -> None:
    for size, by_tokens in MEASURED.items():
        for tokens, ratio in by_tokens.items():
            assert nearest(size, tokens) == Gain(ratio=ratio, size=size, tokens=tokens)


@pytest.mark.parametrize(
    ("size", "tokens", "found", "few"),
    [
        ((768, 384), 1, (2048, 768), 4096),
        ((2048, 1000), 1 << 20, (2048, 768), 32768),
        ((2048, 1100), 11585, (2048, 1408), 8192),
        ((2048, 1100), 11586, (2048, 1408), 16384),
        ((5120, 1536), 20000, (4096, 1536), 16384),
        ((8192, 1408), 5000, (7168, 2048), 4096),
    ],
)
def test_another_size_has_the_one_by_the_smallest_factors(
    size: tuple[int, int], tokens: int, found: tuple[int, int], few: int
) -> None:
    gain = nearest(size, tokens)
    assert (gain.size, gain.tokens) == (found, few)


def test_tokens_are_those_of_all_ranks_that_share_the_experts_out() -> None:
    config = load(
        ROOT / "configs" / "moonlet.toml", {}, ("--precision.compute=fp8", "--train.microbatch_size=1")
    ).config
    alone, shared = (said(config, ranks) for ranks in (1, 8))
    assert "took 1.14 times as long on one H200 with 4,096 tokens at 2048x1408" in alone
    assert "1.13 times as fast" in shared and shared.endswith(
        "the nearest measured; 8 that share experts out gain less"
    )
