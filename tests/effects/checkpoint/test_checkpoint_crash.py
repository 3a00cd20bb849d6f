"""Whatever a crash leaves: the last checkpoint that was told to anybody, or a newer one, every bit of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nmoe.effects.checkpoint.reader import entries
from nmoe.effects.checkpoint.writer import SaveError, open_writer
from nmoe.effects.parallel.ranks import AllGatherText
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.memory_fs import MemoryFs, Operation, image
from tests.effects.checkpoint.saves import ROOT, manifest_in, number_in, on_ranks, pieces, values

Script = Callable[[MemoryFs], None]


def saves(fs: MemoryFs, numbers: Sequence[int], keep: Keep, world: int = 1, resume: bool = False) -> None:
    """One attempt: a save a number, each told when it is committed. The step is the tenth of the number."""
    parent = manifest_in(fs) if resume else None

    def attempt(rank: int, all_gather_text: AllGatherText) -> None:
        with open_writer(
            fs,
            ROOT,
            keep=keep,
            parent=parent,
            rank=rank,
            world=world,
            all_gather_text=all_gather_text,
            chunk_bytes=4096,
        ) as writer:
            for number in numbers:
                mine = pieces(values(number), rank, world)
                writer.save(mine, step=number // 10, meta={"number": number}, score=float(-number))
                writer.wait()
                if rank == 0:
                    fs.said(number)

    failed = [result for result in on_ranks(world, attempt) if result is not None]
    assert not failed, failed


def fresh(fs: MemoryFs) -> None:
    saves(fs, [10, 20, 30, 40], Keep(last=2))


def last_one(fs: MemoryFs) -> None:
    saves(fs, [10, 20, 30], Keep(last=1))


def again(fs: MemoryFs) -> None:
    """A step is saved twice: the second attempt goes back to it."""
    saves(fs, [10, 20, 30], Keep(last=2))
    saves(fs, [31, 41], Keep(last=2, best=1), resume=True)


def two_ranks(fs: MemoryFs) -> None:
    saves(fs, [10, 20], Keep(last=1), world=2)
    saves(fs, [30], Keep(last=1), world=4, resume=True)


SCRIPTS: tuple[Script, ...] = (fresh, last_one, again, two_ranks)


def choosers(
    log: Sequence[Operation], count: int, trials: int, draw: random.Random
) -> list[tuple[str, Callable[[int], bool]]]:
    """What may survive of the first `count` operations: all (the process was killed), any (the power failed), or, as
    a journal has it, every name up to some point and any data."""
    synced = max((number for number in range(count) if log[number][0] == "sync"), default=-1)
    found: list[tuple[str, Callable[[int], bool]]] = [("killed", lambda number: True)]
    for trial in range(trials):
        share = draw.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        cut = draw.randint(synced + 1, count)

        def any_(number: int, share: float = share) -> bool:
            return draw.random() < share

        def journal(number: int, share: float = share, cut: int = cut) -> bool:
            return draw.random() < share if log[number][0] == "write" else number < cut

        found.append(("power", any_) if trial % 2 else ("journal", journal))
    return found


def enumerate_crashes(script: Script, trials: int, seed: int) -> Counter[str]:
    """Every point of a script at which the machine may stop, and `trials` of what it may find then.

    returns  how many states there were, of how many kinds, and how many of them were bad
    """
    fs = MemoryFs()
    script(fs)
    log, draw = fs.log, random.Random(seed)
    seen: dict[object, tuple[int | None, str]] = {}
    counts: Counter[str] = Counter()
    for count in range(len(log) + 1):
        promised = max((operation[1] for operation in log[:count] if operation[0] == "said"), default=None)
        for kind, survives in choosers(log, count, trials, draw):
            found = image(log, count, survives)
            tree = found.tree()
            if tree not in seen:
                try:
                    seen[tree] = (number_in(found), "")
                except Exception as error:
                    seen[tree] = (None, repr(error))
                counts["different"] += 1
            number, error = seen[tree]
            lost = promised is not None and (number is None or number < promised)
            counts["states"] += 1
            counts[kind] += 1
            if error or lost:
                counts["bad"] += 1
                counts[f"bad: {script.__name__} after {count} {kind}: {number} of {promised} {error}"] += 1
    return counts


def test_a_crash_loses_nothing_that_was_told() -> None:
    counts: Counter[str] = sum((enumerate_crashes(script, 4, 1) for script in SCRIPTS), Counter())
    assert counts["bad"] == 0, counts
    assert counts["states"] > 2_500 and counts["different"] > 500, counts


@pytest.mark.long
def test_sixty_thousand_crashes_lose_nothing_that_was_told() -> None:
    counts: Counter[str] = sum((enumerate_crashes(script, 120, 2) for script in SCRIPTS), Counter())
    print(counts)
    assert counts["bad"] == 0, counts
    assert counts["states"] >= 60_000, counts


@pytest.mark.parametrize("script", SCRIPTS)
def test_after_a_crash_training_goes_on(script: Script) -> None:
    """The next attempt commits, whatever the last one left, and leaves nothing of it behind."""
    fs = MemoryFs()
    script(fs)
    draw = random.Random(3)
    for count in range(3, len(fs.log), 7):
        found = image(fs.log, count, choosers(fs.log, count, 1, draw)[draw.randrange(2)][1])
        if "checkpoints" not in found.folders[0]:
            continue
        before = number_in(found)
        saves(found, [990], Keep(last=2), resume=before is not None)
        assert number_in(found) == 990
        assert not [name for name in found.names(ROOT) if name.startswith(".")]
        assert not [entry.problems for entry in entries(found, ROOT) if entry.problems], "nor a half-deleted one"


def test_the_model_sees_a_missing_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash that nothing could reveal would prove nothing: without any of the fsyncs, states are bad."""
    for operation in ("sync", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFs, operation, lambda self, which: None)
            counts = enumerate_crashes(fresh, 6, 1)
        assert counts["bad"] > 0, operation


def test_a_failed_save_is_told(tmp_path: Path) -> None:
    """A script that fails in silence would make every crash look harmless."""
    fs = MemoryFs(capacity=6000)
    with pytest.raises(AssertionError, match="No space left"):
        saves(fs, [10, 20, 30], Keep(last=2), world=2)
    with pytest.raises(SaveError, match="No space left"):
        saves(MemoryFs(capacity=6000), [10, 20, 30], Keep(last=2))
