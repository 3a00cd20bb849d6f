"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Keep:
    """What is kept: a checkpoint stays when any of the three wants it."""

    last: int = 2  # newest ones, at least 1
    every: int = 0  # those whose step is a multiple; 0: none for that reason
    best: int = 0  # those with the lowest scores; of equal ones the newer


@attrs.frozen(kw_only=True)
class Kept:
    """What retention knows of a committed checkpoint."""

    name: str
    step: int
    score: float | None  # lower is better; None: never among the best


def superfluous(committed: Sequence[Kept], keep: Keep) -> tuple[str, ...]:
    """Names of the checkpoints that nothing keeps, oldest first.

    committed  newest first; the newest is never among the result
    """
    scored = [(kept.score, place, kept.name) for place, kept in enumerate(committed) if kept.score is not None]
    stay = {kept.name for kept in committed[: max(keep.last, 1)]}
    stay |= {name for _, _, name in sorted(scored)[: keep.best]}
    stay |= {kept.name for kept in committed if keep.every and kept.step % keep.every == 0}
    return tuple(kept.name for kept in reversed(committed) if kept.name not in stay)
