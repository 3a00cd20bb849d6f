"""Ten trillion tokens in ten thousand shards: planned and opened while a person waits."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from nmoe.config.mixture import load_mixture
from nmoe.effects.data import lazy
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.blend import plan_blend
from nmoe.effects.data.format import Manifest, Receipt, SplitReceipt, sizes, stem
from nmoe.effects.data.records import to_text, write_record
from nmoe.effects.loader import open_stream
from nmoe.errors import InputError
from nmoe.pure.key import Key
from nmoe.pure.mixture import taken

SOURCES, SHARDS, TOKENS = 20, 500, 1_000_000_000


def shard(where: Path, index: int, identity: str, tokens: int) -> Receipt:
    """Files of the right sizes, empty on the disk."""
    receipt = Receipt(
        tokens=tokens,
        documents=1000,
        bytes=4 * tokens,
        sha256=hashlib.sha256(f"{where} {index}".encode()).hexdigest(),
        ends_sha256="0" * 64,
        tokenizer_identity=identity,
    )
    for name, size in sizes(index, receipt, lazy.dtype_of(280)).items():
        with open(where / name, "wb") as file:
            os.truncate(file.fileno(), size)
    (where / f"{stem(index)}.json").write_text(to_text(receipt))
    return receipt


@pytest.mark.long
def test_ten_trillion_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(["some words and some more words\n" * 9] * 40, 270, lambda text: None)
    for source in range(SOURCES):
        folder = tmp_path / f"s{source}"
        splits: dict[str, SplitReceipt] = {}
        for split, number, tokens in (("train", SHARDS, TOKENS), ("validation", 1, 100_000)):
            (folder / split).mkdir(parents=True)
            receipts = tuple(shard(folder / split, index, tokenizer.identity, tokens) for index in range(number))
            splits[split] = SplitReceipt(
                tokens=number * tokens, documents=number * 1000, bytes=4 * number * tokens, shards=receipts
            )
        tokenizers.save(tokenizer, folder)
        manifest = Manifest(
            format=1, tokenizer_identity=tokenizer.identity, tokenizer_size=tokenizer.size, splits=splits
        )
        write_record(folder / "manifest.json", manifest)
    text = "".join(f'[sources.s{index}]\npath = "s{index}"\npretrain = {index + 1}.0\n' for index in range(SOURCES))
    (tmp_path / "mix.toml").write_text(f"{text}[flows.full_train]\ntokens = 10_000_000_000_000\n")

    began = time.process_time()
    blend = plan_blend(load_mixture(tmp_path / "mix.toml"), "full_train", sequence_length=4096, active_parameters=0)
    planned = time.process_time()
    opened_splits = [
        lazy.open_lazily(path, each, "train") for path, each in zip(blend.folders, blend.manifests, strict=True)
    ]
    sizes_ = {"batch_size": 1024, "microbatch_size": 8, "sequence_length": 4096}
    read = open_stream(opened_splits, blend.stream, rank=3, world=128, key=Key(0), **sizes_)
    opened = time.process_time()

    assert planned - began < 2 and opened - began < 5
    (stage,) = blend.stream.stages
    assert stage.turns.count == sum(stage.quotas) == 10**13 // 4096
    counts = taken(stage.turns, 10**9, SOURCES)
    assert max(abs(c - 10**9 * q / stage.turns.count) for c, q in zip(counts, stage.quotas, strict=True)) < 1.7
    # what is on the disk is not what the receipts say, and nobody trains on it
    with pytest.raises(InputError, match="header"):
        read(1_000_000)
