"""fp8 for products: e4m3 codes, and an fp32 scale for each 1 x 128 of an activation or 128 x 128 of a weight.

Codes and scales are those of torchao's blockwise fp8 training, which takes 448 / amax as the factor and its reciprocal
as the scale; `pure.formats.blocks` is the form that DeepSeek-V3's files have, with amax / 448 as the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_divisor, expect_shape

BLOCK = 128
"""Columns that share a scale; of a weight as many rows too."""

LINE = 128
"""Bytes of a cache line."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""

STEEPEST = LARGEST / 1e-12
"""Largest factor on a block: with an amax below 1e-12 it uses fewer codes, below 2e-18 it is zero."""


def quantise(x: Tensor, *, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Round each block to e4m3, scaled so that its largest magnitude is 448.

    A block that holds an infinity or a NaN has NaN in every code and in its scale: a step that computes with it is not
    finite, and changes nothing.

    x        [... R C]   C a multiple of 128, R of `rows`
    rows     of a block: 1 of an activation or gradient, 128 of a weight
    returns  [... R C] e4m3, and [... R/rows C/128] f32, code * scale = x rounded
    Raises:  ValueError for other sizes.
    Source:  DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
    """
    expect_divisor("e4m3.quantise: expected blocks of 128", BLOCK, x.shape[-1], "columns")
    expect_divisor("e4m3.quantise: expected blocks", rows, x.shape[-2], "rows")
    blocks = x.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    amax = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    # not `LARGEST / amax`, which torch computes as a product with a reciprocal, rounded twice
    factor = (torch.full_like(amax, LARGEST) / amax).clamp(max=STEEPEST)
    factor = torch.where(amax.isfinite(), factor, torch.nan)
    codes = (blocks * factor).clamp(-LARGEST, LARGEST).type(torch.float8_e4m3fn)
    return codes.flatten(-2).flatten(-3, -2), (1.0 / factor).squeeze(-1).squeeze(-2)


def row_words(width: int) -> int:
    """Words of 4 bytes of a row with its scales behind its codes, in whole cache lines of 128 bytes.

    Raises:  ValueError for a width that is no multiple of 128.
    """
    expect_divisor("e4m3.row_words: expected blocks of 128", BLOCK, width, "columns")
    return -(-(width + 4 * (width // BLOCK)) // LINE) * LINE // 4


def dequantise(codes: Tensor, scale: Tensor, *, rows: int = 1) -> Tensor:
    """What `quantise` rounded to, in fp32.

    Raises:  ValueError for scales of another shape.
    """
    *outer, height, width = codes.shape
    wanted = (*outer, height // rows, width // BLOCK)
    expect_shape("e4m3.dequantise: expected scales", scale.shape, wanted, "pass one a block")
    return codes.float() * scale.repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)
