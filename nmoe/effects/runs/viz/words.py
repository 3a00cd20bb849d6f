"""Events in words: what happened as a sentence, not the fields of its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmoe.effects.runs.viz.api import number
from nmoe.pure.units import quantity

PLACE = ("time", "event", "attempt", "step", "severity")
"""Fields that have columns of their own."""


def text(event: str, fields: Mapping[str, Any]) -> str:
    """What happened; of an event this version does not know, its fields.

    fields  of its line, which a stranger may have written: each may be missing, or of any type
    """
    for key in ("message", "problem"):
        if key in fields:
            return str(fields[key])
    match event:
        case "start":
            sizes = f"{_count(fields, 'parameters')} parameters, {_count(fields, 'active_parameters')} active a token"
            return f"{sizes}, {_count(fields, 'steps')} steps" if "parameters" in fields else _rest(fields)
        case "checkpoint" if "bytes" in fields:
            size, took = quantity(number(fields["bytes"]) or 0.0, "B"), _seconds(fields, "seconds")
            return f"{fields.get('checkpoint', '')}: {size} in {took}, training waited {_seconds(fields, 'stall_s')}"
        case "checkpoint_skipped":
            return f"not saved: it takes {_seconds(fields, 'takes_s')}, {_seconds(fields, 'within_s')} are left"
        case "validation":
            loss, bits = (_digits(fields, key) for key in ("loss", "bits_per_byte"))
            return f"{loss} nats/token, {bits} bits/byte, over {_count(fields, 'tokens')} tokens"
        case "evaluation" if isinstance(scores := fields.get("scores"), Mapping):
            return ", ".join(f"{task} {_digits(x, 'value')}" for task, x in scores.items() if isinstance(x, Mapping))
        case "sample":
            return f"{str(fields.get('prompt', ''))!r} continued: {' '.join(str(fields.get('text', '')).split())[:80]}"
        case "mixture":
            return f"a mixture of {_entries(fields, 'sources', 'source')} in {_entries(fields, 'stages', 'stage')}"
        case "gpus":
            return f"driver {fields.get('driver', '-')}, CUDA {fields.get('cuda', '-')}"
        case "resume":
            accepted = fields.get("accepted")
            changed = ", ".join(map(str, accepted)) if isinstance(accepted, Mapping) and accepted else ""
            return f"from {fields.get('from', 'a checkpoint')}{f'; accepted another {changed}' if changed else ''}"
        case "rewind":
            return f"from step {_count(fields, 'reached')}: {_spans(fields.get('left_out'))} sequences are left out"
        case "spike":
            return f"{_count(fields, 'new')} more skipped, far above recent losses or gradient norms"
        case "nonfinite":
            return f"{_count(fields, 'new')} more not finite, {_count(fields, 'in_row')} in a row"
        case "end":
            why = fields.get("error") or fields.get("signal")
            return (
                f"{fields.get('status', 'ended')}, exit code {fields.get('exit_code', '-')}{f': {why}' if why else ''}"
            )
        case _:
            return str(fields["error"]) if "error" in fields else _rest(fields)


def _rest(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_plain(v)}" for key, v in fields.items() if key not in PLACE)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) + ")"
    if isinstance(value, list):
        return f"({len(value)} entries)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(fields: Mapping[str, Any], key: str) -> str:
    value = number(fields.get(key))
    return "-" if value is None else f"{value:,.0f}" if abs(value) < 1e6 else quantity(value)


def _digits(fields: Mapping[str, Any], key: str) -> str:
    value = number(fields.get(key))
    return "-" if value is None else f"{value:.4f}"


def _seconds(fields: Mapping[str, Any], key: str) -> str:
    value = number(fields.get(key))
    return "-" if value is None else f"{value:.3g} s"


def _spans(value: Any) -> str:
    """How many sequences a list of [first, end] has."""
    spans = value if isinstance(value, list) else []
    ends = [[number(part) or 0.0 for part in span] for span in spans if isinstance(span, list) and len(span) == 2]
    return f"{sum(end - first for first, end in ends):,.0f}"


def _entries(fields: Mapping[str, Any], key: str, noun: str) -> str:
    value = fields.get(key)
    count = len(value) if isinstance(value, list) else 0
    return f"{count} {noun}{'' if count == 1 else 's'}"
