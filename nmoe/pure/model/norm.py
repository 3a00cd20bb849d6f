"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape


def upcast(x: Tensor) -> Tensor:
    """`x` in at least fp32: the format of reductions, probabilities and rotations."""
    return x if x.dtype is torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, gain: Tensor, *, eps: float) -> Tensor:
    """`x` scaled to a root mean square of one over its last axis, times `gain`.

    x        [... D]
    gain     [D]
    returns  [... D] in the format of `x`; the mean is taken in fp32
    Raises:  ValueError for a gain of another shape.
    Source:  Zhang & Sennrich (arXiv:1910.07467) eq. 4.
    """
    expect_shape("rms_norm: expected a gain", gain.shape, x.shape[-1:], "pass one a channel")
    y = upcast(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * gain).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor | tuple[()], gain: Tensor, *, eps: float, readers: int = 1) -> tuple[Tensor, ...]:
    """The residual stream with a layer's output added, and the same normed for the next layer.

    x, y     [... D]; y may be (): nothing is added
    gain     [D]
    readers  how many functions read the normed: it comes once for each, so that a kernel can add up their gradients in
             the pass that takes its own
    returns  x + y, and `rms_norm` of it for each reader; all [... D]
    Raises:  ValueError for outputs of another shape than the residual stream's.
    """
    total = x if not isinstance(y, Tensor) else add_output(x, y)
    return total, *[rms_norm(total, gain, eps=eps)] * readers


def add_output(x: Tensor, y: Tensor) -> Tensor:
    """The residual stream [... D] with the output of a layer.

    Raises:  ValueError for outputs of another shape.
    """
    expect_shape("add_rms_norm: expected y", y.shape, x.shape, "pass the output of the layer for each row of x")
    return x + y
