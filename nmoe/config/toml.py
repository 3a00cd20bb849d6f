"""TOML text: reading a file, which line a key is on, single values, and how values are shown in messages."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import tomli
import tomli_w

from nmoe.config.fields import KeyPath, flat
from nmoe.errors import InputError, printable

LONGEST = 80
"""Characters of a value that a message shows at most."""

HINTS = (
    (r"=\s*(True|False)\b", "TOML uses true/false"),
    (r"=\s*[+-]?\.\d", "write a digit before the point"),
    (r"=\s*[+-]?\d+(,\d{3})+\b", "write the number without commas, or with _ in their place"),
    (r"=\s*[A-Za-z/~.$]", "put text in quotes"),
)
"""What to say of a line that is no TOML, by what it looks like."""


@attrs.frozen(kw_only=True)
class Document:
    """A TOML file: its tables, and the line of each key and table header."""

    path: Path
    tables: dict[str, Any]
    lines: dict[KeyPath, int]

    def fault(self, key: KeyPath, text: str) -> str:
        """What is wrong with a key, behind file and line of it or of the nearest table around it that is written."""
        written = next((key[:size] for size in range(len(key), 0, -1) if key[:size] in self.lines), None)
        line = "" if written is None else f":{self.lines[written]}"
        return f"{printable(str(self.path))}{line}: {dotted(key)}: {text}"


def closest(word: str, possibilities: Sequence[str]) -> str | None:
    """The possibility a mistyped word probably means; none for a word longer than a message shows."""
    if len(word) > LONGEST:  # comparing takes time in proportion to its length, 2 s for 1.5 MB
        return None
    return next(iter(difflib.get_close_matches(word, possibilities, n=1)), None)


def shown(value: Any) -> str:
    """A value as a message shows it: a TOML literal on one line, long ones cut, tables and arrays by name."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: LONGEST + 1]
    text = printable(tomli_w.dumps({"value": value}).removeprefix("value = ").strip())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def dotted(path: KeyPath) -> str:
    """A path as TOML writes it, names that are not bare keys in quotes."""
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else shown(name) for name in path)


def literal(text: str) -> Any:
    """The value of a TOML literal; text that is none is a string, for the strict conversion to judge.

    What is followed by a comment or a second statement is none: it does not parse within brackets.
    """
    try:
        tomli.loads(f"value = [{text}]")
        return tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def read(path: Path) -> Document:
    """A TOML file.

    Raises:  InputError when it is missing, unreadable, not UTF-8 or not TOML.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        near = closest(path.stem, [other.stem for other in path.parent.glob("*.toml")])
        hint = f"did you mean {path.with_name(f'{near}.toml')}?" if near else "check the path"
        raise InputError(f"{path}: expected an existing file, got none; {hint}") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a TOML file, got a directory; name a file in it") from error
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable file, got {error.strerror}; check the path and its permissions"
        ) from error
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise InputError(
            f"{path}:{line}: expected text in UTF-8, got the byte 0x{byte:02x}; save the file as UTF-8"
        ) from error
    return Document(path=path, tables=_parse(text, path), lines=lines(text))


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        line = text.replace("\r\n", "\n").split("\n")[error.lineno - 1]
        hint = next((hint for pattern, hint in HINTS if re.search(pattern, line)), f"fix column {error.colno}")
        raise InputError(f"{path}:{error.lineno}: expected TOML, got {_lowered(error.msg)}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML that can be read, got {_lowered(str(error))}; shorten it") from error


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def lines(text: str) -> dict[KeyPath, int]:
    """The line each key and table of a TOML text is first named on, counted from 1; all keys of one statement are on
    the line it begins on."""
    places: dict[KeyPath, int] = {}
    header: KeyPath = ()
    for number, statement in _statements(text.replace("\r\n", "\n")):
        parsed = tomli.loads(statement)
        is_header = statement.lstrip().startswith("[")
        if is_header:
            header = _header(parsed)
        for path in (header,) if is_header else ((*header, *path) for path, _ in flat(parsed)):
            while path and path not in places:
                places[path] = number
                path = path[:-1]
    return places


_TOKEN = re.compile(
    r""""{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]""", re.DOTALL
)
"""What decides where a statement of TOML ends: brackets, line ends, and strings and comments around others of them."""


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The statements of a TOML text, each with the line it begins on: a line end outside of brackets ends one."""
    depth, begin, number = 0, 0, 1
    for token in _TOKEN.finditer(f"{text}\n"):
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if token[0] == "\n" and not depth:
            statement = text[begin : token.start()]
            yield number, statement
            begin, number = token.end(), number + statement.count("\n") + 1


def _header(parsed: dict[str, Any]) -> KeyPath:
    """Path of the one table in the parsed text of `[a.b]` or `[[a.b]]`."""
    path: list[str] = []
    inner: Any = parsed
    while inner:
        if isinstance(inner, list):
            inner = cast("list[Any]", inner)[0]
        else:
            name, inner = next(iter(cast("dict[str, Any]", inner).items()))
            path.append(name)
    return tuple(path)
