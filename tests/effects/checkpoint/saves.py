"""States whose every bit follows from one number, saved and looked for again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nmoe.effects.checkpoint.fs import Fs
from nmoe.effects.checkpoint.manifest import Manifest
from nmoe.effects.checkpoint.reader import restore_
from nmoe.effects.parallel.ranks import AllGatherText, single_rank
from nmoe.pure.checkpoint.pieces import Piece, share, whole

ROOT = Path("/checkpoints")


def values(number: int) -> dict[str, Tensor]:
    """A state: bf16 values with remainder, fp32 moments, a counter, one tensor of experts."""
    draw = torch.Generator().manual_seed(number)
    return {
        "param/up/value": torch.randn(4, 3, 5, generator=draw).bfloat16(),
        "param/up/remainder": torch.randint(-(2**15), 2**15, (4, 3, 5), dtype=torch.int16, generator=draw),
        "param/up/first": torch.randn(4, 3, 5, generator=draw),
        "param/gain/value": torch.randn(7, generator=draw),
        "updates": torch.tensor(number),
    }


def pieces(tensors: dict[str, Tensor], rank: int = 0, world: int = 1) -> list[Piece]:
    """What a rank writes of a state: its experts, and its share of what all ranks have."""
    found: list[Piece] = []
    for name, tensor in tensors.items():
        if "/up/" in name and world > 1:
            mine = tensor.chunk(world)[rank]
            found.append(Piece(name=name, shape=tuple(tensor.shape), begin=rank * mine.numel(), tensor=mine))
        else:
            found.append(share(whole(name, tensor), rank, world))
    return found


def number_in(fs: Fs, root: Path = ROOT, report: Callable[[str], None] | None = None) -> int | None:
    """The number of the state that is restored, every bit of which is compared; None when there is no checkpoint."""
    found = {name: torch.full_like(tensor, 3) for name, tensor in values(0).items()}
    said: list[str] = []
    manifest = restore_(fs, root, lambda _: [whole(*each) for each in found.items()], report=report or said.append)
    if manifest is None:
        return None
    number = manifest.meta["number"]
    wanted = values(number)
    different = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not different, f"{manifest.name()} is said to be number {number} but differs in {different}"
    return number


def manifest_in(fs: Fs, root: Path = ROOT) -> Manifest | None:
    """The manifest that is restored."""
    return restore_(fs, root, lambda _: [whole(*each) for each in values(0).items()], report=lambda problem: None)


class Ranks:
    """As many ranks as asked for, each a thread of this process, and their all-gather of texts."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=120)
        self.texts = [""] * world

    def all_gather_text(self, rank: int) -> AllGatherText:
        def give(text: str) -> Sequence[str]:
            self.texts[rank] = text
            self.barrier.wait()
            found = tuple(self.texts)
            self.barrier.wait()
            return found

        return give


def on_ranks(world: int, act: Callable[[int, AllGatherText], object]) -> list[object]:
    """What `act` returned, or the exception it raised, on each of `world` ranks at once."""
    if world == 1:
        return [act(0, single_rank)]
    ranks = Ranks(world)
    results: list[object] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = act(rank, ranks.all_gather_text(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextlib.contextmanager
def failing(fs, operations: Sequence[str], at: int, act: Callable[[int], int | None]) -> Iterator[list[str]]:
    """Do `act` instead of operation number `at` of those named; what it is given is the bytes to read or write.

    returns  the operations that came by, so that a caller knows when `at` was never reached
    """
    seen: list[str] = []

    def before(operation: str, size: int) -> int | None:
        if operation not in operations:
            return None
        seen.append(operation)
        return act(size) if len(seen) - 1 == at else None

    fs.before = before
    try:
        yield seen
    finally:
        fs.before = lambda operation, size: None
