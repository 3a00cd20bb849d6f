"""Parts of tensors read from the files of two ranks: the right elements, and no damage that goes unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader, weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.manifest import stored
from nmoe.effects.checkpoint.parts import Parts
from nmoe.effects.record.names import WEIGHTS
from nmoe.errors import InputError
from nmoe.pure.checkpoint.pieces import Piece
from tests.effects.checkpoint.hf_models import MODELS, write
from tests.effects.checkpoint.test_hf import save_by_ranks

EXPERTS = "blocks.1.ffn.up"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Parts, dict[str, Tensor]]:
    """A checkpoint of two ranks, and the weights that were saved."""
    write(tmp_path / "one", MODELS["plain"], compute="bf16")
    save_by_ranks(tmp_path / "one", tmp_path / "two", world=2, chunk_bytes=700)
    (folder,) = (tmp_path / "two" / "checkpoints").glob("step-*")
    return Parts(fs=Disk(), folder=folder, manifest=manifests.read(Disk(), folder)), load_file(
        tmp_path / "one" / WEIGHTS
    )


def piece(name: str, tensor: Tensor, begin: int, end: int) -> Piece:
    """Room for some elements of a tensor."""
    empty = torch.empty(end - begin, dtype=tensor.dtype)
    return Piece(name=weights.stored_name(name), shape=tuple(tensor.shape), begin=begin, tensor=empty)


def thirds(name: str, tensor: Tensor) -> list[Piece]:
    """Room for all of a tensor, the middle last."""
    low, high = tensor.numel() // 3, 2 * tensor.numel() // 3
    return [piece(name, tensor, *span) for span in ((0, low), (high, tensor.numel()), (low, high))]


def test_parts_in_any_order_are_what_was_saved(
    saved: tuple[Parts, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no SHA-256 is computed."""
    parts, tensors = saved
    monkeypatch.setattr(reader, "verify", None)
    for name, tensor in tensors.items():
        for part in thirds(name, tensor) + thirds(name, tensor):
            parts.load_([part])
            assert torch.equal(part.tensor, tensor.view(-1)[part.begin : part.end()]), name
        again = piece(name, tensor, 1, tensor.numel())
        parts.load_([again])
        assert torch.equal(again.tensor, tensor.view(-1)[1:]), "in other parts, once all was compared"


@pytest.mark.parametrize("place", (0, 1, 2))
def test_a_changed_bit_is_seen_with_the_last_part(saved: tuple[Parts, dict[str, Tensor]], place: int) -> None:
    """Whichever part it is in; its file and its 700 bytes are named, and a tensor beside it is read all the same."""
    parts, tensors = saved
    rooms = thirds(EXPERTS, tensors[EXPERTS])
    at = rooms[place].begin
    (where,) = [one for one in stored(parts.manifest)[rooms[0].name] if one.begin <= at < one.end]
    path, offset = parts.folder / where.file, where.offset + 2 * (at - where.begin)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    parts.load_(rooms[:2])
    begin = offset // 700 * 700
    with pytest.raises(InputError, match=rf"{path}: bytes {begin} to \d+: expected what was written, got others"):
        parts.load_(rooms[2:])
    parts.load_(thirds("head", tensors["head"]))


def test_a_digest_that_no_byte_explains_names_the_tensor(saved: tuple[Parts, dict[str, Tensor]]) -> None:
    parts, tensors = saved
    name = weights.stored_name(EXPERTS)
    changed: dict[str, Any] = {**parts.manifest.tensors}
    changed[name] = attrs.evolve(changed[name], digest="0" * 16)
    parts = attrs.evolve(parts, manifest=attrs.evolve(parts.manifest, tensors=changed))
    with pytest.raises(InputError, match=f"expected digest 0000000000000000 of tensor '{name}'"):
        parts.load_(thirds(EXPERTS, tensors[EXPERTS]))


def test_a_file_that_ends_early_and_one_that_is_gone_are_named(saved: tuple[Parts, dict[str, Tensor]]) -> None:
    parts, tensors = saved
    path = parts.folder / "rank-001.safetensors"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=rf"{path}: bytes \d+ to \d+: expected to read them, got \d+ bytes; "):
        for name, tensor in tensors.items():
            parts.load_(thirds(name, tensor))
    path.unlink()
    with pytest.raises(InputError, match=rf"{path}: bytes \d+ to \d+: expected to read them, got No such file"):
        parts.load_(thirds(EXPERTS, tensors[EXPERTS]))


def test_elements_that_are_read_twice_before_the_rest_are_refused(saved: tuple[Parts, dict[str, Tensor]]) -> None:
    """They would hide those that were not read."""
    parts, tensors = saved
    size = tensors[EXPERTS].numel()
    parts.load_([piece(EXPERTS, tensors[EXPERTS], 0, size - 2)])
    with pytest.raises(ValueError, match="expected each element once, got elements"):
        parts.load_([piece(EXPERTS, tensors[EXPERTS], 0, 2)])
