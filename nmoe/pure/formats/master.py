"""The fp32 master of a parameter as bf16 and 16 more bits, so that what is computed with needs no copy of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape

QUIET_NAN = 0x7FC00000


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as its bf16 rounding, halves away from zero, and the 16 bits that restore it.

    A NaN becomes the quiet one without payload: rounding up the payload of all ones, which NVIDIA's hardware makes,
    would carry into the sign and give -0.

    returns  bf16 and int16 of the shape of `value`
    Raises:  ValueError for another format: its bits would be taken for those of other numbers.
    """
    if value.dtype is not torch.float32:
        raise ValueError(f"split: expected an fp32 tensor, got {value.dtype}; pass value.float()")
    bits = torch.where(value.isnan(), QUIET_NAN, value.view(torch.int32))
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that `split` took apart, bit for bit but for the payload of a NaN.

    Raises:  ValueError for what `split` did not make.
    """
    expect_shape("join: expected a remainder", remainder.shape, rounded.shape, "pass the two tensors of one `split`")
    if (rounded.dtype, remainder.dtype) != (torch.bfloat16, torch.int16):
        raise ValueError(
            f"join: expected tensors in bf16 and i16, got {rounded.dtype} and {remainder.dtype}; pass what `split` made"
        )
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)
