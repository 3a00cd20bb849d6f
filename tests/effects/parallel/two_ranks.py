"""Two processes over gloo that save one training together; `test_long_resume.py` starts them.

Both take the same steps of it, each as if it were alone; what they share out is the state, in files of their own: each
a half of every tensor. Ranks that train as one: `test_ranks.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.effects.data.loader import open_stream
from nmoe.effects.device.process import Runtime
from nmoe.effects.train import build, resume
from nmoe.effects.train.identity import Identity
from nmoe.effects.train.step import make_step
from nmoe.pure.checkpoint.pieces import share
from nmoe.pure.checkpoint.retention import Keep
from nmoe.pure.core.key import Key
from nmoe.pure.data.stages import single_source
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.watch.validations import Validations
from tests.effects.train.tiny import tiny
from tests.golden.curve import text

STEPS = 64
WORLD = 2


def main(rank: int, folder: Path) -> None:
    """Train and save together, then go on from every step, together."""
    torch.set_num_threads(1)
    store = dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
        str(folder / "store"), WORLD
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=100))
    group = dist.new_group(backend="gloo")

    def all_gather_text(said: str) -> Sequence[str]:
        texts: list[Any] = [None] * WORLD
        dist.all_gather_object(texts, said, group=group)
        return texts

    config = tiny(batch_size=4, microbatch_size=2, lr=3e-3, steps=STEPS)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    blueprint = make_blueprint(config)
    this = Identity(config=config, tokenizer="t", data="d")
    length = config.train.sequence_length
    source = text(config.model.vocab_size)
    read = open_stream(
        [source],
        single_source((source.num_tokens - 1) // length, 4 * STEPS, content=""),
        batch_size=4,
        microbatch_size=2,
        sequence_length=length,
        rank=0,
        world=1,
        key=Key(0).fold("data"),
    )
    state, env = build.fresh(config, blueprint, rt)
    step = make_step(config, blueprint, env, rt, mark=lambda name: None)
    root = folder / "checkpoints"
    losses: list[str] = []
    with open_writer(
        Disk(), root, keep=Keep(last=STEPS), rank=rank, world=WORLD, all_gather_text=all_gather_text
    ) as writer:
        for _ in range(STEPS):
            state, metrics = step(state, read(state.cursor))
            losses.append(float(metrics.loss).hex())
            pieces = [share(piece, rank, WORLD) for piece in resume.pieces(state, blueprint)]
            writer.save(pieces, step=state.step, meta=resume.meta(state, (state.tokens,), Validations(), this))
        writer.wait()
    end = [piece.tensor.clone() for piece in resume.pieces(state, blueprint)]

    for entry in reader.entries(Disk(), root)[1:]:
        assert entry.manifest is not None and len(entry.manifest.files) == WORLD
        again, _ = build.blank(config, blueprint, rt)
        targets = resume.pieces(again, blueprint)
        reader.load_(Disk(), root / entry.name, entry.manifest, targets, rank=rank, all_gather_text=all_gather_text)
        meta = entry.manifest.meta
        (tokens,) = meta[resume.TOKENS]
        again = attrs.evolve(again, step=entry.manifest.step, cursor=meta["cursor"], tokens=tokens)
        while again.step < STEPS:
            again, metrics = step(again, read(again.cursor))
            assert float(metrics.loss).hex() == losses[again.step - 1], (entry.name, again.step)
        for piece, tensor in zip(resume.pieces(again, blueprint), end, strict=True):
            assert torch.equal(piece.tensor, tensor), (entry.name, piece.name)
    dist.barrier()
    dist.destroy_process_group()
    print("held")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
