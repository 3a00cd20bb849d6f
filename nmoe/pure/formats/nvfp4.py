"""NVFP4: e2m1 codes, an e4m3 scale for each 16 values (16 x 16 of a weight), and one fp32 factor a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_divisor, expect_shape
from nmoe.pure.formats import e4m3

BLOCK = 16
"""Values that share a scale along the axis that a product sums over; of a weight as many rows too."""

LARGEST = 6.0
"""Of e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

SMALLEST_SCALE = torch.finfo(torch.float8_e4m3fn).tiny
"""2**-6, the smallest normal e4m3."""

SMALLEST_FACTOR = 2.0**-120
"""Of an amax of 2e-33; below it a matrix uses fewer codes. No reciprocal of a factor and a scale is infinite."""


def quantise(x: Tensor, *, rows: int = 1, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round to e2m1 with two levels of scales: a matrix's amax becomes 448 * 6, a block's 6.

    A matrix that holds an infinity or a NaN has the factor NaN: e2m1 itself has none.

    x        [... R C]   C a multiple of 16, R of `rows`
    rows     of a block: 1, or 16 of a weight, whose transpose then has the same values
    noise    [... R C] f32 in [0, 1): round to the upper neighbour with the probability of the distance, instead of to
             the nearest, ties to even
    returns  [... R C/2] u8, the first of two codes in the low half; [... R/rows C/16] e4m3; [...] f32
    Raises:  ValueError for other sizes.
    Source:  NVIDIA (arXiv:2509.25149), appendix C.
    """
    expect_divisor("nvfp4.quantise: expected blocks of 16", BLOCK, x.shape[-1], "columns")
    expect_divisor("nvfp4.quantise: expected blocks", rows, x.shape[-2], "rows")
    blocks = x.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    amax = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    factor = (amax.amax(dim=(-4, -3, -2, -1), keepdim=True) / (e4m3.LARGEST * LARGEST)).clamp(min=SMALLEST_FACTOR)
    factor = torch.where(factor.isfinite(), factor, torch.nan)
    scale = (amax / LARGEST / factor).clamp(SMALLEST_SCALE, e4m3.LARGEST).type(torch.float8_e4m3fn)
    # the order of torchao and its kernels: one reciprocal, then products
    scaled = blocks * ((1.0 / factor) / scale.float())
    scaled = scaled.flatten(-2).flatten(-3, -2)
    return pack(encode(scaled, noise)), scale.squeeze(-1).squeeze(-2), factor.flatten(-4).squeeze(-1)


def dequantise(packed: Tensor, scale: Tensor, factor: Tensor, *, rows: int = 1) -> Tensor:
    """What `quantise` rounded to, in fp32; without the factor it is exact in bf16 too.

    Raises:  ValueError for scales of another shape.
    """
    *outer, height, width = packed.shape
    wanted = (*outer, height // rows, 2 * width // BLOCK)
    expect_shape("nvfp4.dequantise: expected scales", scale.shape, wanted, "pass one a block")
    spread = scale.float().repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
    return decode(unpack(packed)) * spread * factor[..., None, None]


def encode(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Codes of e2m1, 0 to 15, bit 3 the sign; magnitudes above 6 become 6.

    x      f32
    noise  as of `quantise`
    """
    magnitude = x.abs().clamp(max=LARGEST)
    # Neighbours are 0.5 apart below 2, then 1, then 2: in these units a code is the magnitude plus 0, 2 or 4.
    high, top = magnitude >= 2, magnitude >= 4
    units = torch.where(top, magnitude / 2, torch.where(high, magnitude, 2 * magnitude))
    below = units.floor()
    rounded = units.round() if noise is None else below + (units - below > noise)
    code = torch.where(units.isnan(), 0.0, rounded + 2.0 * high + 2.0 * top)
    return code.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """Values of e2m1 codes, in fp32."""
    magnitude = (codes & 7).float()
    value = torch.where(magnitude >= 6, 2 * magnitude - 8, torch.where(magnitude >= 4, magnitude - 2, magnitude / 2))
    return torch.where(codes >= 8, -value, value)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes that `pack` joined."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
