"""Matrices in fp8, each block of 128 x 128 with a scale of its own, as DeepSeek-V3 publishes its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.pure.core.shape import expect_shape

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix: one a block, those at the ends may be smaller."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The fp8 values and scales whose products are the matrix, rounded; the largest value of a block is 448.

    matrix   [R C]
    returns  [R C] e4m3, and [R/128 C/128] f32, rounded up; 1 for a block of zeros
    Source:  DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
    """
    blocks = _blocks(matrix.float())
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    # a scale of a tiny block is rounded: its values may be above 448 by a bit, which no fp8 number holds
    values = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return values.flatten(0, 1).flatten(1)[: matrix.shape[0], : matrix.shape[1]].type(torch.float8_e4m3fn), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The matrix [R C] in fp32 that `quantise` rounded.

    Raises:  ValueError for scales of another shape.
    """
    wanted = scale_shape(tuple(values.shape))
    expect_shape("dequantise: expected scales", scale.shape, wanted, "pass one a block of 128 x 128")
    rows, columns = values.shape
    return values.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def _blocks(matrix: Tensor) -> Tensor:
    """[R/128 128 C/128 128], filled up with zeros."""
    rows, columns = matrix.shape
    filled = F.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return filled.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
