"""The few file operations a checkpoint needs, so that tests can make each of them fail.

Nothing outside `Disk` touches a file of a checkpoint. The functions below it are made of these operations.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Literal, Protocol

Buffer = bytes | bytearray | memoryview
"""Bytes in memory."""

Kind = Literal["absent", "file", "folder", "link", "other"]
"""What lies at a path; a link is a link, wherever it leads."""

COPY_BYTES = 1 << 27
"""Most bytes one call writes; Linux writes at most 2 GiB at once."""


class Fs(Protocol):
    """File operations as POSIX has them: each raises OSError, and reading or writing may do less than asked."""

    def kind(self, path: Path) -> Kind:
        """What lies at a path; absent only when it is known that nothing does."""
        ...

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted."""
        ...

    def make_folder(self, folder: Path) -> None:
        """A new folder; it must not exist."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        ...

    def create(self, path: Path, size: int) -> int:
        """A new file to write to, with `size` bytes of the disk set aside; it must not exist."""
        ...

    def open(self, path: Path) -> int:
        """A regular file to read: a pipe or a device, whose reader may wait or read for ever, is an OSError."""
        ...

    def lock(self, path: Path) -> int:
        """A file to read and write, made if absent, locked until it is closed or the process ends.

        Raises:  BlockingIOError when somebody has the lock.
        """
        ...

    def is_at(self, handle: int, path: Path) -> bool:
        """Whether an open file is the one that has this name."""
        ...

    def size(self, handle: int) -> int:
        """Bytes of a file."""
        ...

    def read(self, handle: int, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from byte `offset` on; how many bytes were read, 0 at the end of the file."""
        ...

    def write(self, handle: int, data: Buffer, offset: int) -> int:
        """Write `data` at byte `offset`; how many bytes were written."""
        ...

    def sync(self, handle: int) -> None:
        """Make the content of a file durable."""
        ...

    def close(self, handle: int) -> None:
        """Give a file back."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Give a folder another name; a folder that holds something is never replaced."""
        ...

    def remove(self, path: Path) -> None:
        """Take a file away."""
        ...

    def remove_folder(self, folder: Path) -> None:
        """Take an empty folder away."""
        ...


class Disk:
    """The file system of this machine."""

    def kind(self, path: Path) -> Kind:
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "absent"
        names: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
        return names.get(stat.S_IFMT(mode), "other")

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))

    def make_folder(self, folder: Path) -> None:
        os.mkdir(folder)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def create(self, path: Path, size: int) -> int:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            # A full disk then says so before the first byte is written. macOS has no such call.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
        except OSError:
            os.close(handle)
            raise
        return handle

    def open(self, path: Path) -> int:
        return _regular(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def lock(self, path: Path) -> int:
        handle = _regular(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle

    def is_at(self, handle: int, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            return False

    def size(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def read(self, handle: int, buffer: bytearray | memoryview, offset: int) -> int:
        return os.preadv(handle, [buffer], offset)

    def write(self, handle: int, data: Buffer, offset: int) -> int:
        return os.pwrite(handle, data, offset)

    def sync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        # POSIX: a folder takes the place of an empty folder at most, so a checkpoint that is there stays.
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        os.remove(path)

    def remove_folder(self, folder: Path) -> None:
        os.rmdir(folder)


def _regular(handle: int) -> int:
    """The handle of a regular file, which was opened without waiting.

    Raises:  OSError, the handle closed, when it is that of something else.
    """
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file")
    return handle


def write_all(fs: Fs, handle: int, data: Buffer, offset: int) -> int:
    """Write all of `data`, in as many calls as it takes.

    returns  the byte behind the last one written
    Writes:  the file.
    """
    left = memoryview(data)
    while left:
        written = fs.write(handle, left[:COPY_BYTES], offset)
        if written <= 0:
            raise OSError(f"a write took {written} of {len(left)} bytes")
        left, offset = left[written:], offset + written
    return offset


def read_into(fs: Fs, handle: int, buffer: bytearray | memoryview, offset: int) -> int:
    """Fill `buffer` from byte `offset` on, in as many calls as it takes.

    returns  bytes read: fewer than asked for when the file ends
    Writes:  `buffer`.
    """
    left = memoryview(buffer)
    size = len(left)
    while left:
        got = fs.read(handle, left, offset)
        if got <= 0:
            break
        left, offset = left[got:], offset + got
    return size - len(left)


def read_bytes(fs: Fs, path: Path, *, limit: int) -> bytes:
    """A small file.

    Raises:  OSError when it cannot be read or has more than `limit` bytes.
    """
    handle = fs.open(path)
    try:
        size = fs.size(handle)
        if size > limit:
            raise OSError(f"{size} bytes, more than {limit}")
        buffer = bytearray(size)
        return bytes(buffer[: read_into(fs, handle, buffer, 0)])
    finally:
        fs.close(handle)


def remove_tree(fs: Fs, path: Path) -> None:
    """Delete a folder with everything in it; of a link the link, never what it leads to.

    Writes:  removes `path`, what is in it first.
    """
    if fs.kind(path) != "folder":
        fs.remove(path)
        return
    for name in fs.names(path):
        remove_tree(fs, path / name)
    fs.remove_folder(path)
