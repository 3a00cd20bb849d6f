"""A corpus of any size that is empty on the disk: receipts and files of the right lengths, to time what reads those."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.store.format import Manifest, Receipt, SplitReceipt, dtype_of, sizes, stem
from nmoe.effects.data.store.records import to_text, write_record

VALIDATION_TOKENS = 100_000


def write_empty_mixture(folder: Path, *, sources: int, shards: int, tokens: int, flow_tokens: int) -> Path:
    """A mixture of `sources` sources of `shards` shards of `tokens` tokens each, weighted 1, 2, 3 and so on.

    flow_tokens  of its only flow, "full_train"
    returns      the mixture file
    Writes:      `folder`; the files of tokens have holes and take no room.
    """
    tokenizer = tokenizers.train(["some words and some more words\n" * 9] * 40, 270, lambda text: None)
    for source in range(sources):
        splits = {
            split: _split(folder / f"s{source}" / split, number, size, tokenizer.identity)
            for split, number, size in (("train", shards, tokens), ("validation", 1, VALIDATION_TOKENS))
        }
        tokenizers.save(tokenizer, folder / f"s{source}")
        manifest = Manifest(
            format=1, tokenizer_identity=tokenizer.identity, tokenizer_size=tokenizer.size, splits=splits
        )
        write_record(folder / f"s{source}" / "manifest.json", manifest)
    text = "".join(f'[sources.s{index}]\npath = "s{index}"\npretrain = {index + 1}.0\n' for index in range(sources))
    path = folder / "mix.toml"
    path.write_text(f"{text}[flows.full_train]\ntokens = {flow_tokens}\n", encoding="utf-8")
    return path


def _split(folder: Path, shards: int, tokens: int, identity: str) -> SplitReceipt:
    folder.mkdir(parents=True)
    receipts = tuple(_shard(folder, index, tokens, identity) for index in range(shards))
    return SplitReceipt(tokens=shards * tokens, documents=shards * 1000, bytes=4 * shards * tokens, shards=receipts)


def _shard(folder: Path, index: int, tokens: int, identity: str) -> Receipt:
    receipt = Receipt(
        tokens=tokens,
        documents=1000,
        bytes=4 * tokens,
        sha256=hashlib.sha256(f"{folder} {index}".encode()).hexdigest(),
        ends_sha256="0" * 64,
        tokenizer_identity=identity,
    )
    for name, size in sizes(index, receipt, dtype_of(280)).items():
        with open(folder / name, "wb") as file:
            os.truncate(file.fileno(), size)
    (folder / f"{stem(index)}.json").write_text(to_text(receipt), encoding="utf-8")
    return receipt
