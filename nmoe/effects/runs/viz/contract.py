"""The contract of server and page: the page gets `contract()` and wraps what it reads.

A field of another name is an error there, not a blank.
"""

from __future__ import annotations

import json
import typing
from typing import Any

import attrs

from nmoe.effects.runs.viz import api

ANSWERS = (
    *(api.Runs, api.Series, api.Events, api.Layers, api.Experts, api.Load, api.Timing, api.Gpus),
    *(api.Evaluations, api.Samples, api.Configs, api.Folders, api.Mixture),
    *(api.Document, api.Problems, api.Checkpoints, api.Console),
)


def contract() -> dict[str, dict[str, str]]:
    """Class -> field -> the class of what it holds, empty for plain values."""
    records: dict[str, dict[str, str]] = {}
    waiting = list(ANSWERS)
    while waiting:
        cls = waiting.pop()
        if cls.__name__ not in records:
            hints = typing.get_type_hints(cls)
            inner = {name: _record(hint) for name, hint in hints.items()}
            records[cls.__name__] = {
                name: inner_record.__name__ if inner_record else "" for name, inner_record in inner.items()
            }
            waiting += [inner_record for inner_record in inner.values() if inner_record]
    return dict(sorted(records.items()))


def _record(hint: Any) -> type | None:
    """The record in a type: itself, or what a list of it holds."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if attrs.has(kind)), None)


def to_json(answer: Any) -> bytes:
    """An answer as JSON."""
    return json.dumps(answer, default=_fields, allow_nan=False, separators=(",", ":")).encode()


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in attrs.fields(type(record))}
