"""Sums of which many programs have parts and that are the same, bit for bit, whoever adds first.

A part is rounded to a whole number of a unit and added to 64 bits by an atomic addition, which is associative. The unit
is a power of two found on the device: with a bound B on what one part can be and at most 2^n parts of a sum, it is at
least B·2^(n - 62), so that no sum leaves its 64 bits, and a part is rounded by less than B·2^(n - 61). Every part is
held against the bound where it is added. One that is beyond it, infinite, or no number makes all sums NaN, so that none
is ever finite and wrong.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = tl.constexpr(-126)
"""Exponent of the smallest unit: of fp32's smallest normal number."""

BLOCK = 1024


@triton.jit
def unit_kernel(most, fixed, wrong, number, bits, block_n: tl.constexpr):
    """The unit of sums of at most 2^bits parts, each at most twice the largest of `most`: a power of two.

    most   [number] f32, not negative
    fixed  [2] f32   one over the unit, and the unit
    wrong  [1] i32   1 if there is no such number, else 0
    """
    largest = tl.zeros([block_n], tl.float32)
    bad = tl.zeros([block_n], tl.int32)
    for n in tl.range(0, number, block_n):
        at = n + tl.arange(0, block_n)
        value = tl.load(most + at, mask=at < number, other=0.0)
        finite = value < float("inf")
        largest = tl.maximum(largest, tl.where(finite, value, 0.0))
        bad += (~finite).to(tl.int32)
    # 2^(exponent - 126) is above the largest; twice for what rounding adds; 2^-126 is the smallest unit
    exponent = (tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) - 126 + 1
    exponent = tl.maximum(exponent + bits - 62, SMALLEST)
    tl.store(fixed, ((127 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(fixed + 1, ((127 + exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(wrong, (tl.sum(bad, 0) > 0).to(tl.int32))


@triton.jit
def add_parts_(sums, wrong, value, limit, at, stride, channel, inside):
    """Adds whole numbers to rows of sums [n stride], whoever comes first; says so if one is beyond the limit, or none.

    `stride` is not known to the compiler, which would give each thread two neighbours and halve what a sector carries.
    """
    large = (~(tl.abs(value) <= limit)).to(tl.int32)
    found = tl.max(large, 1)
    tl.store(wrong + found * 0, found, mask=found > 0)
    tl.atomic_add(
        sums + at.to(tl.int64)[:, None] * stride + channel[None, :], value.to(tl.int64), inside, sem="relaxed"
    )


@triton.jit
def total_kernel(sums, fixed, wrong, out, number, block_n: tl.constexpr):
    """Sums in the output's format; none is a number if one addend was not."""
    at = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    value = tl.load(sums + at, mask=at < number, other=0).to(tl.float32) * tl.load(fixed + 1)
    value = tl.where(tl.load(wrong) > 0, float("nan"), value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < number)


@attrs.frozen(kw_only=True)
class Sums:
    """Sums of one sequence's rows, in units."""

    rows: Tensor  # [T C] i64
    fixed: Tensor  # [2] f32
    wrong: Tensor  # [1] i32
    bits: int

    @classmethod
    def of(cls, most: Tensor, parts: int, shape: tuple[int, int], borrowed: Tensor) -> Sums:
        """Sums of at most `parts` parts each, every one at most twice the largest of `most`.

        most      [...] f32, not negative
        borrowed  memory that nobody uses until these sums are read for the last time; of its end they take what they
                  need, or memory of their own if that is more
        """
        bits = (parts - 1).bit_length()
        fixed = torch.empty(2, dtype=torch.float32, device=most.device)
        wrong = torch.empty(1, dtype=torch.int32, device=most.device)
        unit_kernel[(1,)](most, fixed, wrong, most.numel(), bits, block_n=BLOCK)
        begin = begin_of(borrowed, shape)
        if begin < 0:
            rows = torch.empty(shape, dtype=torch.int64, device=most.device)
        else:
            size = shape[0] * shape[1] * 8 // borrowed.element_size()
            rows = borrowed.view(-1)[begin : begin + size].view(torch.int64).view(shape)
        return cls(rows=rows, fixed=fixed, wrong=wrong, bits=bits)

    def arguments(self) -> dict[str, Any]:
        """What a kernel that adds is given."""
        limit = 2.0 ** (62 - self.bits)
        return {
            "sums": self.rows,
            "fixed": self.fixed,
            "wrong": self.wrong,
            "limit": limit,
            "stride": self.rows.shape[1],
        }

    def write_(self, out: Tensor) -> None:
        """Writes:  out [T C], the sums in its format."""
        number = out.numel()
        total_kernel[(triton.cdiv(number, BLOCK),)](self.rows, self.fixed, self.wrong, out, number, block_n=BLOCK)


def begin_of(borrowed: Tensor, shape: tuple[int, int]) -> int:
    """First element of `borrowed` that the sums take, -1 where there are too few."""
    a_sum = 8 // borrowed.element_size()
    begin = (borrowed.numel() - shape[0] * shape[1] * a_sum) // a_sum * a_sum
    return max(begin, -1)
