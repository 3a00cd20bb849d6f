"""Resume compatibility: the identity of a run compared with that of a checkpoint, and of a rank with that of rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from nmoe.config import Config, Difference, identity_diff, identity_values
from nmoe.config.fields import every_key, flat, table
from nmoe.config.toml import closest, dotted, shown
from nmoe.effects.parallel.ranks import Ranks
from nmoe.errors import InputError

TOKENIZER, DATA = "tokenizer.identity", "data.identity"
"""Keys of what a config names and does not hold: SHA-256 of the tokenizer, and of the data's manifest."""


@attrs.frozen(kw_only=True)
class Identity:
    """What a checkpoint must agree on with a run that resumes from it: config, tokenizer, data."""

    config: Config
    tokenizer: str
    data: str


def values(identity: Identity) -> dict[str, Any]:
    """Every key of the identity with its value, as a checkpoint holds it."""
    return {**identity_values(identity.config), TOKENIZER: identity.tokenizer, DATA: identity.data}


def accepted(
    where: str, stored: Mapping[str, Any], identity: Identity, accept: Sequence[str]
) -> tuple[Difference, ...]:
    """Compare the identity of a checkpoint with that of this run; the differences, all of which the user accepts.

    where    names the checkpoint
    stored   what `values` gave when it was saved
    accept   keys that may differ

    Raises:  InputError with a line for each key that differs and is not accepted, or is accepted and does not exist.
    """
    now = values(identity)
    known = dict.fromkeys((*now, *stored))
    differences = (
        *identity_diff({key: value for key, value in stored.items() if key not in (TOKENIZER, DATA)}, identity.config),
        *(
            Difference(path=key, left=stored.get(key), right=now[key])
            for key in (TOKENIZER, DATA)
            if stored.get(key) != now[key]
        ),
    )
    problems = [
        f"--accept: expected a key that a resume has to accept, got {key}; {_hint(key, known)}"
        for key in accept
        if key not in known
    ]
    in_shares = identity.config.schedule != identity.config.schedule_in_tokens()
    fixed = {dotted(path) for path, key in every_key(Config) if key.shapes}
    for difference in differences:
        path, remedy = difference.path, "set it back, or train under another run.name"
        if in_shares and path.startswith("schedule.") and path.endswith("_tokens"):
            remedy = "set train.steps back, the schedule is in shares of the run, or train under another run.name"
        if path not in fixed:
            remedy = f"{remedy.replace(', or', ',')}, or add --accept {path} to resume all the same"
        if path in fixed or path not in accept:
            problems.append(
                f"{path}: expected {_text(difference.left)} as in {where}, got {_text(difference.right)}; {remedy}"
            )
    if problems:
        raise InputError(*problems)
    return differences


def facts(config: Config) -> dict[str, str]:
    """Every key of a config with its value, as text."""
    return {dotted(path): shown(value) for path, value in flat(table(config))}


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """All-gather the facts of the ranks, and refuse any that differ from rank 0's.

    Raises:  InputError on every rank, with a line for each rank and fact that is not as on rank 0.
    """
    by_rank: list[dict[str, str]] = [json.loads(text) for text in ranks.all_gather_text(json.dumps(facts))]
    problems = [
        f"rank {rank}: expected {name} as on rank 0, {by_rank[0].get(name, 'nothing')}, got "
        f"{theirs.get(name, 'nothing')}; start all ranks with the same code, config and data"
        for rank, theirs in enumerate(by_rank)
        for name in dict.fromkeys((*by_rank[0], *theirs))
        if theirs.get(name) != by_rank[0].get(name)
    ]
    if problems:
        raise InputError(*problems)


def _text(value: Any) -> str:
    return "nothing" if value is None else shown(value)


def _hint(key: str, known: Mapping[str, Any]) -> str:
    near = closest(key, tuple(known))
    return f"did you mean {near}?" if near else "name one that the refusal named"
