"""What a run reads: corpus, tokenizer, held-out batches, and the n-gram baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nmoe.config import Config
from nmoe.config.data_mixture import load_mixture
from nmoe.config.sections import Mixture, Stdlib
from nmoe.effects.data import stdlib
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.loader import Source, held_out, num_held_out, open_loader, open_stream
from nmoe.effects.data.mixture import Blend, plan_blend
from nmoe.effects.data.store import shards
from nmoe.effects.data.store.lazy import open_lazily
from nmoe.effects.parallel.launch import Launch
from nmoe.effects.terminal import say
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data import ngram
from nmoe.pure.data import order as mixture
from nmoe.pure.data import stages as stream
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch

NGRAM_TOKENS = 10_000_000
"""Training tokens the unigram and bigram models count at most."""


@attrs.frozen(kw_only=True)
class Corpus:
    """What a run reads."""

    identity: str  # hash of the manifest, or of the plan of a mixture
    tokenizer: tokenizers.Tokenizer
    read: Callable[[int], Batch]
    stream: stream.Stream | None  # plan of a mixture
    held: tuple[Batch, ...]
    num_tokens: int  # training tokens of one pass over everything
    unigram: float  # nats a held-out token of a model that knows only frequencies
    bigram: float  # the same knowing the previous token


def open_corpus(config: Config, launch: Launch) -> Corpus:
    """Prepare what the config names, if need be, and open it."""
    source, train = config.data.source, config.train
    shape: dict[str, Any] = {
        "microbatch_size": train.microbatch_size,
        "sequence_length": train.sequence_length,
        "rank": launch.rank,
        "world": launch.world,
    }
    if isinstance(source, Mixture):
        return _mixed(config, planned_blend(config, source), shape)
    folder = (
        stdlib.prepare(launch.home, source.tokenizer_size, say) if isinstance(source, Stdlib) else Path(source.path)
    )
    train_split = shards.open_split(folder, "train", config.model.vocab_size)
    held_split = shards.open_split(folder, "validation", config.model.vocab_size)
    tokenizer = tokenizers.load(folder)
    shape["end_of_text"] = tokenizer.end_of_text if train.document_mask else None
    held = held_out(held_split, num_tokens=config.validation.tokens, **shape)
    seen = shards.read(train_split, 0, min(train_split.num_tokens, NGRAM_TOKENS))
    told = shards.read(held_split, 0, _num_held(held_split, config.validation.tokens, train.sequence_length) + 1)
    return Corpus(
        identity=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        tokenizer=tokenizer,
        stream=None,
        read=open_loader(train_split, batch_size=train.batch_size, key=Key(config.run.seed).fold("data"), **shape),
        held=held,
        num_tokens=train_split.num_tokens,
        unigram=ngram.unigram_loss(seen, told, config.model.vocab_size),
        bigram=ngram.bigram_loss(seen, told, config.model.vocab_size),
    )


def planned_blend(config: Config, source: Mixture) -> Blend:
    """The plan of the mixture that a config names.

    Raises:  InputError when the mixture is wrong, does not fit the model, or is shorter than the training.
    """
    train, c = config.train, config.model
    active = make_blueprint(config).parameters.active
    blend = plan_blend(
        load_mixture(Path(source.path)), source.flow, sequence_length=train.sequence_length, active_parameters=active
    )
    problems: list[str] = []
    if c.vocab_size < (size := blend.manifests[0].tokenizer_size):
        problems.append(
            f"model.vocab_size: at least the tokenizer's {size}, got {c.vocab_size}; set it to {size} or more"
        )
    if (steps := blend.stream.windows() // train.batch_size) < train.steps:
        problems.append(
            f"train.steps: at most {steps}, which flow {source.flow} of {source.path} has tokens for, got "
            f"{train.steps}; lower it or raise the tokens of the flow"
        )
    if problems:
        raise InputError(*problems)
    return blend


def _mixed(config: Config, blend: Blend, shape: dict[str, Any]) -> Corpus:
    """The corpus of a mixture; validation and n-gram baselines take each source in the parts that training does."""
    train, vocab_size = config.train, config.model.vocab_size
    tokenizer = tokenizers.load(blend.folders[0])
    shape = {**shape, "end_of_text": tokenizer.end_of_text if train.document_mask else None}
    splits, held_splits = (
        [open_lazily(folder, manifest, name) for folder, manifest in zip(blend.folders, blend.manifests, strict=True)]
        for name in ("train", "validation")
    )
    parts = [sum(stage.quotas[index] for stage in blend.stream.stages) for index in range(len(splits))]
    used = [index for index, part in enumerate(parts) if part]
    tokens = dict(zip(used, _shares(config.validation.tokens, [parts[index] for index in used]), strict=True))
    held = {index: held_out(held_splits[index], num_tokens=tokens[index], **shape) for index in used}
    told = [
        _first(held_splits[index], _num_held(held_splits[index], tokens[index], train.sequence_length) + 1)
        for index in used
    ]
    seen = [
        _first(splits[index], num)
        for index, num in zip(used, _shares(NGRAM_TOKENS, [parts[index] for index in used]), strict=True)
    ]
    return Corpus(
        identity=stream.identity(blend.stream),
        stream=blend.stream,
        tokenizer=tokenizer,
        read=open_stream(
            splits, blend.stream, batch_size=train.batch_size, key=Key(config.run.seed).fold("data"), **shape
        ),
        held=tuple(batch for batches in held.values() for batch in batches),
        num_tokens=sum(splits[index].num_tokens for index in used),
        unigram=ngram.unigram_loss(np.concatenate(seen), np.concatenate(told), vocab_size),
        bigram=ngram.bigram_loss(np.concatenate(seen), np.concatenate(told), vocab_size),
    )


def _num_held(split: Source, num_tokens: int, sequence_length: int) -> int:
    """Targets that all ranks together validate on."""
    return num_held_out(split, num_tokens=num_tokens, sequence_length=sequence_length) * sequence_length


def _shares(total: int, parts: Sequence[int]) -> tuple[int, ...]:
    """`total` in proportion to `parts`."""
    return mixture.quotas(parts, total, [total] * len(parts))


def _first(split: Source, num: int) -> np.ndarray:
    """At most the first `num` tokens of a split."""
    taken: list[np.ndarray] = []
    for array in split.tokens:
        if num <= 0:
            break
        taken.append(array[:num])
        num -= len(array)
    return np.concatenate(taken)
