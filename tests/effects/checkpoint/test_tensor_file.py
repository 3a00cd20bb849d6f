"""Safetensors files that are written while they are made, beside those that safetensors itself writes and reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nmoe.effects.checkpoint import tensor_file
from nmoe.effects.checkpoint.tensor_file import Format, Room
from nmoe.errors import InputError

NAMES = {dtype: name for name, dtype in tensor_file.DTYPES.items()}


def write(path: Path, formats: dict[str, Format], parts: Iterable[Tensor]) -> None:
    with tensor_file.flushing() as flush:
        tensor_file.write(path, formats, parts, flush)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


@pytest.mark.parametrize("room", (16, 64, 1000, 1 << 20))
def test_tensors_of_every_layout_are_those_of_safetensors(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed, columns of wider ones, three axes, of no element, none of its rows within the room; a word of four
    bytes behind an odd number of two."""
    monkeypatch.setattr(tensor_file, "ROOM_BYTES", room)
    tensors = {
        "odd": numbers(3, dtype=torch.bfloat16),
        "word": numbers(5),
        "matrix": numbers(6, 40, dtype=torch.bfloat16).T,
        "columns": numbers(6, 40, dtype=torch.bfloat16)[:, 3:30].T,
        "three": numbers(4, 5, 6).transpose(0, 2),
        "none": numbers(0, 4),
        "one": torch.tensor(3.0),
        "byte": numbers(7).to(torch.float8_e4m3fn),
    }
    formats: dict[str, Format] = {name: (NAMES[each.dtype], tuple(each.shape)) for name, each in tensors.items()}
    write(tmp_path / "ours", formats, tensors.values())
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float()) and found[name].dtype == tensor.dtype, name


def test_a_part_may_change_when_the_next_is_asked_for(tmp_path: Path) -> None:
    def parts() -> Iterable[Tensor]:
        held = torch.empty(50)
        for value in range(20):
            yield held.fill_(value)

    write(tmp_path / "ours", {"rows": ("F32", (20, 50))}, parts())
    assert torch.equal(load_file(tmp_path / "ours")["rows"], numbers(20)[:, None].expand(20, 50))


@pytest.mark.parametrize("count", (1, 3))
def test_other_parts_than_the_formats_say_are_a_defect(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 32 bytes of tensors"):
        write(tmp_path / "ours", {"rows": ("F32", (2, 4))}, [numbers(4)] * count)


def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says once that it lost what was written; handles are given back."""
    flushed: list[int] = []

    def fails(handle: int) -> None:
        flushed.append(handle)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "ours", {"rows": ("F32", (4,))}, [numbers(4)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(flushed[0])


def test_what_is_read_is_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"b": numbers(5, 3, dtype=torch.bfloat16), "a": numbers(2, 3, 4), "empty": numbers(0, 2)}
    save_file(tensors, tmp_path / "theirs")
    room = Room()
    with tensor_file.opened(tmp_path / "theirs") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name, room), tensor)
        assert torch.equal(file.read("a", room, 1), tensors["a"][1])
        assert torch.equal(file.read("b", room, 4), tensors["b"][4])


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": numbers(100)}, tmp_path / "theirs")
    with tensor_file.opened(tmp_path / "theirs") as file:
        os.truncate(tmp_path / "theirs", 300)
        with pytest.raises(InputError, match="expected to read 'a', got the end of the file; copy it again"):
            file.read("a", Room())
