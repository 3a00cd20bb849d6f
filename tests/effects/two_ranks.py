"""Two processes over gloo that save one training together; `test_long_resume.py` starts them.

The trainer itself runs on one rank in this version, so both processes take the same steps of it; what they share out is
the state, in files of their own: each a half of every tensor, or its own experts and a half of the rest.
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

from nmoe.effects import buffers, resume, run
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.effects.identity import Identity
from nmoe.effects.loader import open_loader
from nmoe.effects.runtime import Runtime
from nmoe.effects.seen import Seen
from nmoe.effects.step import State, make_step
from nmoe.pure import model
from nmoe.pure.key import Key
from nmoe.pure.layout import ArenaLayout, layout
from nmoe.pure.pieces import Piece, share
from nmoe.pure.retention import Keep
from tests.effects.tiny import tiny
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

    def exchange(said: str) -> Sequence[str]:
        texts: list[Any] = [None] * WORLD
        dist.all_gather_object(texts, said, group=group)
        return texts

    config = tiny(batch_size=4, microbatch_size=2, lr=3e-3, steps=STEPS)
    rt = Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)
    layouts, dims = run.arena_layouts(config), model.dims(config.model)
    this = Identity(config=config, tokenizer="t", data="d")
    length = config.train.sequence_length
    read = open_loader(
        text(config.model.vocab_size),
        batch_size=4,
        microbatch_size=2,
        sequence_length=length,
        rank=0,
        world=1,
        key=Key(0).fold("data"),
    )
    state, env = run.fresh(config, layouts, rt)
    step = make_step(config, layouts, env, rt, mark=lambda name: None)
    root = folder / "checkpoints"
    losses: list[str] = []
    with open_writer(Disk(), root, keep=Keep(last=STEPS), rank=rank, world=WORLD, exchange=exchange) as writer:
        for _ in range(STEPS):
            state, metrics = step(state, read(state.cursor))
            losses.append(float(metrics.loss).hex())
            pieces = [share(piece, rank, WORLD) for piece in resume.pieces(state, layouts, dims)]
            writer.save(pieces, step=state.step, meta=resume.meta(state, Seen(), this))
        writer.wait()
    end = [piece.tensor.clone() for piece in resume.pieces(state, layouts, dims)]

    for entry in reader.entries(Disk(), root)[1:]:
        assert entry.manifest is not None and len(entry.manifest.files) == WORLD
        again, _ = run.blank(config, layouts, rt)
        targets = resume.pieces(again, layouts, dims)
        reader.load_(Disk(), root / entry.name, entry.manifest, targets, rank=rank, exchange=exchange)
        again = attrs.evolve(again, step=entry.manifest.step, cursor=entry.manifest.meta["cursor"])
        while again.step < STEPS:
            again, metrics = step(again, read(again.cursor))
            assert float(metrics.loss).hex() == losses[again.step - 1], (entry.name, again.step)
        for piece, tensor in zip(resume.pieces(again, layouts, dims), end, strict=True):
            assert torch.equal(piece.tensor, tensor), (entry.name, piece.name)
    experts_of_its_own(config, layouts, state, rank, root, folder / "experts", exchange, this)
    dist.barrier()
    dist.destroy_process_group()
    print("held")


def experts_of_its_own(
    config: Any,
    layouts: tuple[ArenaLayout, ...],
    state: State,
    rank: int,
    root: Path,
    other: Path,
    exchange: Any,
    this: Identity,
) -> None:
    """Load each rank's experts alone, save them, and find every digest as it was."""
    dims = model.dims(config.model)
    specs = model.specs(config.model)
    halved = layout(specs, dims, compute="fp32", moments="fp32", accumulate=True, world=WORLD)
    blank = attrs.evolve(
        run.blank(config, layouts, Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0))[0]
    )
    held = attrs.evolve(blank, arenas=buffers.allocate(halved, torch.device("cpu")))

    def mine() -> list[Piece]:
        found = resume.pieces(held, halved, dims, rank=rank, world=WORLD)
        whole = {piece.name for piece in found if piece.tensor.numel() == torch.Size(piece.shape).numel()}
        return [share(piece, rank, WORLD) if piece.name in whole else piece for piece in found]

    def all_of_it(manifest: manifests.Manifest) -> Sequence[Piece]:
        return resume.pieces(held, halved, dims, rank=rank, world=WORLD)

    manifest = reader.restore_(Disk(), root, all_of_it, report=print, rank=rank, exchange=exchange)
    assert manifest is not None and manifest.step == STEPS
    full = {piece.name: piece.tensor.reshape(-1) for piece in resume.pieces(state, layouts, dims)}
    parts = 0
    for piece in all_of_it(manifest):
        assert torch.equal(piece.tensor.reshape(-1), full[piece.name][piece.begin : piece.end()]), piece.name
        parts += piece.tensor.numel() < full[piece.name].numel()
    assert parts == 2 * 2 * 3, "two expert matrices in two blocks, value and both moments"
    with open_writer(Disk(), other, keep=Keep(last=1), rank=rank, world=WORLD, exchange=exchange) as writer:
        writer.save(mine(), step=STEPS, meta=manifest.meta)
        writer.wait()
    (entry,) = reader.entries(Disk(), other)
    assert entry.manifest is not None and entry.manifest.tensors == manifest.tensors


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
