"""What is kept, by three wishes, and never nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nmoe.pure.checkpoint.retention import Keep, Kept, superfluous


def kept(*steps: int, scores: dict[int, float] | None = None) -> list[Kept]:
    return [Kept(name=str(step), step=step, score=(scores or {}).get(step)) for step in steps]


def test_each_wish_keeps_its_own() -> None:
    newest_first = kept(60, 50, 40, 30, 20, 10, scores={50: 3.0, 40: 1.0, 30: 2.0, 10: 1.0})
    assert superfluous(newest_first, Keep(last=1)) == ("10", "20", "30", "40", "50")
    assert superfluous(newest_first, Keep(last=3)) == ("10", "20", "30")
    assert superfluous(newest_first, Keep(last=1, every=20)) == ("10", "30", "50")
    assert superfluous(newest_first, Keep(last=1, best=1)) == ("10", "20", "30", "50"), "of equals the newer"
    assert superfluous(newest_first, Keep(last=1, best=2)) == ("20", "30", "50")
    assert superfluous(newest_first, Keep(last=1, best=9)) == ("20",), "without a score it is not among the best"
    assert superfluous(newest_first, Keep(last=2, every=30, best=1)) == ("10", "20")


def test_after_a_return_to_an_earlier_step_the_newer_stays() -> None:
    """Newest is what was committed last, not the highest step."""
    assert superfluous(kept(20, 40, 30), Keep(last=1)) == ("30", "40")


@given(
    steps=st.lists(st.integers(0, 9), max_size=9),
    last=st.integers(-1, 3),
    every=st.integers(0, 3),
    best=st.integers(0, 2),
)
def test_the_newest_always_stays(steps: list[int], last: int, every: int, best: int) -> None:
    found = [Kept(name=f"{place}", step=step, score=float(step)) for place, step in enumerate(steps)]
    removed = superfluous(found, Keep(last=last, every=every, best=best))
    assert "0" not in removed
    assert len(set(removed)) == len(removed)
    assert len(found) - len(removed) >= min(len(found), max(last, 1))
    again = [each for each in found if each.name not in removed]
    assert superfluous(again, Keep(last=last, every=every, best=best)) == (), "asking twice removes no more"
