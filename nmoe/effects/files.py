"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nmoe.errors import InputError


def home(environ: Mapping[str, str]) -> Path:
    """The folder of what nmoe makes once and keeps: `NMOE_HOME`, or one in the user's cache folder."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "."), ".cache")
    return Path(environ.get("NMOE_HOME") or os.path.join(cache, "nmoe"))


def expanded(path: str) -> Path:
    """A path as a user writes it in a config: `~` and `~name` are home folders.

    Raises:  InputError when there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: expected the home folder of a user, got none; write the path in full") from error


@contextmanager
def refusing(where: Path, what: str, remedy: str = "free space or fix permissions") -> Iterator[None]:
    """Raise what the disk refuses in the block as an InputError.

    where   which file or folder, if the system does not say
    what    expected of it
    remedy  what to do
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or where}: expected {what}, got {error.strerror or error}; {remedy}"
        ) from error


def regular_size(path: Path) -> int:
    """Bytes of a regular file; a pipe or a device, whose reader may wait or read for ever, is an OSError."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return about.st_size


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable.

    Writes:  the folder's directory entries to disk.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends well.

    Whatever happens inside, `path` holds its old content or the whole new one. The temporary file is removed on error.
    The mode is that of a file which this process makes, whoever writes it: safetensors would leave 0600.

    Writes:  `path`, durably, at the end of the block.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def new_file(path: Path, option: str) -> None:
    """Make an empty file before the work that fills it begins.

    option   that named it, for the message

    Raises:  InputError when there is a file already, or no folder to write in.
    Writes:  `path`.
    """
    try:
        path.touch(exist_ok=False)
    except OSError as error:
        raise InputError(
            f"{option}: expected a new file in a folder one may write, got {path}: {error.strerror}; name another"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`.

    Writes:  `path`, whole or not at all.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `folder`, whole and durable, when the block ends well.

    Where `folder` exists by then, another process was quicker with the same content, and its folder stays.

    Writes:  `folder`, by one rename at the end of the block.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(root))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync_folder(folder.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, lies at a path.

    Raises:  InputError when that cannot be looked at, which is another answer than no.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether a folder, or a link to one, lies at a path.

    Raises:  InputError when that cannot be looked at, which is another answer than no.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    """The mode of what lies at a path; None: nothing does. `Path.exists` and the like say no to a link that leads
    nowhere, as one to a disk that is not mounted.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(path):
            return None
        reason, cause = f"a link to nothing: {os.readlink(path)}", error
    except OSError as error:
        reason, cause = str(error.strerror), error
    raise InputError(
        f"{path}: expected to look at it, got {reason}; fix its permissions, its link or its disk"
    ) from cause
