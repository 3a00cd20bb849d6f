"""Next-token loss from the last hidden state, without ever holding the logits of more than a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmoe.pure.core.shape import expect_shape
from nmoe.pure.model.norm import upcast


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in the format of `total`."""
    if total.dtype is a.dtype:
        return torch.addmm(total, a, b)
    return total + a @ b


def _chunk(rows: Tensor, head: Tensor, wanted: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Of some tokens: log-share of each target [n], log-partition [n], and how to make the gradient of logits [n V].

    rows  [n D], scaled
    """
    logits = upcast(rows @ head)
    index = wanted.clamp(min=0)[:, None]
    log_share = torch.log_softmax(logits, -1)
    picked = log_share.gather(-1, index)[:, 0]
    partition = logits.gather(-1, index)[:, 0] - picked

    def gradient() -> Tensor:
        share = log_share.exp()
        if z_loss:
            share = share * (1 + 2 * z_loss * partition)[:, None]
        minus_one = -torch.ones_like(picked[:1])
        return share.scatter_add(-1, index, minus_one.expand_as(index)).to(rows.dtype)

    return picked, partition, gradient


def _gradients(
    x: Tensor, head: Tensor, target: Tensor, chunk: int, logit_scale: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss [N D] and [D V], by operations that can be differentiated again."""
    of_x: list[Tensor] = []
    of_head = torch.zeros_like(head, dtype=upcast(x[:0]).dtype)
    for rows, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
        counted = (wanted >= 0)[:, None]
        rows = torch.where(counted, rows * logit_scale, 0)
        gradient = _chunk(rows, head, wanted, z_loss)[2]()
        of_x.append(torch.where(counted, gradient @ head.T * logit_scale, 0))
        of_head = _accumulate(of_head, rows.T, gradient)
    return torch.cat(of_x), of_head.to(head.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass: three products, no logits kept.

    A backward pass that is itself differentiated, as those of `torch.func` are, computes the gradients again by
    operations autograd can follow: the ones made in the forward pass are constants to it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        head: Tensor,
        target: Tensor,
        chunk: int,
        logit_scale: float,
        z_loss: float,
        wanted_by: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_x, wants_head = wanted_by
        total = upcast(x.new_zeros(()))
        nll = total
        x_gradients: list[Tensor] = []
        head_gradient = torch.zeros_like(head, dtype=total.dtype) if wants_head else head.new_empty(0)
        for rows, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
            counted = wanted >= 0
            # ignored rows are zero in every product, whatever they hold: NaN * 0 is NaN
            rows = torch.where(counted[:, None], rows * logit_scale, 0)
            picked, partition, make = _chunk(rows, head, wanted, z_loss)
            loss = z_loss * partition.square() - picked if z_loss else -picked  # 0 * infinity is NaN
            nll = nll - torch.where(counted, picked, 0).sum()
            total = total + torch.where(counted, loss, 0).sum()
            if wants_x or wants_head:
                gradient = make()
                # ignored rows drop out of the narrow factors, which spares a pass over the wide one
                x_gradients.append(torch.where(counted[:, None], gradient @ head.T * logit_scale, 0))
                if wants_head:
                    head_gradient = _accumulate(head_gradient, rows.T, gradient)
        x_gradient = torch.cat(x_gradients) if x_gradients else x.new_empty(0)
        return total, nll, x_gradient, head_gradient.to(head.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, head, target, ctx.chunk, ctx.logit_scale, ctx.z_loss, _ = inputs
        _, nll, x_gradient, head_gradient = output
        ctx.mark_non_differentiable(nll, x_gradient, head_gradient)
        ctx.save_for_backward(x, head, target, x_gradient, head_gradient)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, head, target, x_gradient, head_gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            x_gradient, head_gradient = _gradients(x, head, target, ctx.chunk, ctx.logit_scale, ctx.z_loss)
        grad_output = outputs[0]
        wants_x, wants_head = ctx.needs_input_grad[:2]
        return (
            (x_gradient * grad_output).to(x_gradient.dtype) if wants_x else None,
            (head_gradient * grad_output).to(head_gradient.dtype) if wants_head else None,
            *[None] * 5,
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
    Cost:    6·N·D·V FLOPs with both gradients, 2·N·D·V without; chunk·V fp32 logits. Any derivative is right; one of a
             derivative computes the gradients a second time.
    """
    remedy = "pass one id a row, negative where it does not count"
    expect_shape("linear_cross_entropy: expected targets", target.shape, x.shape[:1], remedy)
    grad = torch.is_grad_enabled()
    wanted_by = (grad and x.requires_grad, grad and head.requires_grad)
    total, nll, _, _ = LinearCrossEntropy.apply(x, head, target, chunk, logit_scale, z_loss, wanted_by)
    return total, nll


def token_losses(
    x: Tensor, head: Tensor, target: Tensor, *, chunk: int, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, for scoring: without gradients.

    x        [N D]
    head     [D V]
    target   [N] i64
    chunk    tokens whose logits are held at once
    returns  [N] f32 in nats, and [N] bool: whether no other token is likelier
    """
    losses: list[Tensor] = []
    likeliest: list[Tensor] = []
    for rows, wanted in zip(x.split(chunk), target.split(chunk), strict=True):
        logits = upcast((rows * logit_scale) @ head)
        picked = logits.gather(-1, wanted[:, None])[:, 0]
        losses.append(logits.logsumexp(-1) - picked)
        likeliest.append(picked >= logits.amax(-1))
    return torch.cat(losses), torch.cat(likeliest)
