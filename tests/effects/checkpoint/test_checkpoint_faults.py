"""A fault at any file operation is told in words, damages nothing that was good, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from nmoe.effects.checkpoint.reader import restore_
from nmoe.effects.checkpoint.writer import SaveError, open_writer
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import whole
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.memory_fs import READS, WRITES, MemoryFs
from tests.effects.checkpoint.saves import ROOT, failing, manifest_in, number_in, pieces, values


def fail(code: int) -> Callable[[int], int | None]:
    def act(size: int) -> int | None:
        raise OSError(code, os.strerror(code))

    return act


FAULTS: dict[str, Callable[[int], int | None]] = {
    "EIO": fail(errno.EIO),
    "ENOSPC": fail(errno.ENOSPC),
    "EROFS": fail(errno.EROFS),
    "short": lambda size: (size + 1) // 2,
    "nothing": lambda size: 0 if size else None,
}


def attempt(fs: MemoryFs, numbers: list[int], told: list[int]) -> None:
    """Go on from what is there, saving each number; `told` gets those whose commit was told."""
    with open_writer(fs, ROOT, keep=Keep(last=2), parent=manifest_in(fs)) as writer:
        for number in numbers:
            writer.save(pieces(values(number)), step=number, meta={"number": number})
            writer.wait()
            told.append(number)


QUICK = ("EIO", "short")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in FAULTS]
)
def test_a_fault_while_saving_damages_nothing(fault: str) -> None:
    """At the first operation, the second, and so on, until an attempt comes through without meeting the fault."""
    at, met = 0, True
    failed = 0
    while met:
        fs = MemoryFs()
        told: list[int] = []
        attempt(fs, [1, 2], told)
        parent = manifest_in(fs)
        with failing(fs, WRITES, at, FAULTS[fault]) as seen:
            try:
                with open_writer(fs, ROOT, keep=Keep(last=2), parent=parent) as writer:
                    for number in (3, 4):
                        writer.save(pieces(values(number)), step=number, meta={"number": number})
                        writer.wait()
                        told.append(number)
            except InputError as error:
                failed += 1
                assert all(": " in problem and "; " in problem for problem in error.problems), error
        met = at < len(seen)
        at += 1
        found = number_in(fs)
        assert found is not None and found >= max(told), (at, seen[-1], told, found)
        assert fs.handles == {}, f"operation {at}, {seen[at - 1] if met else ''}, leaves a file open"
        attempt(fs, [9], told)
        assert number_in(fs) == 9
        assert not [name for name in fs.names(ROOT) if name.startswith(".")]
    if fault != "short":
        assert failed > 4
    assert at > 20, "too few operations to speak of"


def test_after_a_fault_the_same_writer_goes_on() -> None:
    """`on_error = "continue"`: the failed save is told at the next one, which then is made."""
    fs = MemoryFs()
    with open_writer(fs, ROOT, keep=Keep(last=2)) as writer:
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
        writer.wait()
        with failing(fs, ["sync"], 0, FAULTS["EIO"]):
            writer.save(pieces(values(2)), step=2, meta={"number": 2})
            with pytest.raises(SaveError, match=r"the save of step 2: .* Input/output error"):
                writer.save(pieces(values(3)), step=3, meta={"number": 3})
        assert number_in(fs) == 1
        writer.save(pieces(values(3)), step=3, meta={"number": 3})
    assert number_in(fs) == 3


def test_an_fsync_that_failed_is_never_asked_again() -> None:
    """After a failed fsync the pages count as clean, so a second one would say yes without having written them."""
    fs = MemoryFs()
    with open_writer(fs, ROOT, keep=Keep(last=2)) as writer, failing(fs, ["sync", "create"], 1, FAULTS["EIO"]) as seen:
        writer.save(pieces(values(1)), step=1, meta={"number": 1})
        with pytest.raises(SaveError):
            writer.wait()
    assert seen[:2] == ["create", "sync"] and "sync" not in seen[2:-1]
    assert number_in(fs) is None


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "nothing"])
def test_a_fault_while_loading_is_never_a_wrong_state(fault: str) -> None:
    """Right, older and told, or an error: nothing else. Half of what was asked for is not an error."""
    at, met = 0, True
    outcomes = set()
    while met:
        fs = MemoryFs()
        attempt(fs, [1, 2], [])
        said: list[str] = []
        with failing(fs, READS, at, FAULTS[fault]) as seen:
            try:
                found = number_in(fs, report=said.append)
            except InputError as error:
                found = None
                assert all(": " in problem and "; " in problem for problem in error.problems), error
                outcomes.add("error")
            else:
                outcomes.add(found)
                assert found == 2 or (found == 1 and said), (seen[at], found, said)
        met = at < len(seen)
        at += 1
        assert fs.handles == {}
    assert outcomes == ({2} if fault == "short" else {1, 2, "error"})


@pytest.mark.parametrize(
    "capacity", [pytest.param(step, marks=[] if step % 5 == 0 else [pytest.mark.long]) for step in range(250)]
)
def test_a_disk_of_any_size(capacity: int) -> None:
    """From empty to room for all: each save is told or refused, and what is told is there."""
    fs = MemoryFs(capacity=capacity * 120)
    told = [0]
    refused = 0
    try:
        with open_writer(fs, ROOT, keep=Keep(last=1)) as writer:
            for number in (1, 2, 3):
                try:
                    writer.save(pieces(values(number)), step=number, meta={"number": number})
                    writer.wait()
                    told.append(number)
                except SaveError as error:
                    refused += 1
                    assert "No space left" in str(error)
                assert (number_in(fs) or 0) == told[-1]
    except InputError as error:
        refused += 1
        assert "No space left" in str(error) and told == [0]
    assert (number_in(fs) or 0) == told[-1]
    assert refused if capacity < 60 else True
    assert told == [0, 1, 2, 3] if capacity > 200 else True
    if ROOT.name in fs.folders[0]:
        assert not [name for name in fs.names(ROOT) if name.startswith(".")]


def test_a_loader_that_refuses_is_heard() -> None:
    """What `targets` raises is not a damaged checkpoint: nothing older is tried."""
    fs = MemoryFs()
    attempt(fs, [1, 2], [])

    def refuse(manifest: object) -> list:
        raise InputError("model.hidden_size: as in the checkpoint, got 64; set it to 32")

    with pytest.raises(InputError, match="hidden_size"):
        restore_(fs, ROOT, refuse, report=pytest.fail)
    with pytest.raises(InputError, match=r"expected 'updates' as int64 \[3\], got int64 \[\]"):
        tensors = values(0) | {"updates": values(0)["updates"].repeat(3)}
        restore_(fs, ROOT, lambda _: [whole(*each) for each in tensors.items()], report=pytest.fail)
