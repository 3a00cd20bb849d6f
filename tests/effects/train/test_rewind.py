"""`nmoe run --rewind`: the state is the checkpoint's, what was read since is left out, by every later attempt too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from nmoe.config.sections import Config
from nmoe.effects.checkpoint import lease as leases
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.train import rewind, run
from nmoe.errors import InputError
from nmoe.pure.model.model import Batch
from nmoe.soak import soak
from nmoe.soak.forked import forked
from tests.effects.parallel.rank_runs import as_world, on_ranks
from tests.effects.train import trainings
from tests.effects.train.trainings import changed, events, folder
from tests.test_cli import nmoe, refused

NEWEST = 10**9


class Dead(Exception):
    """Ends an attempt before it has saved anything."""


def noting(path: Path, dies_at: int | None = None) -> run.World:
    """Writes down what is read, a row a line."""

    def wrapped(read: Callable[[int], Batch]) -> Callable[[int], Batch]:
        calls = 0

        def note(cursor: int) -> Batch:
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise Dead("here")
            batch = read(cursor)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in batch.tokens.flatten(0, 1).tolist())
            return batch

        return note

    return run.World(read=wrapped)


def attempt(
    config: Config, world: run.World | None = None, most: int | None = None, accept: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Exit code and last lines of an attempt, perhaps with --rewind."""
    output = Path(config.run.root) / "out.txt"
    Path(config.run.root).mkdir(exist_ok=True, parents=True)
    code = forked(lambda: run.main(config, {}, ("nmoe", "run"), "x", accept, world, most), output)
    return code, output.read_text(errors="replace")


