"""Matrices in fp8 blocks, against the reader of `transformers` and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from nmoe.pure.formats import blocks


def test_transformers_reads_what_is_written() -> None:
    """Every block has a scale of its own: blocks differ by up to 2^20."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(256, 384, generator=generator)
    factor = torch.randint(-10, 11, (2, 3), generator=generator).float().exp2()
    matrix *= factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
    values, scale = blocks.quantise(matrix)
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale)
    assert torch.equal(blocks.dequantise(values, scale), theirs)
    assert ((theirs - matrix).abs() <= matrix.abs() * 2.0**-4 + scale.max() * 2.0**-10).all()


def test_the_largest_of_a_block_is_448_and_zeros_stay() -> None:
    matrix = torch.zeros(130, 129)
    matrix[0, 0], matrix[1, 1], matrix[129, 0] = -7.0, 3.5, 1e-30
    values, scale = blocks.quantise(matrix)
    assert scale.tolist() == [[7 / 448, 1.0], [pytest.approx(1e-30 / 448), 1.0]]
    assert (values[0, 0].item(), values[1, 1].item(), values[129, 0].item()) == (-448, 224, 448)
    assert values.float().count_nonzero() == 3
    back = blocks.dequantise(values, scale)
    assert (back[0, 0].item(), back[1, 1].item(), back.shape) == (-7, 3.5, (130, 129))


def test_scales_of_another_shape_are_refused() -> None:
    values, scale = blocks.quantise(torch.ones(130, 129))
    with pytest.raises(ValueError, match="dequantise: expected scales"):
        blocks.dequantise(values, scale.T[:1])
