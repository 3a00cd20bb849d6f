"""Frozen values as JSON files: written whole, read strictly."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs

from nmoe.effects import files
from nmoe.errors import InputError

T = TypeVar("T", bound=attrs.AttrsInstance)

MAX_BYTES = 1 << 30
"""Bytes of a record: the manifest of 10,000 shards has 4 MB, the plan of a million files 200 MB."""
MAX_PROBLEMS = 20
"""Problems of one file that are listed; a damaged manifest may have one a shard."""


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
    fields = read_object(path)
    if fields.get("format") != version:
        raise InputError(
            f"{path}: expected format {version}, got {str(fields.get('format', 'none'))[:80]}; "
            "prepare the data with this version of nmoe"
        )
    try:
        value = _converter().structure(fields, kind)
        same = json.loads(to_text(value)) == fields
    except cattrs.BaseValidationError as error:
        problems = cattrs.transform_error(error)
        raise InputError(
            *(
                f"{path}: expected the fields of format {version}, got {problem[:200]}; prepare the data again"
                for problem in problems[:MAX_PROBLEMS]
            )
        ) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path}: expected the fields of format {version}, got {type(error).__name__}; prepare the data again"
        ) from error
    if not same:
        raise InputError(
            f"{path}: expected numbers and texts as they were written, got another type; prepare the data again"
        )
    return value


@lru_cache(maxsize=1)
def _converter() -> cattrs.Converter:
    """The converter that knows no extra keys; it compiles a function a class once, which takes milliseconds."""
    return cattrs.Converter(forbid_extra_keys=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:  InputError when the file is absent, no regular file, larger than `MAX_BYTES` or not a JSON object.
    """
    try:
        if (size := files.regular_size(path)) > MAX_BYTES:
            raise InputError(f"{path}: expected at most {MAX_BYTES} bytes, got {size}; prepare the data again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {error.strerror}; prepare the data") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {str(error)[:200]}; prepare the data again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}; prepare the data again")
    return value
