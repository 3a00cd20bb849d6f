"""Frozen values as JSON files: written whole, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import attrs
import cattrs

from nmoe.effects import files
from nmoe.errors import InputError

T = TypeVar("T", bound=attrs.AttrsInstance)


def to_text(value: attrs.AttrsInstance) -> str:
    """The value as indented JSON, ASCII only, with a line break at the end."""
    return json.dumps(attrs.asdict(value), indent=1) + "\n"


def write_record(path: Path, value: attrs.AttrsInstance) -> None:
    """Write `value` as JSON.

    Writes:  `path`, whole or not at all.
    """
    files.write_text(path, to_text(value))


def read_record(path: Path, kind: type[T], *, version: int) -> T:
    """The value that `write_record` wrote; `kind` has an integer field `format`.

    The version is looked at before the fields, whose names may differ in another version. What was read is written
    back and compared, because cattrs would quietly turn "5" into 5.

    Raises:  InputError when the file is absent, not JSON, of another version or not exactly of this shape.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: a readable file, got {error.strerror}; prepare the data") from error
    except ValueError as error:
        raise InputError(f"{path}: a JSON file, got {error}; prepare the data again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object, got {type(found).__name__}; prepare the data again")
    if found.get("format") != version:
        raise InputError(
            f"{path}: format {version}, got {found.get('format', 'none')}; prepare the data with this version of nmoe"
        )
    try:
        value = cattrs.Converter(forbid_extra_keys=True).structure(found, kind)
    except cattrs.BaseValidationError as error:
        problems = cattrs.transform_error(error)
        raise InputError(
            *(f"{path}: the fields of format {version}, got {p}; prepare the data again" for p in problems)
        ) from error
    if json.loads(to_text(value)) != found:
        raise InputError(f"{path}: numbers and texts as they were written, got another type; prepare the data again")
    return value