def rows(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def spoiled(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """A run of six steps of two sequences with a checkpoint of each, and the rows of its stream for twenty steps."""
    work = tmp_path_factory.mktemp("spoiled")
    config = trainings.config(work, "spoiled", sources, 6, keep_last=50)
    assert attempt(config, noting(work / "read"))[0] == 0
    long = trainings.config(work / "other", "long", sources, 20, every=0)
    assert attempt(long, noting(work / "stream"))[0] == 0
    stream = rows(work / "stream")
    assert rows(work / "read") == stream[:12] and len(set(stream)) == 40
    return config, stream


def copied(config: Config, work: Path, **train: Any) -> Config:
    """The same run in another place, to be spoiled further."""
    shutil.copytree(config.run.root, work / "runs")
    return changed(attrs.evolve(config, run=attrs.evolve(config.run, root=str(work / "runs"))), **train)


def digests(config: Config) -> dict[str, str]:
    return {name: entry.digest for name, entry in soak.newest(folder(config)).tensors.items()}


def test_what_was_read_since_is_left_out_and_a_kill_changes_no_bit(
    spoiled: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, stream = spoiled
    whole = copied(config, tmp_path / "whole", steps=9)
    code, told = attempt(whole, noting(tmp_path / "read"), 3)
    assert code == 0 and "rewind         from step 6: the 6 sequences read since are left out from now on" in told, told
    # Three steps are kept, three are left out, six more of the sequences after those.
    assert rows(tmp_path / "read") == stream[12:24]
    (event,) = events(whole, "rewind")
    assert (event["step"], event["reached"], event["left_out"]) == (3, 6, [[6, 12]])
    steps = [line["step"] for line in soak.metrics(folder(whole)) if "loss" in line]
    assert steps == list(range(1, 10))
    assert soak.newest(folder(whole)).meta["cursor"] == 18

    # The attempt that rewinds dies before its first checkpoint; a plain one goes on where it would have.
    killed = copied(config, tmp_path / "killed", steps=9)
    assert attempt(killed, noting(tmp_path / "nothing", dies_at=1), 3)[0] == 1
    code, told = attempt(killed, noting(tmp_path / "again"))
    assert code == 0, told
    assert rows(tmp_path / "again") == stream[12:24] and digests(killed) == digests(whole)

    # And one that dies later.
    late = copied(config, tmp_path / "late", steps=9)
    assert attempt(late, noting(tmp_path / "first", dies_at=4), 3)[0] == 1
    code, told = attempt(late, noting(tmp_path / "second"))
    assert code == 0, told
    assert rows(tmp_path / "first") == stream[12:18] and digests(late) == digests(whole)
    assert rows(tmp_path / "second")[-6:] == stream[18:24]

    # A run that begins from its checkpoint, in another folder, leaves the same out.
    other = changed(attrs.evolve(whole, run=attrs.evolve(whole.run, name="other")), steps=11)
    code, told = attempt(changed(other, resume=str(folder(whole))), noting(tmp_path / "other"))
    assert code == 0 and rows(tmp_path / "other") == stream[24:28], told
    assert rewind.left_out(rewind.read(folder(other))) == ((6, 12),)


def test_a_second_rewind_leaves_out_more(spoiled: tuple[Config, list[str]], tmp_path: Path) -> None:
    """From another size of a batch, over the first stretch; checkpoints that were gone back behind are none of it."""
    config, stream = spoiled
    config = copied(config, tmp_path, steps=5)
    assert attempt(config, noting(tmp_path / "one"), 3)[0] == 0
    assert rows(tmp_path / "one") == stream[12:16]
    code, told = attempt(changed(config, steps=6), noting(tmp_path / "two"), 2)
    assert code == 0, told
    # Left out are 6 to 12, and what steps 3 to 5 read: 4, 5, and 12 to 15.
    assert rewind.left_out(rewind.read(folder(config))) == ((4, 6), (6, 12), (12, 16))
    assert rows(tmp_path / "two") == stream[16:24]
    code, told = attempt(changed(config, steps=7), noting(tmp_path / "three"), NEWEST)
    assert rewind.left_out(rewind.read(folder(config)))[-1] == (22, 24)
    assert code == 0 and rows(tmp_path / "three") == stream[24:28] and "from step 6: the 2 sequences" in told, told


def test_without_a_number_it_is_the_newest_before_the_last_step(
    spoiled: tuple[Config, list[str]], tmp_path: Path
) -> None:
    config, stream = spoiled
    config = copied(config, tmp_path, steps=6)
    # Steps that no checkpoint has seen count as read.
    for checkpoint in (folder(config) / "checkpoints").glob("step-0000000[56]*"):
        shutil.rmtree(checkpoint)
    code, told = attempt(config, noting(tmp_path / "read"), NEWEST)
    assert code == 0 and rows(tmp_path / "read") == stream[12:16], told


@pytest.mark.parametrize("seen", [True, False])
def test_what_batches_of_another_size_read_is_left_out(
    seen: bool, spoiled: tuple[Config, list[str]], tmp_path: Path
) -> None:
    """Exactly: nothing that nobody read, and all of it, whether checkpoints have seen it or the metrics alone."""
    config, stream = spoiled
    config = copied(config, tmp_path, steps=8, batch_size=4)
    code, told = attempt(config, noting(tmp_path / "one"), accept=("train.batch_size",))
    assert code == 0 and rows(tmp_path / "one") == stream[12:20], told
    if not seen:
        for checkpoint in (folder(config) / "checkpoints").glob("step-0000000[78]*"):
            shutil.rmtree(checkpoint)
    code, told = attempt(changed(config, batch_size=2, steps=5), noting(tmp_path / "two"), 3)
    assert code == 0, told
    assert rewind.left_out(rewind.read(folder(config))) == ((6, 20),)
    assert rows(tmp_path / "two") == stream[20:24] and "the 14 sequences read since" in told, told


def test_a_command_that_is_refused_leaves_nothing_out(spoiled: tuple[Config, list[str]], tmp_path: Path) -> None:
    """For a key that differs, or while the run is still running; the record of an earlier rewind stays as it was."""
    config, stream = spoiled
    config = copied(config, tmp_path, steps=7)
    checkpoints = folder(config) / "checkpoints"
    for record in (None, "[]\n"):
        if record is not None:
            (folder(config) / "left_out.json").write_text(record)
        code, told = attempt(changed(config, batch_size=4), most=3)
        assert code == 2 and "train.batch_size: expected 2 as in " in told, told
        with leases.hold(Disk(), checkpoints, range(1, 10)):
            code, told = attempt(config, most=3)
        assert code == 2 and "expected one trainer at a time" in told, told
        left = folder(config) / "left_out.json"
        assert (left.read_text() if left.exists() else None) == record
    code, told = attempt(config, noting(tmp_path / "read"))
    assert code == 0 and rows(tmp_path / "read") == stream[12:14], told


def test_two_ranks_go_back_as_one_and_a_refused_one_does_not(spoiled: tuple[Config, list[str]], tmp_path: Path) -> None:
    """The first rank writes the record, all read it; a refusal is one line of the first."""
    config, stream = spoiled
    config = as_world(copied(config, tmp_path, microbatch_size=1, steps=7), 2, experts=1)

    def both(config: Config, name: str) -> list[tuple[int, str]]:
        def call(rank: int) -> int:
            return run.main(config, {}, ("nmoe", "run"), "x", (), noting(tmp_path / f"{name}{rank}"), 3)

        return on_ranks(2, tmp_path / name, call)

    (code, told), (other, nothing) = both(changed(config, sequence_length=8), "refused")
    assert (code, other) == (2, 2) and told.count("\n") == 1 and not nothing.strip(), (told, nothing)
    assert not (folder(config) / "left_out.json").exists()
    told = both(config, "both")
    assert [code for code, _ in told] == [0, 0], told
    assert rewind.left_out(rewind.read(folder(config))) == ((6, 12),)
    assert rows(tmp_path / "both0") == stream[12:20:2] and rows(tmp_path / "both1") == stream[13:20:2]


def test_what_cannot_be_gone_back_to_is_one_line(spoiled: tuple[Config, list[str]], tmp_path: Path) -> None:
    config, _ = spoiled
    config = copied(config, tmp_path)
    for most in (0, -1):
        code, told = attempt(config, most=most)
        assert code == 2 and told.count("\n") == 1, told
        assert "--rewind: expected a checkpoint of at most 0 steps in " in told, told
    new = attrs.evolve(config, run=attrs.evolve(config.run, name="new"))
    code, told = attempt(new, most=NEWEST)
    assert code == 2 and "--rewind: expected a checkpoint of at most 0 steps in " in told, told
    assert not folder(new).exists()


def test_the_command(tmp_path: Path) -> None:
    name = f"--run.root={tmp_path}", "--run.name=first"
    where = f"{re.escape(str(tmp_path / 'first' / 'checkpoints'))}, got none; .*"
    refused(
        nmoe("run", "quickstart", *name, "--rewind"), f"--rewind: expected a checkpoint of at most 0 steps in {where}"
    )
    refused(nmoe("run", "quickstart", *name, "--rewind=x"), ".*--rewind.*")


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"checkpoint": "x"}]', "7"])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "left_out.json").write_text(text)
    with pytest.raises(InputError, match=r"left_out.json: expected a list of rewinds, got "):
        rewind.read(tmp_path)
