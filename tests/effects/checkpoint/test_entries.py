"""Nothing there, and what could not be looked at, are two answers: links, pipes and folders among checkpoints."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmoe.effects import files
from nmoe.effects.checkpoint import reader, weights, writer
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.train import resume
from nmoe.errors import InputError
from nmoe.pure.checkpoint.retention import Keep
from tests.effects.checkpoint.saves import number_in, pieces, values

DISK = Disk()


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Nothing here waits: whoever opens a pipe would, for ever, and the signal ends it."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of numbers 1 to 3."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    with writer.open_writer(DISK, folder / "checkpoints", keep=Keep(last=9)) as saver:
        for number in (1, 2, 3):
            saver.save(pieces(values(number)), step=number, meta={"number": number})
    return folder


def names(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run / "checkpoints") if name.startswith("step-"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / names(run)[-1]


@pytest.mark.parametrize("target", ["gone", "latest", "step-00000003.0001-0003", "/dev/null", "x" * 300])
def test_a_link_beside_the_checkpoints_hides_none(run: Path, target: str) -> None:
    """One to nothing, to itself, to a checkpoint, to a device, to a name that cannot be."""
    if len(target) < 256:
        (run / "checkpoints" / "latest").symlink_to(target)
    else:
        (run / "checkpoints" / "latest").symlink_to("/" + target)
    said: list[str] = []
    assert number_in(DISK, run / "checkpoints", said.append) == 3 and said == []


@pytest.mark.parametrize("name", ["manifest.json", "rank-000.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "dangling", "loop"])
def test_what_is_no_file_is_damage_and_never_waited_for(run: Path, name: str, kind: str) -> None:
    path = newest(run) / name
    path.unlink()
    _put(path, kind)
    said: list[str] = []
    assert number_in(DISK, run / "checkpoints", said.append) == 2
    assert said and all(str(path) in problem and "expected" in problem for problem in said)


def _put(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "gone", "loop": path.name}[kind])


def test_a_checkpoint_on_another_disk_is_read_through_its_link(run: Path, tmp_path: Path) -> None:
    shutil.move(newest(run), tmp_path / "archive")
    newest(run)
    (run / "checkpoints" / "step-00000003.0001-0003").symlink_to(tmp_path / "archive")
    assert number_in(DISK, run / "checkpoints") == 3


@pytest.mark.parametrize("target", ["gone", "checkpoints"])
def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_absent(run: Path, tmp_path: Path, target: str) -> None:
    """Read, written and named: the run would begin at step 0."""
    shutil.rmtree(run / "checkpoints")
    root = run / "checkpoints"
    root.symlink_to(target)
    with pytest.raises(InputError, match="checkpoints: expected a folder of checkpoints, got "):
        number_in(DISK, root)
    with pytest.raises(InputError, match="checkpoints"), writer.open_writer(DISK, root, keep=Keep()):
        pass
    for named in ("auto", str(run), str(root)):
        with pytest.raises(InputError, match=r"checkpoints(/manifest.json)?: expected "):
            where = resume.origin(named, run)
            assert where is not None and reader.entries(DISK, where.folder)
    with pytest.raises(InputError, match=r"checkpoints(/manifest.json)?: expected "):
        weights.of_path(DISK, run, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["gone", "b"])
@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_run_folder_that_cannot_be_looked_at_is_not_a_new_run(tmp_path: Path, target: str, mode: str) -> None:
    (tmp_path / "b").symlink_to(target)
    with pytest.raises(InputError, match="b: expected "):
        resume.origin(mode, tmp_path / "b")


def test_a_link_by_another_name_is_followed_to_its_checkpoint(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "latest").symlink_to(names(run)[1])
    (tmp_path / "best").symlink_to(run / "checkpoints" / "latest")
    for path in (run / "checkpoints" / "latest", tmp_path / "best"):
        where = resume.origin(str(path), tmp_path / "b")
        assert where is not None and where.single and where.folder == run / "checkpoints" / names(run)[1]


def test_a_folder_that_cannot_be_looked_into_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no checkpoint by its name, but may be one that somebody renamed."""
    (run / "checkpoints" / "lost+found").mkdir()

    class Closed(Disk):
        def names(self, folder: Path) -> list[str]:
            if folder.name == "lost+found":
                raise PermissionError(13, "Permission denied", str(folder))
            return super().names(folder)

    said: list[str] = []
    assert number_in(Closed(), run / "checkpoints", said.append) == 3
    assert len(said) == 1 and "lost+found: expected " in said[0] and "Permission denied; fix its permissions" in said[0]


def _remove(run: Path) -> None:
    """As `nmoe ckpt prune --last 1`."""
    writer.prune(DISK, run / "checkpoints", Keep(last=1))


def _save(run: Path) -> None:
    """As the next save of a training does."""
    manifest = reader.entries(DISK, run / "checkpoints")[0].manifest
    with writer.open_writer(DISK, run / "checkpoints", keep=Keep(last=1), parent=manifest) as saver:
        saver.save(pieces(values(4)), step=4, meta={"number": 4})


@pytest.mark.parametrize("delete", [_remove, _save])
@pytest.mark.parametrize("inside", [False, True])
def test_of_a_linked_checkpoint_the_link_is_deleted(
    run: Path, tmp_path: Path, delete: Callable[[Path], None], inside: bool
) -> None:
    """Also of a link inside a checkpoint, and of folders that somebody put there."""
    oldest = run / "checkpoints" / names(run)[0]
    archive = tmp_path / "archive"
    shutil.move(oldest, archive)
    if inside:
        (oldest / "notes" / "deep").mkdir(parents=True)
        (oldest / "notes" / "deep" / "a").write_text("")
        (oldest / "archive").symlink_to(archive)
        for path in archive.iterdir():
            shutil.copy(path, oldest)
    else:
        oldest.symlink_to(archive)
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    delete(run)
    assert len(names(run)) == 1 and sorted(os.listdir(run / "checkpoints")) == ["LEASE", *names(run)]
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_a_lease_that_is_no_file_is_one_line(run: Path, kind: str) -> None:
    (run / "checkpoints" / "LEASE").unlink()
    _put(run / "checkpoints" / "LEASE", kind)
    for delete in (_remove, _save):
        with pytest.raises(InputError, match="LEASE: expected "):
            delete(run)
    assert len(names(run)) == 3


def test_what_cannot_be_deleted_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Disk, path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Disk, "remove", refuse)
    with pytest.raises(InputError, match="expected to delete .*, got Operation not permitted; "):
        _remove(run)


def test_what_lies_at_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    assert files.is_file(tmp_path / "file") and files.is_file(tmp_path / "link")
    assert files.is_folder(tmp_path) and not files.is_folder(tmp_path / "file")
    for nothing in (tmp_path / "x", tmp_path / "x" / "y", tmp_path / "file" / "y"):
        assert not files.is_file(nothing) and not files.is_folder(nothing)
    (tmp_path / "gone").symlink_to("x")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("gone", "a link to nothing"), ("loop", "symbolic links"), ("n" * 300, "name too long")):
        for look in (files.is_file, files.is_folder):
            with pytest.raises(InputError, match=f"(?i)expected to look at it, got .*{said}"):
                look(tmp_path / name)
