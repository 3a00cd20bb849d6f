"""Learning rate over tokens."""

from __future__ import annotations

import math

from nmoe.config.sections import Schedule


def factor(tokens: int, c: Schedule) -> float:
    """Share of the peak learning rate for the step that brings the run to `tokens` tokens.

    c  without shares, as `Schedule.in_tokens` gives it

    Raises:  ValueError for a schedule in shares.

    Linear warm-up, constant, half a cosine down to the floor, then the floor (warm-up–sustain–decay,
    MiniCPM, arXiv:2404.06395, section 4).
    """
    if c.hold_tokens is None or c.decay_tokens is None or c.warmup is not None:
        raise ValueError("schedule: expected lengths in tokens, got shares of a run; use Schedule.in_tokens")
    if tokens < c.warmup_tokens:
        return tokens / c.warmup_tokens
    into_decay = tokens - c.warmup_tokens - c.hold_tokens
    if into_decay <= 0:
        return 1.0
    if into_decay >= c.decay_tokens:
        return c.floor
    return c.floor + (1 - c.floor) * 0.5 * (1 + math.cos(math.pi * into_decay / c.decay_tokens))
