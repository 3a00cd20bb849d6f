"""Which fault strikes a training at which step: a plan of integers, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs

KINDS = (
    *("kill", "kill in a save", "terminate", "terminate twice", "user signal", "interrupt", "pause"),
    *("loader error", "NaN batch", "disk full", "short write", "failed fsync", "slow writer"),
    *("flipped bit", "lost file", "cut file", "torn log", "changed ranks", "second trainer"),
)
"""What can strike. Those of the last line but the last one strike the files while no process runs."""


@attrs.frozen(kw_only=True)
class Fault:
    """One fault."""

    index: int
    kind: str
    step: int  # steps taken when it strikes, the first time the run gets there
    draw: float  # 0 <= draw < 1: when, where, how much, whatever the kind has to choose


def plan(*, steps: int, faults: int, seed: int, kinds: Sequence[str] = KINDS) -> tuple[Fault, ...]:
    """`faults` faults over `steps` steps, in order: at most one a step, every kind as often as any other, give or take
    one, none before the first save or after the last step but one.

    Raises:  ValueError when there are more faults than steps to put them.
    """
    chance = random.Random(seed)
    places = range(2, steps - 1)
    if faults > len(places):
        raise ValueError(
            f"faults: expected at most one a step, {len(places)} in {steps} steps, got {faults}; take more steps or "
            "fewer faults"
        )
    order = [kinds[index % len(kinds)] for index in range(faults)]
    chance.shuffle(order)
    chosen = sorted(chance.sample(places, faults))
    return tuple(
        Fault(index=index, kind=kind, step=step, draw=chance.random())
        for index, (kind, step) in enumerate(zip(order, chosen, strict=True))
    )
