"""Secrets in texts that are kept or shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "***"

_NAMED = re.compile(
    r"(?<![A-Za-z])((?:api|access|secret|private)[-_]?key|token|secret|passw(?:or)?d|authorization|bearer)"
    r"(?![A-Za-z])([\"']?\s*(?:[:=]|\s)\s*[\"']?)((?:bearer|basic)\s+)?[^\s\"',;&]+",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://)[^/\s@]+(@)")
_PUBLISHED = re.compile(r"\b(hf_|sk-|gh[pousr]_|xox[abprs]-|AKIA|glpat-)[A-Za-z0-9_-]{8,}")
"""Prefixes by which services mark their own tokens."""
_COMMAND = re.compile(r"(--log\.alert_command=).*", re.DOTALL)


def masked(text: str) -> str:
    """A text with `***` for what follows a name such as token or password, for the user of a URL, for what looks like
    the token of a known service, and for a command, whose address may be the secret."""
    text = _COMMAND.sub(rf"\1{HIDDEN}", text)
    text = _IN_URL.sub(rf"\1{HIDDEN}\2", text)
    text = _PUBLISHED.sub(rf"\1{HIDDEN}", text)
    return _NAMED.sub(rf"\1\2\3{HIDDEN}", text)


def masked_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """An argument vector with every secret masked, also one that follows `--token` as the next argument."""
    return tuple(
        HIDDEN
        if before.startswith("-") and "=" not in before and _NAMED.fullmatch(f"{before.lstrip('-')} x")
        else masked(text)
        for before, text in zip(("", *arguments), arguments, strict=False)
    )
