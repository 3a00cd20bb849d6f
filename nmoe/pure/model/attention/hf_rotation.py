"""The rotation in the words of `config.json`: `rope_theta`, `rope_scaling`; in transformers 5 `rope_parameters`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nmoe.config import sections


def scaling(yarn: sections.Yarn | None, words: Mapping[str, str]) -> dict[str, Any] | None:
    """Their `rope_scaling`.

    words  their key -> field of Yarn
    """
    if yarn is None:
        return None
    ours = {theirs: getattr(yarn, field) for theirs, field in words.items()}
    return {"type": "yarn", **ours, **({} if yarn.truncate else {"truncate": False})}


def read(config: Mapping[str, Any], words: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """`rope_theta` and `yarn` of a section, values unchecked, and what this rotation cannot express.

    words  as of `scaling`; each has to be there
    """
    tables: dict[str, Any] = {}
    problems: list[str] = []
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given: Any = config.get(where) or {}
    if not isinstance(given, dict):
        return tables, [f"{where}: expected an object, got {json.dumps(given)}; write null for none"]
    rotation: dict[str, Any] = dict(given)
    theta: Any = rotation.pop("rope_theta", config.get("rope_theta"))
    if theta is None:
        problems.append("rope_theta: expected a number, got nothing; write it")
    else:
        tables["rope_theta"] = theta
    types: list[Any] = [rotation.pop(key) for key in ("type", "rope_type") if key in rotation]
    if types and any(name not in ("default", "yarn") for name in types):
        problems.append(f'{where}.type: expected "default" or "yarn", got {json.dumps(types[-1])}; nmoe has no other')
    if "yarn" in types:
        missing = [key for key in words if key not in rotation]
        problems += [f"{where}.{key}: expected a value, got nothing; write it" for key in missing]
        tables["yarn"] = {ours: rotation.pop(theirs) for theirs, ours in words.items() if theirs in rotation}
        if "truncate" in rotation:
            tables["yarn"]["truncate"] = rotation.pop("truncate")
    elif rotation and not types:
        problems.append(f'{where}.type: expected "yarn", got nothing; write it')
    problems += [
        f"{where}.{key}: expected a key of {'yarn' if 'yarn' in types else 'no extension'}, got {json.dumps(value)}; "
        "nmoe does not know what it does"
        for key, value in rotation.items()
        if types
    ]
    return tables, problems
