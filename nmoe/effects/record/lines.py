"""Reading append-only files with one JSON object a line, while another process writes them.

A last line without its line end is one being written, or torn by a kill: it is never given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects.record.reading import json_object, open_regular
from nmoe.errors import InputError

LINE_BYTES = 8 << 20
"""The longest line that is read."""

MARK_BYTES = 128
"""What is remembered of the end of what was read, to know the file again: a resumed run cuts its files and appends."""


@attrs.frozen(kw_only=True)
class Line:
    """One whole line."""

    where: str  # file:number
    number: int  # from 1
    end: int  # offset of the next line, in bytes
    mark: bytes  # its last MARK_BYTES
    fields: Mapping[str, Any]


def refuse(problem: str) -> None:
    """Take the first damaged line as the end. Raises: InputError."""
    raise InputError(problem)


def whole(content: bytes) -> int:
    """Bytes of the whole lines that `content` begins with."""
    return content.rfind(b"\n") + 1


def is_same(path: Path, offset: int, mark: bytes) -> bool:
    """Whether a file still holds `mark` before `offset`. Raises: OSError."""
    with open_regular(path) as file:
        file.seek(offset - len(mark))
        return file.read(len(mark)) == mark


def read(path: Path, damaged: Callable[[str], None] = refuse, *, offset: int = 0, number: int = 0) -> Iterator[Line]:
    """The whole lines of a file from an offset; none when there is no file.

    damaged  takes what is wrong with a line that is no JSON object; the line is left out when it returns
    number   of lines before the offset

    Raises:  InputError when the file cannot be read, and what `damaged` raises.
    """
    try:
        with open_regular(path) as file:
            file.seek(offset)
            while (text := file.readline(LINE_BYTES)).endswith(b"\n"):
                number += 1
                offset += len(text)
                where = f"{path}:{number}"
                try:
                    fields = json_object(text)
                except ValueError:
                    damaged(f"{where}: expected one JSON object, got {text[:-1][:60]!r}; fix or delete the line")
                else:
                    yield Line(where=where, number=number, end=offset, mark=text[-MARK_BYTES:], fields=fields)
            if len(text) == LINE_BYTES:
                damaged(f"{path}:{number + 1}: expected at most {LINE_BYTES} bytes, got more; delete the line")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: expected a file to read, got {error.strerror}; fix or remove it") from error
