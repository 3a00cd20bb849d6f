"""What a run reads: batches, held-out batches, the tokenizer, and the losses of n-gram baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np

from nmoe.config import Config
from nmoe.config.sections import Mixture
from nmoe.effects.data.loader import held_out, num_held_out, open_stream
from nmoe.effects.data.mixture import plan_data
from nmoe.effects.data.store.blocks import Blocks
from nmoe.effects.data.store.shards import open_split
from nmoe.effects.data.tokenizer import Tokenizer, load
from nmoe.effects.parallel.launch import Launch
from nmoe.pure.core.key import Key
from nmoe.pure.data import ngram, order
from nmoe.pure.data.stages import Recipe, Stream, plan
from nmoe.pure.model.model import Batch

# Training tokens that the n-gram baselines count at most; they are read, and their blocks hashed, before step 1.
NGRAM_TOKENS = 10_000_000

ENDLESS = 1 << 62
"""Windows of a stream that does not end; the most that `order.windows` takes."""


@attrs.frozen(kw_only=True)
class Corpus:
    """What a run reads.

    identity    hash of everything that decides which tokens are read, but for the seed
    stream      the plan of a data mixture; None for one source
    num_tokens  training tokens of one pass over everything that is read
    unigram     nats a held-out token of a model that knows only frequencies
    bigram      the same knowing the previous token
    """

    identity: str
    tokenizer: Tokenizer
    read: Callable[[int], Batch]
    stream: Stream | None
    held: tuple[Batch, ...]
    num_tokens: int
    unigram: float
    bigram: float
    blocks: Sequence[Blocks]  # of the files that this rank owns, of what is read


def open_corpus(config: Config, launch: Launch, left_out: tuple[tuple[int, int], ...] = ()) -> Corpus:
    """Prepare what the config names, if need be, and open it.

    Validation and n-gram baselines take of each source the part that training does; of one source they take all.

    left_out  stretches of the training stream that are not read
    Raises:  InputError when the data can not be read or does not fit the model and the training.
    """
    train, vocab_size, length = config.train, config.model.vocab_size, config.train.sequence_length
    data = plan_data(config, launch.home)
    tokenizer = load(data.folders[0])
    shape: dict[str, Any] = {
        "microbatch_size": train.microbatch_size,
        "sequence_length": length,
        "rank": launch.rank,
        "world": launch.world,
        "end_of_text": tokenizer.end_of_text if train.document_mask else None,
    }
    # Numbered through, so that sources of one shard each have several owners.
    splits, held_splits = (
        [
            open_split(folder, manifest, name, rank=launch.rank - number, world=launch.world)
            for number, (folder, manifest) in enumerate(zip(data.folders, data.manifests, strict=True))
        ]
        for name in ("train", "validation")
    )
    quotas = [sum(stage.quotas[index] for stage in data.stream.stages) for index in range(len(splits))]
    used = [index for index, quota in enumerate(quotas) if quota]
    parts = [quotas[index] for index in used]
    held: list[Batch] = []
    counted: list[np.ndarray] = []
    judged: list[np.ndarray] = []
    for index, num_counted, num_judged in zip(
        used, _shares(NGRAM_TOKENS, parts), _shares(config.validation.tokens, parts), strict=True
    ):
        split, held_split = splits[index], held_splits[index]
        held += held_out(held_split, num_tokens=num_judged, **shape)
        counted.append(order.stretch(split.tokens, 0, min(num_counted, split.num_tokens)))
        windows = num_held_out(held_split, num_tokens=num_judged, sequence_length=length)
        judged.append(order.stretch(held_split.tokens, 0, windows * length + 1))
    return Corpus(
        identity=data.identity,
        tokenizer=tokenizer,
        read=open_stream(
            splits,
            attrs.evolve(_read_stream(config, data.stream), left_out=left_out),
            batch_size=train.batch_size,
            key=Key(config.run.seed).fold("data"),
            **shape,
        ),
        stream=attrs.evolve(data.stream, left_out=left_out) if isinstance(config.data.source, Mixture) else None,
        held=tuple(held),
        num_tokens=sum(splits[index].num_tokens for index in used),
        unigram=ngram.unigram_loss(np.concatenate(counted), np.concatenate(judged), vocab_size),
        bigram=ngram.bigram_loss(np.concatenate(counted), np.concatenate(judged), vocab_size),
        blocks=[each for index in used for split in (held_splits[index], splits[index]) for each in split.blocks()],
    )


def _read_stream(config: Config, stream: Stream) -> Stream:
    """What is read: one source without an end, because the cursor of a resumed run was counted with other batches."""
    if isinstance(config.data.source, Mixture):
        return stream
    return plan(stream.ingredients, [Recipe(name="train", windows=ENDLESS, weights=(1.0,))])


def _shares(total: int, parts: Sequence[int]) -> tuple[int, ...]:
    """`total` in proportion to `parts`."""
    return order.quotas(parts, total, [total] * len(parts))
