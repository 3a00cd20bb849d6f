"""What a checkpoint asks of a disk, on a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nmoe.effects.checkpoint.fs import Disk, read_bytes, read_into, write_all

DISK = Disk()


def test_a_file_is_new_and_has_its_space(tmp_path: Path) -> None:
    path = tmp_path / "a"
    handle = DISK.create(path, 10_000)
    assert os.stat(path).st_blocks * 512 >= 10_000, "set aside before the first byte"
    assert write_all(DISK, handle, b"x" * 10, 7) == 17
    DISK.close(handle)
    with pytest.raises(FileExistsError):
        DISK.create(path, 0)
    assert read_bytes(DISK, path, limit=10_000) == bytes(7) + b"x" * 10 + bytes(9_983)
    with pytest.raises(OSError, match="10000 bytes, more than 9999"):
        read_bytes(DISK, path, limit=9_999)


def test_a_checkpoint_takes_the_place_of_no_other(tmp_path: Path) -> None:
    for name in "ab":
        DISK.make_folder(tmp_path / name)
        DISK.close(DISK.create(tmp_path / name / name, 0))
    with pytest.raises(OSError, match="not empty"):
        DISK.rename(tmp_path / "a", tmp_path / "b")
    assert DISK.names(tmp_path / "a") == ["a"] and DISK.names(tmp_path / "b") == ["b"]


def test_a_lock_keeps_others_out_and_is_on_the_file_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "LEASE"
    handle = DISK.lock(path)
    before = os.listdir("/dev/fd")
    with pytest.raises(BlockingIOError):
        DISK.lock(path)
    assert os.listdir("/dev/fd") == before, "no descriptor is left open"
    assert DISK.is_at(handle, path)
    path.unlink()
    assert not DISK.is_at(handle, path)
    path.write_bytes(b"")
    assert not DISK.is_at(handle, path)
    DISK.close(handle)
    DISK.close(DISK.lock(path))


class Slow(Disk):
    """Reads and writes one byte a call, then none."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def _share(self) -> int:
        self.calls -= 1
        assert self.calls > -3, "asked again and again"
        return int(self.calls >= 0)

    def read(self, handle: int, buffer: bytearray | memoryview, offset: int) -> int:
        return super().read(handle, memoryview(buffer)[: self._share()], offset)

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        return super().write(handle, data[: self._share()], offset)


def test_a_call_that_does_less_is_made_again_and_one_that_does_nothing_is_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    handle = DISK.create(path, 0)
    assert write_all(Slow(5), handle, b"abcde", 0) == 5
    assert path.read_bytes() == b"abcde"
    with pytest.raises(OSError, match="a write took 0 of 2 bytes"):
        write_all(Slow(3), handle, b"fghij", 5)
    DISK.close(handle)
    handle = DISK.open(path)
    buffer = bytearray(9)
    assert read_into(Slow(99), handle, buffer, 3) == 5 and buffer == b"defgh" + bytes(4)
    assert read_into(Slow(2), handle, buffer, 0) == 2
    DISK.close(handle)
