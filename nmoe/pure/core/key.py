"""Randomness as a value: a seed and the path it was folded with."""

from __future__ import annotations

import hashlib

import attrs
import torch


@attrs.frozen
class Key:
    """Where a random number comes from.

    Keys are folded with a path, never split: what is drawn under one path depends on no other path, so a new parameter
    moves no other one. Parts are joined by NUL, so that ("ab", "c") and ("a", "bc") differ.
    """

    number: int
    path: tuple[str, ...] = ()

    def fold(self, *parts: str | int) -> Key:
        """The key one or more steps further down."""
        return Key(self.number, self.path + tuple(str(part) for part in parts))

    def seed(self) -> int:
        """63 bits that depend on the number and the whole path."""
        digest = hashlib.blake2b("\0".join((str(self.number), *self.path)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, device: str | torch.device = "cpu") -> torch.Generator:
        """A fresh generator with this key's seed; draw from it once, then drop it."""
        return torch.Generator(device=device).manual_seed(self.seed())
