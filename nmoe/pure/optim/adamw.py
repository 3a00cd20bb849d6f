"""Update rules, out of place: new values from old ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmoe.pure.core.tree import record


@record
class Moments:
    """What AdamW remembers of a parameter's gradients."""

    first: Tensor
    second: Tensor


def adamw(
    value: Tensor,
    gradient: Tensor,
    moments: Moments,
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
    updates   0-d   number of updates this one makes it, counted from 1
    lr        0-d f64
    returns   the new value and moments, f32
    Source:   Loshchilov & Hutter (arXiv:1711.05101) algorithm 2, as `torch.optim.AdamW` rounds it.
    """
    first = torch.lerp(moments.first.to(value.dtype), gradient, 1 - beta1)
    second = torch.addcmul(moments.second.to(value.dtype) * beta2, gradient, gradient, value=1 - beta2)
    count = updates.double()
    step = (lr / (1 - beta1**count)).to(value.dtype)
    width = (1 - beta2**count).rsqrt().to(value.dtype)
    root = torch.addcmul(value.new_full((), eps), second.sqrt(), width)
    kept = value * (1 - lr * decay) if decay else value
    return torch.addcdiv(kept, first * step, root, value=-1), Moments(first, second)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, accumulated in at least fp32 whatever their format."""
    norms = [torch.linalg.vector_norm(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Factor that brings gradients of global norm `norm` to at most `limit` (as `clip_grad_norm_`, 1e-6 included)."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as its bf16 rounding, halves away from zero, and the 16 bits that restore it.

    returns  bf16 and int16 of the shape of `value`
    """
    bits = value.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that `split` took apart, bit for bit."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)
