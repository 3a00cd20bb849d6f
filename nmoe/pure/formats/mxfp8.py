"""MXFP8: e4m3 codes, and a power of two (e8m0) for each 32 values along the axis that a product sums over."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_divisor, expect_shape
from nmoe.pure.formats.e4m3 import LARGEST

BLOCK = 32
"""Values that share a scale."""

BIAS = 127
"""Exponent 0 has this code; 255 is NaN."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each block of 32 to e4m3, scaled by the smallest power of two that keeps its amax within 448.

    Rounded up, as the `cvt.rp` of Blackwell: with the floor of the OCP specification the largest values of a block
    saturate, and trainings diverged. A block that holds an infinity or a NaN has the scale NaN.

    x        [... C]   C a multiple of 32
    returns  [... C] e4m3, and [... C/32] u8, the biased exponents
    Raises:  ValueError for other sizes.
    Source:  OCP MX v1.0; Mishra et al. (arXiv:2506.08027), section 3, for the rounding.
    """
    expect_divisor("mxfp8.quantise: expected blocks of 32", BLOCK, x.shape[-1], "columns")
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    bits = (amax / LARGEST).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # of a subnormal quotient 2**-127 is bit 22; every quotient of a finite amax is below 2**120
    up = mantissa > torch.where(exponent == 0, 0x400000, 0)
    exponent = torch.where(amax.isfinite(), exponent + up, 255)
    # exponent 0, a block below 448 * 2**-127: its values are left as they are, which is less than the smallest code
    factor = torch.where(exponent == 0, 1.0, torch.exp2((BIAS - exponent).float()))
    scaled = torch.where(exponent[..., None] == 255, torch.nan, blocks * factor[..., None])
    codes = scaled.clamp(-LARGEST, LARGEST).type(torch.float8_e4m3fn)
    return codes.flatten(-2), exponent.to(torch.uint8)


def dequantise(codes: Tensor, exponent: Tensor) -> Tensor:
    """What `quantise` rounded to, in fp32; exact in bf16 too.

    Raises:  ValueError for exponents of another shape.
    """
    wanted = (*codes.shape[:-1], codes.shape[-1] // BLOCK)
    expect_shape("mxfp8.dequantise: expected exponents", exponent.shape, wanted, "pass one a block of 32")
    return codes.float() * torch.exp2(exponent.float() - BIAS).repeat_interleave(BLOCK, -1)
