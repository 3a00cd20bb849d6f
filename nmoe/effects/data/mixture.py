"""Plan of what a config reads: a data mixture file and the folders it names, or one folder, a mixture of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import attrs

from nmoe.config import Config
from nmoe.config.data_mixture import STAGES, DataMixture, Flow, load_mixture
from nmoe.config.sections import Mixture, Stdlib
from nmoe.effects import files
from nmoe.effects.data import stdlib
from nmoe.effects.data.store.format import Manifest, read_manifest
from nmoe.effects.data.store.shards import content_digest, split_problems
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.data import order
from nmoe.pure.data.stages import Ingredient, Recipe, Stream, identity, plan, single_source
from nmoe.pure.model.blueprint import make_blueprint


@attrs.frozen(kw_only=True)
class DataPlan:
    """What is read, and in which order.

    folders   in the order of the stream's ingredients
    identity  hash of everything that decides which tokens are read, but for the seed
    """

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    stream: Stream
    identity: str


def plan_data(config: Config, home: Path) -> DataPlan:
    """The plan of what a config names; the embedded corpus is prepared below `home` when it is not there yet.

    Raises:  InputError when a source can not be read, does not fit the model, or holds less than the training reads.
    """
    source, train, vocab_size = config.data.source, config.train, config.model.vocab_size
    if isinstance(source, Mixture):
        data = plan_mixture(
            load_mixture(files.expanded(source.path)),
            source.flow,
            sequence_length=train.sequence_length,
            active_parameters=make_blueprint(config).parameters.active,
        )
    else:
        folder = (
            stdlib.prepare(home, source.tokenizer_size, say)
            if isinstance(source, Stdlib)
            else files.expanded(source.path)
        )
        data = plan_folder(folder, sequence_length=train.sequence_length, windows=train.steps * train.batch_size)
    problems: list[str] = []
    if vocab_size < (size := data.manifests[0].tokenizer_size):
        problems.append(
            f"model.vocab_size: expected at least the tokenizer's {size}, got {vocab_size}; set it to {size} or more"
        )
    if isinstance(source, Mixture) and (steps := data.stream.windows() // train.batch_size) < train.steps:
        problems.append(
            f"train.steps: expected at most {steps}, which flow {source.flow} of {source.path} has tokens for, got "
            f"{train.steps}; lower it or raise the tokens of the flow"
        )
    if problems:
        raise InputError(*problems)
    return data


def plan_folder(folder: Path, *, sequence_length: int, windows: int) -> DataPlan:
    """The plan of one folder, read for `windows` windows of `sequence_length` tokens, as many passes as that takes.

    Raises:  InputError as `read_manifests`, or when the folder is shorter than one window.
    """
    (manifest,) = _long_enough((folder,), sequence_length)
    return DataPlan(
        folders=(folder,),
        manifests=(manifest,),
        stream=single_source(_num_windows(manifest, sequence_length), windows, content_digest(manifest, "train")),
        # of the manifest, not of the stream: a longer training of the same source resumes from a shorter one
        identity=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
    )


def plan_mixture(mixture: DataMixture, flow: str, *, sequence_length: int, active_parameters: int) -> DataPlan:
    """The plan of one flow of a data mixture.

    sequence_length    tokens of a window
    active_parameters  of the model, for a flow whose length is in tokens a parameter

    Raises:  InputError as `plan_folder`, or when there is no such flow, or the sources do not hold what it asks for.
    """
    chosen: Flow | None = getattr(mixture.flows, flow)
    if chosen is None:
        has = ", ".join(field.name for field in attrs.fields(type(mixture.flows)) if getattr(mixture.flows, field.name))
        raise InputError(
            f"data.source.flow: expected one of the flows {has or 'none'} of {mixture.path}, got {flow}; choose one"
        )
    folders = tuple(mixture.path.parent / files.expanded(part.path) for part in mixture.parts.values())
    manifests = _long_enough(folders, sequence_length)
    ingredients = tuple(
        Ingredient(
            name=name,
            windows=_num_windows(manifest, sequence_length),
            max_passes=min(1.0, part.max_passes or 1.0) if part.at_end == "stop" else part.max_passes,
            content=content_digest(manifest, "train"),
        )
        for (name, part), manifest in zip(mixture.parts.items(), manifests, strict=True)
    )
    tokens = chosen.tokens if chosen.tokens is not None else int((chosen.tokens_per_parameter or 0) * active_parameters)
    total = tokens // sequence_length
    lengths = order.quotas([getattr(chosen, stage) for stage in STAGES], total, [total] * len(STAGES))
    recipes = [_recipe(mixture, stage, windows, manifests) for stage, windows in zip(STAGES, lengths, strict=True)]
    stream = plan(ingredients, recipes)
    return DataPlan(folders=folders, manifests=manifests, stream=stream, identity=identity(stream))


def read_manifests(folders: Sequence[Path]) -> tuple[Manifest, ...]:
    """The manifests of folders that are read together.

    Raises:  InputError when one can not be read, lacks or has too many shard files, or has another tokenizer.
    """
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
        f"{folder}: expected the tokenizer of {folders[0]}, {manifests[0].tokenizer_identity[:12]}, got "
        f"{manifest.tokenizer_identity[:12]}; prepare both with one tokenizer"
        for folder, manifest in zip(folders, manifests, strict=True)
        if manifest.tokenizer_identity != manifests[0].tokenizer_identity
    ]
    if problems:
        raise InputError(*problems)
    return tuple(manifests)


def _long_enough(folders: Sequence[Path], sequence_length: int) -> tuple[Manifest, ...]:
    """The manifests of folders that hold one window each at least."""
    manifests = read_manifests(folders)
    if short := [
        f"{folder}: expected at least {sequence_length + 1} training tokens, one window, got "
        f"{manifest.splits['train'].tokens}; lower train.sequence_length or prepare more text"
        for folder, manifest in zip(folders, manifests, strict=True)
        if _num_windows(manifest, sequence_length) < 1
    ]:
        raise InputError(*short)
    return manifests


def _num_windows(manifest: Manifest, sequence_length: int) -> int:
    """Windows of one pass over the training split."""
    return (manifest.splits["train"].tokens - 1) // sequence_length


def _recipe(mixture: DataMixture, stage: str, windows: int, manifests: Sequence[Manifest]) -> Recipe:
    """What the data mixture says of one stage."""
    weights = tuple(
        float(manifest.splits["train"].tokens) if (weight := getattr(part, stage)) is None else weight
        for part, manifest in zip(mixture.parts.values(), manifests, strict=True)
    )
    about = getattr(mixture.stages, stage)
    return Recipe(
        name=stage, windows=windows, weights=weights, temperature=about.temperature, max_share=about.max_share
    )
