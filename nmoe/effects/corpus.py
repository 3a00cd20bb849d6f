"""What a run reads: corpus, tokenizer, held-out batches, and the yardsticks a model has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import attrs

from nmoe.config import Config
from nmoe.config.sections import Stdlib
from nmoe.effects import runtime
from nmoe.effects.data import shards, stdlib
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.loader import held_out, open_loader
from nmoe.effects.log import say
from nmoe.pure import ngram
from nmoe.pure.key import Key
from nmoe.pure.model import Batch

__all__ = ["Corpus", "open_corpus"]

YARDSTICK_TOKENS = 10_000_000
"""Training tokens the unigram and bigram models count at most."""


@attrs.frozen(kw_only=True)
class Corpus:
    """What a run reads."""

    identity: str  # hash of the manifest
    tokenizer: tokenizers.Tokenizer
    read: Callable[[int], Batch]
    held: tuple[Batch, ...]
    train: shards.Split
    unigram: float  # nats a held-out token of a model that knows only frequencies
    bigram: float  # the same knowing the previous token


def open_corpus(config: Config, launch: runtime.Launch) -> Corpus:
    """Prepare what the config names, if need be, and open it."""
    source, train = config.data.source, config.train
    folder = (
        stdlib.prepare(launch.home, source.tokenizer_size, say) if isinstance(source, Stdlib) else Path(source.path)
    )
    train_split = shards.open_split(folder, "train", config.model.vocab_size)
    held_split = shards.open_split(folder, "validation", config.model.vocab_size)
    shape = {
        "microbatch_size": train.microbatch_size,
        "sequence_length": train.sequence_length,
        "rank": launch.rank,
        "world": launch.world,
    }
    held = held_out(held_split, num_tokens=config.validation.tokens, **shape)
    seen = shards.read(train_split, 0, min(train_split.num_tokens, YARDSTICK_TOKENS))
    num_held = sum(batch.targets.numel() for batch in held)
    told = shards.read(held_split, 0, num_held + 1)
    return Corpus(
        identity=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        tokenizer=tokenizers.load(folder),
        read=open_loader(train_split, batch_size=train.batch_size, key=Key(config.run.seed).fold("data"), **shape),
        held=held,
        train=train_split,
        unigram=ngram.unigram_loss(seen, told, config.model.vocab_size),
        bigram=ngram.bigram_loss(seen, told, config.model.vocab_size),
    )
