"""A tensor's digest that does not depend on how the tensor is split: integers only, on whatever device holds it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 14
"""Words of 8 bytes that share one factor; the table of the other factors stays in the second-level cache."""

WIDTH = 8 * BLOCK
"""Bytes of a block."""

CPU_ROWS = 4
"""Blocks handled at once on a CPU: what is made on the way, 512 KiB, stays there too."""

GPU_ROWS = 1 << 10
"""The same on a GPU: 128 MiB."""


@attrs.frozen(kw_only=True, eq=False)
class Factors:
    """What words are multiplied by: odd i64."""

    low: Tensor  # of the places in a block, as many as there are
    high: Tensor  # the same for the shifted term
    blocks: Tensor  # of the blocks from number `first` on
    first: int


def digest(tensor: Tensor, begin: int = 0) -> Tensor:
    """The digest of elements `begin` to `begin` + numel of a flattened tensor; those of all parts add up, wrapping.

    With the bytes of the whole as little-endian 64-bit words w[i], it is the sum of w[i] r[i] + (w[i] >> 32) s[i] mod
    2**64: a multilinear hash whose coefficients are odd, so that no change within 32 bits goes unseen and any other one
    does with a chance of about 2**-32. The shifted term is there because 2**63 times any odd number is 2**63: without
    it, two changed signs would cancel. Each coefficient is a product of one number for the place in a block
    and one for the block. It finds faults, not forgery: files have SHA-256 besides.

    tensor   contiguous, any dtype and shape
    begin    in elements, of the flattened whole
    returns  0-d i64 on the tensor's device
    Source:  Lemire and Kaser, Strongly universal string hashing is fast (2014), multilinear family.
    """
    return digests([(tensor, begin)])[0]


def digests(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The `digest` of each tensor and `begin`, all on one device; what they share is made once, without a wait.

    returns  i64 [number of parts] on the tensors' device
    """
    if not parts:
        return torch.zeros(0, dtype=torch.int64)
    places = [begin * tensor.element_size() for tensor, begin in parts]
    ends = [place + tensor.nbytes for place, (tensor, _) in zip(places, parts, strict=True)]
    factors = _factors(min(places), max(ends), parts[0][0].device)
    return torch.stack([_digest(tensor, place, factors) for place, (tensor, _) in zip(places, parts, strict=True)])


def to_text(value: int) -> str:
    """A digest, or a sum of several, as 16 hexadecimal digits."""
    return f"{value % (1 << 64):016x}"


def _digest(tensor: Tensor, first: int, factors: Factors) -> Tensor:
    """The digest of a tensor whose bytes are `first` and on of the whole."""
    data = tensor.reshape(-1).view(torch.uint8)
    head = min(-first % WIDTH, data.numel())
    body = (data.numel() - head) // WIDTH * WIDTH
    spans = ((0, head), (head, head + body), (head + body, data.numel()))
    sums = [_rows(data[low:high], first + low, factors) for low, high in spans if low < high]
    return sum(sums[1:], sums[0]) if sums else torch.zeros((), dtype=torch.int64, device=data.device)


def _rows(data: Tensor, first: int, factors: Factors) -> Tensor:
    """The digest of bytes `first` and on, which are whole blocks or lie within one."""
    lead = first % 8
    behind = -(lead + data.numel()) % 8
    if lead or behind:
        data = F.pad(data, (lead, behind))
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    words = words.view(-1, min(BLOCK, len(words)))
    block, place = divmod(first // 8, BLOCK)
    low, high = (factor[place : place + words.shape[1]] for factor in (factors.low, factors.high))
    add = _row_sums_numpy if data.device.type == "cpu" else _row_sums
    sums = add(words, low, high)
    return (sums * factors.blocks[block - factors.first :][: len(sums)]).sum()


def _row_sums(words: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Each row's sum of w low + (w >> 32) high, wrapping."""
    return torch.cat([(rows * low).sum(1) + ((rows >> 32) * high).sum(1) for rows in words.split(GPU_ROWS)])


def _row_sums_numpy(words: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same on a CPU, where numpy multiplies integers about twice as fast as torch does."""
    sums, shifted = np.empty(len(words), np.int64), np.empty((min(CPU_ROWS, len(words)), words.shape[1]), np.int64)
    for begin in range(0, len(words), CPU_ROWS):
        rows = words[begin : begin + CPU_ROWS].numpy()
        upper = np.right_shift(rows, 32, out=shifted[: len(rows)])
        sums[begin : begin + len(rows)] = np.einsum("bi,i->b", rows, low.numpy())
        sums[begin : begin + len(rows)] += np.einsum("bi,i->b", upper, high.numpy())
    return torch.from_numpy(sums)


def _factors(begin: int, end: int, device: torch.device) -> Factors:
    """The factors of the bytes `begin` to `end`."""
    first = begin // WIDTH
    places = torch.arange(min(BLOCK, -(-end // 8)), device=device)
    blocks = torch.arange(first, max(-(-end // WIDTH), first + 1), device=device)
    return Factors(
        low=_numbers(places), high=_numbers(places + BLOCK), blocks=_numbers(blocks + (1 << 32)), first=first
    )


def _numbers(index: Tensor) -> Tensor:
    """An odd pseudo-random i64 for each index.

    Source:  SplitMix64 (Steele, Lea and Flood, 2014); the constants are its own, as signed numbers.
    """
    x = index * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1
