"""A mixture file and the folders it names, as the exact plan of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from nmoe.config.data_mixture import STAGES, Flow, Mixture
from nmoe.effects.data.store.format import Manifest, read_manifest
from nmoe.effects.data.store.lazy import content_digest, split_problems
from nmoe.errors import InputError
from nmoe.pure.data import order as mixtures
from nmoe.pure.data.stages import Ingredient, Recipe, Stream, plan


@attrs.frozen(kw_only=True)
class Blend:
    """What will be read: the folders in the order of the plan's ingredients, with their manifests."""

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    stream: Stream


def read_sources(mixture: Mixture) -> tuple[tuple[Path, ...], tuple[Manifest, ...]]:
    """Folders and manifests of the sources of a mixture.

    Raises:  InputError when one can not be read, lacks or has too many shard files, or has another tokenizer.
    """
    folders = tuple(mixture.path.parent / part.path for part in mixture.parts.values())
    manifests: list[Manifest] = []
    problems: list[str] = []
    for folder in folders:
        try:
            manifests.append(read_manifest(folder))
        except InputError as error:
            problems += error.problems
            continue
        for split in ("train", "validation"):
            problems += split_problems(folder, manifests[-1], split)
    if problems:
        raise InputError(*problems)
    problems = [
        f"{folder}: the tokenizer of {folders[0]}, {manifests[0].tokenizer_identity[:12]}, got "
        f"{manifest.tokenizer_identity[:12]}; prepare both with one tokenizer"
        for folder, manifest in zip(folders, manifests, strict=True)
        if manifest.tokenizer_identity != manifests[0].tokenizer_identity
    ]
    if problems:
        raise InputError(*problems)
    return folders, tuple(manifests)


def plan_blend(mixture: Mixture, flow: str, *, sequence_length: int, active_parameters: int) -> Blend:
    """The stream of one flow of a mixture.

    sequence_length    tokens of a window
    active_parameters  of the model, for a flow that is told in tokens a parameter

    Raises:  InputError as `read_sources`, or when there is no such flow, or the sources do not hold what it asks for.
    """
    chosen: Flow | None = getattr(mixture.flows, flow)
    if chosen is None:
        has = ", ".join(field.name for field in attrs.fields(type(mixture.flows)) if getattr(mixture.flows, field.name))
        raise InputError(
            f"data.source.flow: one of the flows {has or 'none'} of {mixture.path}, got {flow}; choose one"
        )
    folders, manifests = read_sources(mixture)
    ingredients = tuple(
        Ingredient(
            name=name,
            windows=(manifest.splits["train"].tokens - 1) // sequence_length,
            max_passes=min(1.0, part.max_passes or 1.0) if part.at_end == "stop" else part.max_passes,
            content=content_digest(manifest, "train"),
        )
        for (name, part), manifest in zip(mixture.parts.items(), manifests, strict=True)
    )
    if short := [
        f"{folder}: at least {sequence_length + 1} training tokens, one window, got "
        f"{manifest.splits['train'].tokens}; lower train.sequence_length or prepare more text"
        for folder, manifest, each in zip(folders, manifests, ingredients, strict=True)
        if not each.windows
    ]:
        raise InputError(*short)
    tokens = chosen.tokens if chosen.tokens is not None else int((chosen.tokens_per_parameter or 0) * active_parameters)
    total = tokens // sequence_length
    lengths = mixtures.quotas([getattr(chosen, stage) for stage in STAGES], total, [total] * len(STAGES))
    recipes = [_recipe(mixture, stage, windows, manifests) for stage, windows in zip(STAGES, lengths, strict=True)]
    return Blend(folders=folders, manifests=manifests, stream=plan(ingredients, recipes))


def _recipe(mixture: Mixture, stage: str, windows: int, manifests: Sequence[Manifest]) -> Recipe:
    """What the mixture says of one stage."""
    weights = tuple(
        float(manifest.splits["train"].tokens) if (weight := getattr(part, stage)) is None else weight
        for part, manifest in zip(mixture.parts.values(), manifests, strict=True)
    )
    about = getattr(mixture.stages, stage)
    return Recipe(
        name=stage, windows=windows, weights=weights, temperature=about.temperature, max_share=about.max_share
    )
