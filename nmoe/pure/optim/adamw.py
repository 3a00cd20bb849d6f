"""AdamW, out of place: new values from old ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape


class Moments(NamedTuple):
    """What AdamW remembers of a parameter's gradients."""

    first: Tensor
    second: Tensor


def adamw(
    value: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    *,
    updates: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> tuple[Tensor, Moments]:
    """One step of Adam with decoupled weight decay.

    value     f32   the exact parameter
    gradient  f32   already clipped
    moments   `Moments`, in any format
    updates   0-d   number of updates this one makes it, counted from 1
    lr        0-d f64
    returns   the new value and moments, f32
    Raises:   ValueError for a gradient or moments of another shape than the parameter.
    Source:   Loshchilov & Hutter (arXiv:1711.05101) algorithm 2, as `torch.optim.AdamW` rounds it.
    """
    for name, tensor in zip(("a gradient", "a first moment", "a second moment"), (gradient, *moments), strict=True):
        expect_shape(f"adamw: expected {name}", tensor.shape, value.shape, "pass one of this parameter")
    first, second = (moment.to(value.dtype) for moment in moments)
    first = torch.lerp(first, gradient, 1 - beta1)
    second = torch.addcmul(second * beta2, gradient, gradient, value=1 - beta2)
    count = updates.double()
    step = (lr / (1 - beta1**count)).to(value.dtype)
    width = (1 - beta2**count).rsqrt().to(value.dtype)
    root = torch.addcmul(value.new_full((), eps), second.sqrt(), width)
    kept = value * (1 - lr * decay) if decay else value
    return torch.addcdiv(kept, first * step, root, value=-1), Moments(first, second)
