"""`pure.loss.linear_cross_entropy` on a GPU: three products by cuBLAS, one kernel between them.

The kernel turns the logits of a chunk of tokens into their gradient where they lie, so that nothing wider than the
input's format is ever as large as tokens times vocabulary.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order


@attrs.frozen(kw_only=True)
class LogitsTile:
    """Block size and launch options of the cross-entropy kernel."""

    block_n: int  # logits of a row at once
    num_warps: int
    num_stages: int


TILE = LogitsTile(block_n=8192, num_warps=8, num_stages=1)
"""A row of 201,088 logits is longer than a block can be; 8,192 at once have 5 spill instructions and are faster so."""


@triton.jit
def cross_entropy_kernel(
    logits,  # [rows vocabulary], rows `stride` apart; the gradient afterwards
    target,  # [rows] i64
    losses,  # [2 *] f32: total, nll; the second `losses_stride` after the first
    stride,
    losses_stride,
    vocabulary,
    scale,
    z_loss,
    wants_gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    logits += row * stride
    at = tl.arange(0, block)
    blocks = tl.cdiv(vocabulary, block)
    if wanted < 0:
        tl.store(losses + row, 0.0)
        tl.store(losses + losses_stride + row, 0.0)
        if wants_gradient:
            for i in range(0, blocks):
                zeros = tl.zeros((block,), dtype=logits.dtype.element_ty)
                tl.store(logits + i * block + at, zeros, mask=i * block + at < vocabulary)
    else:
        picked = tl.load(logits + wanted).to(tl.float32) * scale
        most = tl.full((), float("-inf"), tl.float32)
        parts = tl.zeros((block,), dtype=tl.float32)  # added up once, at the end
        for i in range(0, blocks):
            here = i * block + at
            x = tl.load(logits + here, mask=here < vocabulary, other=float("-inf")).to(tl.float32) * scale
            higher = tl.maximum(most, tl.max(x, 0))
            parts = parts * tl.exp(most - higher) + tl.exp(x - higher)
            most = higher
        partition = most + tl.log(tl.sum(parts, 0))
        nll = partition - picked
        tl.store(losses + row, nll + z_loss * partition * partition)
        tl.store(losses + losses_stride + row, nll)
        if wants_gradient:
            grad_output = (1.0 + 2.0 * z_loss * partition) * scale
            for i in range(0, blocks):
                # last block first: what was read last is still in the L2 cache; the whole loss takes 1.09 x its GEMMs
                here = (blocks - 1 - i) * block + at
                x = tl.load(logits + here, mask=here < vocabulary, other=float("-inf")).to(tl.float32) * scale
                gradient = tl.exp(x - partition) * grad_output - tl.where(here == wanted, scale, 0.0)
                tl.store(logits + here, gradient.to(logits.dtype.element_ty), mask=here < vocabulary)


def logits_to_gradient_(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    *,
    logit_scale: float,
    z_loss: float,
    wants_gradient: bool,
    tile: LogitsTile = TILE,
) -> None:
    """Losses of rows of logits before `logit_scale`; the logits become the gradient of the summed total.

    One block a row, a row read twice and written once; the second time comes from the L2 cache in part.

    logits   [N V]       V a multiple of 16 for 16-byte accesses
    target   [N] i64     negative: loss and gradient are zero
    losses   [2 N] f32   total with the z-loss, nll; the two may lie apart

    Writes:  losses; logits when `wants_gradient`.
    Cost:    6·N·V bytes in bf16, 2·N·V without gradient.
    """
    rows, vocabulary = logits.shape
    cross_entropy_kernel[(rows,)](
        logits,
        target,
        losses,
        logits.stride(0),
        losses.stride(0),
        vocabulary,
        logit_scale,
        z_loss,
        wants_gradient=wants_gradient,
        block=min(tile.block_n, triton.next_power_of_2(vocabulary)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    """beta * total + a @ b, summed in fp32 inside the product and rounded to the format of `total` once.

    Writes:  total; it is not read when beta is 0.
    """
    if total.dtype is a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Tensor,
        target: Tensor,
        chunk: int,
        logit_scale: float,
        z_loss: float,
        head_sum: torch.dtype,
        tile: LogitsTile,
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_head = ctx.needs_input_grad[:2]
        x, target = x.contiguous(), target.contiguous()
        losses = x.new_empty((2, x.shape[0]), dtype=torch.float32)
        logits = x.new_empty((min(chunk, x.shape[0]), head.shape[1]))
        x_gradient = torch.empty_like(x) if wants_x else x
        head_gradient = torch.zeros_like(head, dtype=head_sum) if wants_head else head
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = x[part]
            here = torch.mm(rows, head, out=logits[: rows.shape[0]])
            logits_to_gradient_(
                here,
                target[part],
                losses[:, part],
                logit_scale=logit_scale,
                z_loss=z_loss,
                wants_gradient=wants_x or wants_head,
                tile=tile,
            )
            if wants_x:
                torch.mm(here, head.T, out=x_gradient[part])
            if wants_head:
                add_product_(head_gradient, rows.T, here, beta=1)
        ctx.save_for_backward(x_gradient, head_gradient, head)
        total, nll = losses.sum(-1).unbind()
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_gradient, head_gradient, head = ctx.saved_tensors
        wants_x, wants_head = ctx.needs_input_grad[:2]
        grad_output = outputs[0]
        # one pass that multiplies and rounds
        head_pulled = torch.mul(head_gradient, grad_output, out=torch.empty_like(head)) if wants_head else None
        return (x_gradient * grad_output if wants_x else None, head_pulled, *(None,) * 6)


def linear_cross_entropy(
    x: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    chunk: int,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    head_sum: torch.dtype = torch.float32,
    tile: LogitsTile = TILE,
) -> tuple[Tensor, Tensor]:
    """`pure.loss.linear_cross_entropy`, with the logits of a chunk in the format of `x`.

    `logit_scale` multiplies the logits in fp32, where the reference multiplies `x`.

    x         [N D]   bf16
    head      [D V]   bf16
    target    [N]     i64
    chunk     tokens whose logits are held at once
    head_sum  format in which the head's gradient is summed over chunks: fp32, or that of `head`, which is half the
              memory and rounds once a chunk
    returns   (total, nll): scalars f32

    Memory:   2·chunk·V bytes for logits; D·V in `head_sum`; 2·N·D for the gradient of `x`.
    Cost:     6·N·D·V FLOPs; the kernel moves 6·N·V bytes between the products.
    """
    return LinearCrossEntropy.apply(x, head, target, chunk, logit_scale, z_loss, head_sum, tile)
