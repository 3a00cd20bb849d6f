"""Randomness that low precision needs, made on the device that uses it: noise from a counter, and a random rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.key import Key
from nmoe.pure.core.shape import expect_divisor

WIDTH = 16
"""Values that a Hadamard transform mixes."""

WORD = 0xFFFFFFFF


def noise(key: Key, salt: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform multiples of 2**-24 in [0, 1), a function of key, salt and index: no generator, and nothing waits.

    salt     0-d i64 on the device of the result: what differs from call to call
    shape    of the result, in f32
    """
    seed, numel = key.seed(), torch.Size(shape).numel()
    word = mix((salt & WORD) ^ (seed & WORD))
    word = mix(word ^ ((salt >> 32) & WORD) ^ (seed >> 32))
    # an index in two halves: the upper one is that of 2**32 places, and is mixed once for all of them
    high = mix(word ^ torch.arange((numel >> 32) + 1, device=salt.device))
    words = mix(high[:, None] ^ torch.arange(min(numel, WORD + 1), device=salt.device))
    return ((words >> 8).float() * 2.0**-24).flatten()[:numel].view(shape)


def salt(x: Tensor) -> Tensor:
    """The sum of a tensor's bits as fp32, 0-d i64: differs from step to step and layer to layer as the values do."""
    return x.detach().float().view(torch.int32).sum(dtype=torch.int64)


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in i64, under which every bit of the result depends on every bit of `word`.

    Source:  the finaliser of MurmurHash3 (Appleby), with the shifts and factors that Wellons searched for least bias.
    """
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def signs(key: Key, like: Tensor) -> Tensor:
    """One random sign for each place of a Hadamard transform [16] f32, on the device of `like`; the same in every call.

    Source:  NVIDIA (arXiv:2509.25149), section 4.2: one vector serves all layers.
    """
    none = torch.zeros((), dtype=torch.int64, device=like.device)
    return torch.where(noise(key, none, (WIDTH,)) < 0.5, -1.0, 1.0)


def hadamard(x: Tensor, sign: Tensor) -> Tensor:
    """Random rotation of each 16 values: x diag(sign) H / 4, so that an outlier is shared out among 16.

    Of two factors rotated along the axis that their product sums over, the product is as before.

    x        [... C]   C a multiple of 16
    sign     [16]
    returns  [... C] f32
    Raises:  ValueError for other sizes.
    """
    expect_divisor("hadamard: expected blocks of 16", WIDTH, x.shape[-1], "columns")
    y = x.float().unflatten(-1, (-1, WIDTH)) * sign
    for half in (1, 2, 4, 8):
        low, high = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((low + high, low - high), -2).flatten(-3)
    return (y / WIDTH**0.5).flatten(-2)
