"""What people write about a run: a note, tags, and that it is not to be listed; in `notes.json` of the run folder.

No other file of the run is touched, and no other part of nmoe reads this one: a run trains and resumes the same with
and without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nmoe.effects import files
from nmoe.effects.record.names import NOTES
from nmoe.effects.record.reading import json_object, read_bytes
from nmoe.errors import InputError

MAX_NOTE = 10_000
"""Characters of a note."""

MAX_TAGS = 32
MAX_TAG = 60
"""Tags of a run, and characters of a tag."""


@attrs.frozen(kw_only=True)
class Notes:
    """What people wrote about a run."""

    note: str = ""
    tags: tuple[str, ...] = ()
    hidden: bool = False


def read(folder: Path) -> Notes:
    """The notes of a run; empty ones where nobody wrote any.

    Raises:  InputError when the file is none that `write` makes.
    """
    path = folder / NOTES
    try:
        fields = json_object(read_bytes(path))
    except FileNotFoundError:
        return Notes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the notes of a run, got {error}; fix or remove the file") from error
    return changed(Notes(), fields, str(path))


def changed(notes: Notes, fields: Mapping[str, Any], where: str) -> Notes:
    """`notes` with other values of some fields; tags without blanks around them, each once.

    Raises:  InputError for another field, type or length.
    """
    unknown = [key for key in fields if key not in ("note", "tags", "hidden")]
    if unknown:
        raise InputError(f"{where}: expected the fields note, tags and hidden, got {unknown[0][:40]!r}; leave it out")
    note, tags = fields.get("note", notes.note), fields.get("tags", list(notes.tags))
    hidden = fields.get("hidden", notes.hidden)
    if not isinstance(note, str) or len(note) > MAX_NOTE or not _is_text(note):
        raise InputError(f"{where}: expected a note of at most {MAX_NOTE} characters, got another; shorten it")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and _is_text(tag) for tag in tags):
        raise InputError(f"{where}: expected a list of tags, got another; write texts")
    tags = tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
    if len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG for tag in tags):
        raise InputError(
            f"{where}: expected at most {MAX_TAGS} tags of {MAX_TAG} characters, got {len(tags)}; leave some out"
        )
    if not isinstance(hidden, bool):
        raise InputError(f"{where}: expected hidden to be true or false, got another; write one of them")
    return Notes(note=note, tags=tags, hidden=hidden)


def write(folder: Path, notes: Notes) -> None:
    """Write the notes of a run.

    Writes:  `notes.json` in the run folder, whole or not at all.
    Raises:  InputError when the folder cannot be written.
    """
    text = json.dumps({"note": notes.note, "tags": list(notes.tags), "hidden": notes.hidden}, indent=1)
    with files.refusing(folder / NOTES, "a run folder one may write"):
        files.write_text(folder / NOTES, text + "\n")


def is_editable(folder: Path) -> bool:
    """Whether this process may write into a run folder."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def _is_text(text: str) -> bool:
    """Whether a text has UTF-8: half of a surrogate pair has none."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
