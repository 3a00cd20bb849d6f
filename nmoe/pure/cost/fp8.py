"""How fast the experts are in fp8 beside bf16, as measured on one H200, and what that says of another size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import attrs

from nmoe.config import Config

Size = tuple[int, int]
"""Hidden size and width of a routed expert."""

MEASURED: Mapping[Size, Mapping[int, float]] = MappingProxyType(
    {
        (2048, 768): MappingProxyType({4096: 0.82, 8192: 0.94, 16384: 1.11, 32768: 1.1}),
        (2048, 1408): MappingProxyType({4096: 0.88, 8192: 1.01, 16384: 1.16, 32768: 1.13}),
        (4096, 1536): MappingProxyType({4096: 1.0, 8192: 1.11, 16384: 1.19, 32768: 1.22}),
        (7168, 2048): MappingProxyType({4096: 1.1, 8192: 1.21, 16384: 1.25, 32768: 1.27}),
    }
)
"""Time in bf16 over that in fp8 by size and tokens: routed experts, forward and backward, at the power limit
(`nmoe bench precision`, 2026-11-30)."""


@attrs.frozen(kw_only=True)
class Gain:
    """What was measured nearest to a size."""

    ratio: float  # time in bf16 over that in fp8
    size: Size
    tokens: int


def nearest(size: Size, tokens: int) -> Gain:
    """The measurement whose size, then whose tokens differ by the smallest factors; of equal ones the smaller.

    tokens  of a microbatch, of all ranks that share the experts out: weights are quantised once a pass for all of them
    """

    def apart(measured: Size) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(measured, size, strict=True))

    found = min(MEASURED, key=apart)
    few = min(MEASURED[found], key=lambda measured: abs(math.log(measured / tokens)))
    return Gain(ratio=MEASURED[found][few], size=found, tokens=few)


def said(config: Config, ranks: int) -> str:
    """One line for a run in fp8; of one that is slower for it, what to do.

    ranks  that share the experts out: their kernels are not those of one GPU, and were not timed by size
    """
    c, train = config.model, config.train
    gain = nearest((c.hidden_size, c.moe.intermediate_size), train.microbatch_size * train.sequence_length * ranks)
    measured = f"on one H200 with {gain.tokens:,} tokens at {gain.size[0]}x{gain.size[1]}, the nearest measured"
    if ranks > 1:
        measured += f"; {ranks} that share experts out gain less"
    if gain.ratio < 1:
        return (
            f"precision: fp8 is slower than bf16 at this size: its experts took {1 / gain.ratio:.2f} times as long "
            f'{measured}; write compute = "bf16", or more tokens a microbatch'
        )
    return f"precision: experts in fp8 were {gain.ratio:.2f} times as fast as in bf16 {measured}"
