"""Files that are either whole or absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def home(environ: Mapping[str, str]) -> Path:
    """The folder of caches: `NMOE_HOME`, else where the desktop keeps caches."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "."), ".cache")
    return Path(environ.get("NMOE_HOME") or os.path.join(cache, "nmoe"))


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

    Writes:  `path`, durably, at the end of the block.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`.

    Writes:  `path`, whole or not at all.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
