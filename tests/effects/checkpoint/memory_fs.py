"""A file system in memory that can fail at any operation, and that knows what a crash may leave of what was done.

What POSIX promises and nothing more: the content of a file is durable after fsync of the file, a name after fsync of
its folder. `image` builds what a machine may find after it lost everything else, or some of it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nmoe.effects.checkpoint.fs import Kind

BLOCK = 512
"""Bytes of a write that survive or are lost together: a sector, so that small files are torn too."""

Operation = tuple[Any, ...]
"""Entry (folder, name, inode, is_folder), size (inode, bytes), write (inode, offset, data), move (folder, old, new,
inode), gone (folder, name), sync (inode), said (anything the test marks)."""

WRITES = ("make_folder", "sync_folder", "create", "lock", "write", "sync", "close", "rename", "remove", "remove_folder")
READS = ("kind", "names", "open", "is_at", "size", "read")


class MemoryFs:
    """Paths count from the root `/`. One instance is one running machine: its locks are not in an image of it."""

    def __init__(self, capacity: int | None = None) -> None:
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytearray] = {}
        self.log: list[Operation] = []
        self.handles: dict[int, int] = {}
        self.locked: dict[int, int] = {}  # inode -> handle
        self.next = 1
        self.capacity = capacity
        self.before: Callable[[str, int], int | None] = lambda operation, size: None
        """Called before each operation; may raise, or say how many bytes of a read or write are done."""
        self.mutex = threading.RLock()

    # What the protocol asks for.

    def kind(self, path: Path) -> Kind:
        self.begin("kind")
        try:
            return "file" if self.inode(path) in self.files else "folder"
        except (FileNotFoundError, NotADirectoryError):
            return "absent"

    def names(self, folder: Path) -> list[str]:
        self.begin("names")
        return sorted(self.folder(folder))

    def make_folder(self, folder: Path) -> None:
        self.begin("make_folder")
        with self.mutex:
            self.new_name(folder, is_folder=True)

    def sync_folder(self, folder: Path) -> None:
        self.begin("sync_folder")
        self.folder(folder)
        self.log.append(("sync", self.inode(folder)))

    def create(self, path: Path, size: int) -> int:
        self.begin("create")
        with self.mutex:
            inode = self.new_name(path, is_folder=False)
            handle = self.opened(inode)
            if size:
                self.resize(inode, size)
            return handle

    def open(self, path: Path) -> int:
        self.begin("open")
        return self.opened(self.file(path))

    def lock(self, path: Path) -> int:
        self.begin("lock")
        with self.mutex:
            inode = self.file(path) if path.name in self.folder(path.parent) else self.new_name(path, is_folder=False)
            if inode in self.locked:
                raise BlockingIOError(errno.EAGAIN, "locked")
            handle = self.opened(inode)
            self.locked[inode] = handle
            return handle

    def is_at(self, handle: int, path: Path) -> bool:
        self.begin("is_at")
        return self.folder(path.parent).get(path.name) == self.handles[handle]

    def size(self, handle: int) -> int:
        self.begin("size")
        return len(self.files[self.handles[handle]])

    def read(self, handle: int, buffer: bytearray | memoryview, offset: int) -> int:
        limit = self.begin("read", len(buffer))
        found = self.files[self.handles[handle]][offset : offset + (len(buffer) if limit is None else limit)]
        memoryview(buffer)[: len(found)] = found
        return len(found)

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        limit = self.begin("write", len(data))
        with self.mutex:
            inode = self.handles[handle]
            content = bytes(data if limit is None else data[:limit])
            if offset + len(content) > len(self.files[inode]):
                self.resize(inode, offset + len(content))
            self.files[inode][offset : offset + len(content)] = content
            for start in range(0, len(content), BLOCK):
                self.log.append(("write", inode, offset + start, content[start : start + BLOCK]))
            return len(content)

    def sync(self, handle: int) -> None:
        self.begin("sync")
        self.log.append(("sync", self.handles[handle]))

    def close(self, handle: int) -> None:
        with self.mutex:  # the descriptor is gone whatever close says
            inode = self.handles.pop(handle)
            if self.locked.get(inode) == handle:
                del self.locked[inode]
        self.begin("close")

    def rename(self, old: Path, new: Path) -> None:
        self.begin("rename")
        with self.mutex:
            folder = self.folder(old.parent)
            assert old.parent == new.parent and old.name in folder
            there = folder.get(new.name)
            if there is not None and self.folders.get(there) != {}:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            inode = folder.pop(old.name)
            folder[new.name] = inode
            self.log.append(("move", self.inode(old.parent), old.name, new.name, inode))

    def remove(self, path: Path) -> None:
        self.begin("remove")
        with self.mutex:
            self.file(path)
            del self.folder(path.parent)[path.name]
            self.log.append(("gone", self.inode(path.parent), path.name))

    def remove_folder(self, folder: Path) -> None:
        self.begin("remove_folder")
        with self.mutex:
            if self.folder(folder):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            del self.folder(folder.parent)[folder.name]
            self.log.append(("gone", self.inode(folder.parent), folder.name))

    # What tests ask for.

    def said(self, what: object) -> None:
        """Note in the log that something was promised to somebody."""
        self.log.append(("said", what))

    def content(self, path: Path) -> bytearray:
        """The bytes of a file, to look at or to damage."""
        return self.files[self.file(path)]

    def used(self) -> int:
        """Bytes of all files that have a name or are open."""
        named = {inode for folder in self.folders.values() for inode in folder.values()} | set(self.handles.values())
        return sum(len(content) for inode, content in self.files.items() if inode in named)

    def tree(self) -> tuple[Any, ...]:
        """Everything that can be seen, as a value."""

        def of(inode: int) -> Any:
            if inode in self.files:
                return bytes(self.files[inode])
            return tuple((name, of(child)) for name, child in sorted(self.folders[inode].items()))

        return of(0)

    # How it is done.

    def begin(self, operation: str, size: int = 0) -> int | None:
        with self.mutex:
            return self.before(operation, size)

    def inode(self, path: Path) -> int:
        found = 0
        for name in path.parts[1:]:
            if found in self.files:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            if name not in self.folders[found]:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            found = self.folders[found][name]
        return found

    def folder(self, path: Path) -> dict[str, int]:
        inode = self.inode(path)
        if inode in self.files:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return self.folders[inode]

    def file(self, path: Path) -> int:
        inode = self.inode(path)
        if inode in self.folders:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return inode

    def new_name(self, path: Path, *, is_folder: bool) -> int:
        folder = self.folder(path.parent)
        if path.name in folder:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        inode = self.next
        self.next += 1
        if is_folder:
            self.folders[inode] = {}
        else:
            self.files[inode] = bytearray()
        folder[path.name] = inode
        self.log.append(("entry", self.inode(path.parent), path.name, inode, is_folder))
        return inode

    def opened(self, inode: int) -> int:
        with self.mutex:
            self.next += 1
            self.handles[self.next] = inode
            return self.next

    def resize(self, inode: int, size: int) -> None:
        more = size - len(self.files[inode])
        if self.capacity is not None and self.used() + more > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.files[inode].extend(bytes(more))
        self.log.append(("size", inode, size))


def image(log: list[Operation], count: int, survives: Callable[[int], bool]) -> MemoryFs:
    """The machine after a crash behind operation `count`.

    survives   whether an operation that nothing made durable was, by its number; asked once for each
    """
    synced: dict[int, int] = {}
    for number, operation in enumerate(log[:count]):
        if operation[0] == "sync":
            synced[operation[1]] = number
    found = MemoryFs()
    for number, operation in enumerate(log[:count]):
        kind, inode = operation[0], operation[1]
        if kind in ("sync", "said") or not (synced.get(inode, -1) > number or survives(number)):
            continue
        if kind == "entry":
            _, folder, name, child, is_folder = operation
            found.folders.setdefault(folder, {})[name] = child
            if is_folder:
                found.folders.setdefault(child, {})
            else:
                found.files.setdefault(child, bytearray())
        elif kind in ("size", "write"):
            content = found.files.setdefault(inode, bytearray())
            end = operation[2] + (len(operation[3]) if kind == "write" else 0)
            content.extend(bytes(max(end - len(content), 0)))
            if kind == "write":
                content[operation[2] : end] = operation[3]
        elif kind == "move":
            _, folder, old, new, child = operation
            found.folders.setdefault(folder, {}).pop(old, None)
            found.folders[folder][new] = child
        elif kind == "gone":
            found.folders.setdefault(inode, {}).pop(operation[2], None)
    for folder in list(found.folders.values()):
        for child in folder.values():  # a name without what it names: an empty folder or file
            if child not in found.files:
                found.folders.setdefault(child, {})
    found.next = max([*found.folders, *found.files]) + 1
    return found
