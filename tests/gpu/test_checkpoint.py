"""A save from a GPU: what was there when it began, digested where it lies, in as much pinned memory as it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.reader import restore_
from nmoe.effects.checkpoint.writer import open_writer
from nmoe.pure.checkpoint.digest import BLOCK, GPU_ROWS, digests
from nmoe.pure.checkpoint.pieces import Piece, whole
from nmoe.pure.checkpoint.retention import Keep

pytestmark = pytest.mark.gpu


def values(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several sizes and formats; one is longer than what a digest handles at once."""
    draw = torch.Generator("cuda").manual_seed(seed)
    return {
        "a": torch.randn(BLOCK * (GPU_ROWS + 3) * 2 + 5, generator=draw, device="cuda"),
        "b": torch.randn(3, 1001, generator=draw, device="cuda").bfloat16(),
        "c": torch.randint(-(2**15), 2**15, (77,), dtype=torch.int16, generator=draw, device="cuda"),
        "d": torch.tensor(seed, device="cuda"),
    }


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [whole(*each) for each in tensors.items()]


def test_what_is_saved_is_what_was_there_though_the_gpu_went_on(tmp_path: Path) -> None:
    tensors, expected = values(1), values(1)
    with open_writer(Disk(), tmp_path / "checkpoints", keep=Keep()) as writer:
        buffer = writer.reserve(pieces(tensors))
        assert buffer.is_pinned() and buffer.numel() == sum(each.nbytes for each in tensors.values())
        for step in (1, 2):
            writer.save(pieces(tensors), step=step, meta={})
            writer.staged()  # the GPU waits, this thread does not
            for tensor in tensors.values():
                tensor.zero_()
            if step == 1:
                for name, tensor in values(1).items():
                    tensors[name].copy_(tensor)
        assert writer.reserve(pieces(tensors)) is buffer
    assert not buffer.is_pinned()
    found = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    manifest = restore_(Disk(), tmp_path / "checkpoints", lambda _: pieces(found), report=pytest.fail)
    assert manifest is not None and manifest.step == 2
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_digest_is_the_same_on_both_devices() -> None:
    parts = [(tensor, begin) for tensor, begin in zip(values(2).values(), (0, 7, 123_456, 0), strict=True)]
    assert digests(parts).tolist() == digests([(tensor.cpu(), begin) for tensor, begin in parts]).tolist()
