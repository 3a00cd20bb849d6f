"""Next-token loss from the last hidden state, without ever holding the logits of more than a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmoe.pure.model.norm import wide

IGNORED = -1
"""A target that does not count. Any negative one is ignored."""


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in the format of `total`."""
    if total.dtype is a.dtype:
        return torch.addmm(total, a, b)
    return total + a @ b


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass: three products, no logits kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, target: Tensor, chunk: int, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_head = ctx.needs_input_grad[:2]
        total = wide(x.new_zeros(()))
        nll = total
        x_gradients: list[Tensor] = []
        head_gradient = torch.zeros_like(head, dtype=total.dtype) if wants_head else head
        minus_one = -torch.ones_like(total)
        for rows, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
            rows = rows * logit_scale
            logits = wide(rows @ head)
            counted = wanted >= 0
            index = wanted.clamp(min=0)[:, None]
            log_share = torch.log_softmax(logits, -1)
            picked = log_share.gather(-1, index)[:, 0]
            partition = logits.gather(-1, index)[:, 0] - picked
            nll = nll - torch.where(counted, picked, 0).sum()
            total = total + torch.where(counted, z_loss * partition.square() - picked, 0).sum()
            if wants_x or wants_head:
                gradient = log_share.exp()
                if z_loss:
                    gradient = gradient * (1 + 2 * z_loss * partition)[:, None]
                gradient = gradient.scatter_add(-1, index, minus_one.expand_as(index)).to(x.dtype)
                # ignored rows drop out of the narrow factors, which spares a pass over the wide one
                weight = counted[:, None].to(x.dtype)
                x_gradients.append(gradient @ head.T * (weight * logit_scale))
                if wants_head:
                    head_gradient = accumulate(head_gradient, (rows * weight).T, gradient)
        ctx.save_for_backward(torch.cat(x_gradients) if x_gradients else x, head_gradient.to(head.dtype))
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_gradient, head_gradient = ctx.saved_tensors
        grad_output = outputs[0]
        wants_x, wants_head = ctx.needs_input_grad[:2]
        return (
            (x_gradient * grad_output).to(x_gradient.dtype) if wants_x else None,
            (head_gradient * grad_output).to(head_gradient.dtype) if wants_head else None,
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x: Tensor, head: Tensor, target: Tensor, *, chunk: int, logit_scale: float = 1.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(logit_scale * x @ head)`, summed over the targets that count.

    x        [N D]
    head     [D V]
    target   [N] i64   negative: ignored
    chunk    tokens whose logits are held at once
    z_loss   weight of the squared log-partition (PaLM, arXiv:2204.02311, section 5)
    returns  (total, nll): scalars f32; `total` includes the z-loss and carries the gradient, `nll` is for reading
    Cost:    6·N·D·V FLOPs with both gradients, 2·N·D·V without; chunk·V fp32 logits.
    """
    return LinearCrossEntropy.apply(x, head, target, chunk, logit_scale, z_loss)
