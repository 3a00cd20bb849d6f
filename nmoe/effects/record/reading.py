"""Reading a run folder that a stranger may have written: regular files, of bounded size, depth and numbers."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_FILE_BYTES = 4 << 20
"""Of a file that is read whole: a config has some kilobytes."""

MAX_DEPTH = 64
"""Levels of a value: a run writes five, and what walks a value calls itself at each."""

MAX_INTEGER = 1 << 63
"""Integers lie below it: what holds them later, in DuckDB as in floats, has no room for more."""

MAX_STEP = 1 << 40
MAX_ATTEMPT = 1 << 22
MAX_SECONDS = 1e10
"""Bounds, excluded, of the place of a line: steps of a microsecond take 12 days to reach them."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; a pipe, a device, a socket or a folder is not waited for.

    Raises:  OSError.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "no regular file", name)
        return descriptor

    return open(path, "rb", opener=opener)


def read_bytes(path: Path) -> bytes:
    """The content of a small regular file. Raises: OSError, also when it has more than `MAX_FILE_BYTES`."""
    with open_regular(path) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_FILE_BYTES} bytes", str(path))
    return content


def json_object(text: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises: ValueError, also beyond `MAX_DEPTH` and `MAX_INTEGER` and for what is not finite."""
    try:
        value = json.loads(text, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    _check(value, finite=True)
    return value


def toml_table(path: Path) -> Mapping[str, Any]:
    """A TOML file. Raises: OSError, ValueError, also beyond `MAX_DEPTH` and `MAX_INTEGER`."""
    try:
        table = tomllib.loads(read_bytes(path).decode())
    except RecursionError as error:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more") from error
    _check(table, finite=False)
    return table


def utc(text: Any) -> datetime:
    """A time as ISO 8601 writes it. Raises: ValueError, also for what is no text, or beyond the calendar."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected ISO 8601 of the years 1 to 9999, got {text!r}") from error


def _constant(name: str) -> NoReturn:
    raise ValueError(f"expected JSON, got {name}")


def _check(value: Any, *, finite: bool) -> None:
    """Check depth and numbers, level by level. Raises: ValueError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for outer in level:
            for inner in outer.values() if isinstance(outer, dict) else outer:
                if isinstance(inner, dict | list):
                    deeper.append(inner)
                elif isinstance(inner, int) and abs(inner) >= MAX_INTEGER:
                    raise ValueError(f"expected integers below {MAX_INTEGER}, got one of {inner.bit_length()} bits")
                elif finite and isinstance(inner, float) and not math.isfinite(inner):
                    raise ValueError("expected finite numbers, got another")
        if not deeper:
            return
        level = deeper
    raise ValueError(f"expected at most {MAX_DEPTH} levels, got more")
