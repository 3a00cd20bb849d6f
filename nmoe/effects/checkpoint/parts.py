"""Tensors of a checkpoint read part by part, straight to where they are wanted, for who never holds them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import torch

from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import reader
from nmoe.effects.checkpoint.fs import Fs, read_into
from nmoe.effects.checkpoint.manifest import Manifest, stored
from nmoe.errors import InputError
from nmoe.pure.checkpoint.digest import digest, to_text
from nmoe.pure.checkpoint.pieces import Copy, Piece, copies, gaps


@attrs.define(kw_only=True, eq=False)
class Parts:
    """Reads parts of tensors, and compares each tensor with its own digest as soon as all of it was read.

    The SHA-256 of the files take five times as long, and cover 16 MiB that hold other tensors too; they are looked at
    when a digest differs, to say which bytes it is.
    """

    fs: Fs
    folder: Path
    manifest: Manifest
    _read: dict[str, dict[tuple[int, int], int]] = attrs.field(factory=dict)  # digests of parts, until they are whole
    _right: set[str] = attrs.field(factory=set)  # tensors of which all was read

    def load_(self, pieces: Sequence[Piece]) -> None:
        """Read elements of tensors on the CPU. Until all of a tensor was read no element of it is read in two parts.

        Writes:  the pieces' tensors, which hold anything when this raises; what was read
        Raises:  InputError when the checkpoint is damaged or cannot be read.
        """
        places = stored(self.manifest)
        with ThreadPoolExecutor(reader.READERS) as pool:
            wanted = [
                (piece, copy)
                for piece in pieces
                for copy in copies(piece.begin, piece.end(), piece.tensor.element_size(), places[piece.name])
            ]
            for problem in pool.map(lambda pair: self._fill_(*pair), wanted):
                if problem:
                    raise InputError(problem)
            for piece, value in zip(pieces, pool.map(_digest, pieces), strict=True):
                self._note(piece, value)

    def _fill_(self, piece: Piece, copy: Copy) -> str:
        """Read what lies side by side in a file. returns  what is wrong, or nothing"""
        data = piece.tensor.view(-1).view(torch.uint8).numpy().data[copy.to : copy.to + copy.size]
        where = f"{self.folder / copy.file}: bytes {copy.offset} to {copy.offset + copy.size}"
        try:
            handle = self.fs.open(self.folder / copy.file)
            try:
                got = read_into(self.fs, handle, data, copy.offset)
            finally:
                self.fs.close(handle)
        except OSError as error:
            return f"{where}: expected to read them, got {error.strerror or error}; {manifests.remedy(error)}"
        return "" if got == copy.size else f"{where}: expected to read them, got {got} bytes; {manifests.DAMAGED}"

    def _note(self, piece: Piece, value: int) -> None:
        """Remember the digest of what was read, and compare the tensor's when that was all. Raises: InputError."""
        tensor, size = self.manifest.tensors[piece.name], math.prod(piece.shape)
        if piece.name in self._right and piece.tensor.numel() < size:
            return
        parts = self._read.setdefault(piece.name, {})
        parts[piece.begin, piece.end()] = value
        if sum(end - begin for begin, end in parts) < size:
            return
        if problems := gaps(size, parts):
            raise ValueError(f"'{piece.name}': expected each element once, got {problems[0]}; read it in other parts")
        if to_text(sum(parts.values())) != tensor.digest:
            problems = reader.verify(self.fs, self.folder, self.manifest)
            text = f"expected digest {tensor.digest} of tensor '{piece.name}', got another; {manifests.DAMAGED}"
            raise InputError(*(problems or (f"{self.folder}: {text}",)))
        del self._read[piece.name]
        self._right.add(piece.name)


def _digest(piece: Piece) -> int:
    return int(digest(piece.tensor, piece.begin))
