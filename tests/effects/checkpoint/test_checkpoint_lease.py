"""One trainer at a time, whatever became of the last one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe.effects.checkpoint import lease
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import SaveError, open_writer, prune
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.saves import manifest_in, number_in, pieces, values

HOLDER = """
import sys, time
from pathlib import Path
from nmoe.effects.checkpoint import lease
from nmoe.effects.checkpoint.fs import Disk
with lease.hold(Disk(), Path(sys.argv[1]), []) as held:
    print(held.attempt, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def start(root: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def save(root: Path, number: int) -> None:
    with open_writer(Disk(), root, keep=Keep(), parent=manifest_in(Disk(), root)) as writer:
        writer.save(pieces(values(number)), step=number, meta={"number": number})


def test_a_second_trainer_is_refused_and_a_dead_one_replaced(root: Path) -> None:
    with start(root) as first:
        before = sorted(root.iterdir())
        with pytest.raises(InputError, match=rf"got a second while process {first.pid} of"):
            save(root, 1)
        with pytest.raises(InputError, match="got a second while "):
            prune(Disk(), root, Keep())
        assert sorted(root.iterdir()) == before
        first.send_signal(signal.SIGKILL)
    save(root, 2)
    assert number_in(Disk(), root) == 2
    assert json.loads((root / lease.FILE).read_text())["attempt"] == 2


def test_a_trainer_whose_lock_was_taken_away_is_not_replaced_while_it_lives(root: Path) -> None:
    """Somebody copied the lease over itself: the lock is on a file that has no name any more."""
    with start(root) as first:
        text = (root / lease.FILE).read_text()
        (root / lease.FILE).unlink()
        (root / lease.FILE).write_text(text)
        with pytest.raises(InputError, match=f"got process {first.pid} of this host, which runs"):
            save(root, 1)
        first.kill()
    save(root, 1)


def test_another_host_may_still_write(root: Path) -> None:
    with lease.hold(Disk(), root, []):
        fields = json.loads((root / lease.FILE).read_text())
    for change, refused in (({"released": True}, False), ({"released": False}, True)):
        (root / lease.FILE).write_text(json.dumps(fields | {"host": "elsewhere"} | change))
        if refused:
            with pytest.raises(InputError, match=r"got process \d+ of elsewhere, which did not; when it is dead"):
                save(root, 1)
        else:
            save(root, 1)


def test_a_lease_that_was_given_back_is_free_for_any_host(root: Path) -> None:
    """The disk of a dead machine is read by another one, which cannot ask whether the process lives."""
    save(root, 1)
    fields = json.loads((root / lease.FILE).read_text())
    (root / lease.FILE).write_text(json.dumps(fields | {"host": "elsewhere"}))
    save(root, 2)
    assert number_in(Disk(), root) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"attempt": 1}', "\0" * 512])
def test_a_torn_lease_keeps_nobody_out(root: Path, content: str) -> None:
    """The lock decides; and what the folder holds says which attempts there were."""
    save(root, 1)
    (root / lease.FILE).write_text(content)
    save(root, 2)
    manifest = manifest_in(Disk(), root)
    assert manifest is not None and (manifest.attempt, manifest.step) == (2, 2)


@pytest.mark.parametrize("how", ["removed", "replaced", "taken"])
def test_a_trainer_that_lost_its_lease_commits_nothing(root: Path, how: str) -> None:
    save(root, 1)
    path = root / lease.FILE
    with (
        pytest.raises(SaveError, match="expected the lease of this trainer, attempt 2"),
        open_writer(Disk(), root, keep=Keep(), parent=manifest_in(Disk(), root)) as writer,
    ):
        text = path.read_text()
        if how == "taken":
            path.write_text(text.replace('"attempt": 2', '"attempt": 3'))
        else:
            path.unlink()
        if how == "replaced":
            path.write_text(text)
        writer.save(pieces(values(2)), step=2, meta={"number": 2})
        writer.wait()
    assert number_in(Disk(), root) == 1
    assert not [name for name in os.listdir(root) if name.startswith(".")]


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    me = lease.this_process()
    assert lease.is_alive(me, me)
    assert not lease.is_alive(lease.Holder(host=me.host, boot=me.boot, pid=me.pid, started="1"), me)
    assert not lease.is_alive(lease.Holder(host=me.host, boot="before", pid=me.pid, started=me.started), me)
