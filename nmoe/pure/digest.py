"""A tensor's digest that does not depend on how the tensor is split: integers only, on whatever device holds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["digest", "to_text"]

BLOCK = 1 << 14
"""Words of 8 bytes that share one factor; the table of the other factors stays in the second-level cache."""

WIDTH = 8 * BLOCK
"""Bytes of a block."""

CPU_ROWS = 4
"""Blocks handled at once on a CPU: what is made on the way, 512 KiB, stays there too."""

GPU_ROWS = 1 << 11
"""The same on a GPU: 256 MiB."""


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
    data = tensor.reshape(-1).view(torch.uint8)
    first = begin * tensor.element_size()
    head = min(-first % WIDTH, data.numel())
    body = (data.numel() - head) // WIDTH * WIDTH
    parts = ((0, head), (head, head + body), (head + body, data.numel()))
    return torch.stack([_rows(data[low:high], first + low) for low, high in parts]).sum()


def to_text(value: int) -> str:
    """A digest, or a sum of several, as 16 hexadecimal digits."""
    return f"{value % (1 << 64):016x}"


def _rows(data: Tensor, first: int) -> Tensor:
    """The digest of bytes `first` and on, which are whole blocks or lie within one."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    if not data.numel():
        return total
    lead = first % 8
    behind = -(lead + data.numel()) % 8
    if lead or behind:
        data = F.pad(data, (lead, behind))
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    words = words.view(-1, min(BLOCK, len(words)))
    block, place = divmod(first // 8, BLOCK)
    places = torch.arange(place, place + words.shape[1], device=data.device)
    low, high = _numbers(places), _numbers(places + BLOCK)
    on_cpu = data.device.type == "cpu"
    for rows in words.split(CPU_ROWS if on_cpu else GPU_ROWS):
        if on_cpu:  # CUDA multiplies no integer matrices
            sums = rows @ low + (rows >> 32) @ high
        else:
            sums = (rows * low).sum(1) + ((rows >> 32) * high).sum(1)
        factors = _numbers(torch.arange(block, block + len(rows), device=data.device) + (1 << 32))
        total = total + (sums * factors).sum()
        block += len(rows)
    return total


def _numbers(index: Tensor) -> Tensor:
    """An odd pseudo-random i64 for each index.

    Source:  SplitMix64 (Steele, Lea and Flood, 2014); the constants are its own, as signed numbers.
    """
    x = index * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1
