"""The one rule for names of runs, for those a user writes and those made from a config's file name."""

from __future__ import annotations

import re

RULE = "up to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LABEL = 100
"""Characters of a label: with the start time, and what files beside the folder are called, 255 bytes are enough."""


def is_run_name(text: str) -> bool:
    """Whether a run folder may be called so: `RULE`."""
    return _NAME.fullmatch(text) is not None


def label(stem: str) -> str:
    """The first part of a run's name, from the name of its config without the suffix: what `RULE` excludes is left out
    or becomes a '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_")[:_LABEL] or "run"
