"""Ten trillion tokens in ten thousand shards: planned and opened while a person waits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nmoe.bench.empty_mixture import write_empty_mixture
from nmoe.config.data_mixture import load_mixture
from nmoe.effects.data.loader import open_stream
from nmoe.effects.data.mixture import plan_mixture
from nmoe.effects.data.store.shards import open_split
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.data.order import taken

SOURCES, SHARDS, TOKENS = 20, 500, 1_000_000_000


@pytest.mark.long
def test_ten_trillion_tokens(tmp_path: Path) -> None:
    mixture = write_empty_mixture(tmp_path, sources=SOURCES, shards=SHARDS, tokens=TOKENS, flow_tokens=10**13)

    began = time.process_time()
    data = plan_mixture(load_mixture(mixture), "full_train", sequence_length=4096, active_parameters=0)
    planned = time.process_time()
    opened_splits = [
        open_split(path, manifest, "train") for path, manifest in zip(data.folders, data.manifests, strict=True)
    ]
    sizes_ = {"batch_size": 1024, "microbatch_size": 8, "sequence_length": 4096}
    read = open_stream(opened_splits, data.stream, rank=3, world=128, key=Key(0), **sizes_)
    opened = time.process_time()

    assert planned - began < 20 and opened - began < 50  # 1 and 2 s of a quiet core; hours one window at a time
    (stage,) = data.stream.stages
    assert stage.turns.count == sum(stage.quotas) == 10**13 // 4096
    counts = taken(stage.turns, 10**9, SOURCES)
    assert max(abs(c - 10**9 * q / stage.turns.count) for c, q in zip(counts, stage.quotas, strict=True)) < 1.7
    # what is on the disk is not what the receipts say, and nobody trains on it
    with pytest.raises(InputError, match="header"):
        read(1_000_000)
