"""`pure.model.route.gates` on a GPU: a launch forward, and one backward that writes the zeros of the gradient too.

In plain torch it is 30 launches on [N K], and two passes over [N E].

Letters: N tokens, E experts, K chosen ones; in a kernel M is the tokens of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order
from nmoe.pure.model.route import VANISHING

TOKENS = 128
"""Tokens of a program that weighs."""

SCORES = 2048
"""Numbers of a program that writes gradients of scores."""


@triton.jit
def _chosen(score, expert, row, place, inside, E, K: tl.constexpr):
    """The experts of each token, -1 where there is none, and their scores."""
    column = tl.load(expert + row[:, None] * K + place[None, :], mask=inside, other=-1)
    return column, tl.load(score + row[:, None] * E + column, mask=inside, other=0.0)


@triton.jit
def weight_kernel(
    score, expert, weight, rows, E, scale, vanishing, K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    place = tl.arange(0, KP)
    inside = (row < rows)[:, None] & (place < K)[None, :]
    _, chosen = _chosen(score, expert, row, place, inside, E, K)
    result = scale * chosen
    if NORMALIZE:
        total = tl.sum(chosen, 1)
        filled = tl.maximum(total, vanishing)
        result = tl.div_rn(scale * (chosen + ((filled - total) / K)[:, None]), filled[:, None] + tl.zeros_like(chosen))
    tl.store(weight + row[:, None] * K + place[None, :], result, mask=inside)


@triton.jit
def weight_backward_kernel(
    score, expert, grad_output, gradient, rows, E, scale, vanishing,
    K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, M: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real = row < rows
    place = tl.arange(0, KP)
    filled = tl.full((M,), 1.0, tl.float32)
    mean = tl.zeros((M,), tl.float32)
    if NORMALIZE:
        inside = real[:, None] & (place < K)[None, :]
        _, chosen = _chosen(score, expert, row, place, inside, E, K)
        given = tl.load(grad_output + row[:, None] * K + place[None, :], mask=inside, other=0.0)
        total = tl.sum(chosen, 1)
        filled = tl.maximum(total, vanishing)
        # of a sum that is filled up only the differences of the scores count
        mean = tl.where(total < vanishing, tl.sum(given, 1) / K, tl.sum(given * chosen, 1) / filled)
    column = tl.arange(0, EP)
    result = tl.zeros((M, EP), tl.float32)
    for k in tl.static_range(K):
        at = tl.load(expert + row * K + k, mask=real, other=-1)
        own = scale * (tl.load(grad_output + row * K + k, mask=real, other=0.0) - mean) / filled
        result = tl.where(at[:, None] == column[None, :], own[:, None], result)
    tl.store(gradient + row[:, None] * E + column[None, :], result, mask=real[:, None] & (column < E)[None, :])


class Gates(torch.autograd.Function):
    """Keeps the scores, which the router keeps too, and the choices."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, expert: Tensor, scale: float, normalize: bool) -> Tensor:
        score, expert = score.contiguous(), expert.contiguous()
        (rows, experts), k = score.shape, expert.shape[1]
        weight = torch.empty(rows, k, device=score.device)
        padded = triton.next_power_of_2(k)
        weight_kernel[(triton.cdiv(rows, TOKENS),)](
            score, expert, weight, rows, experts, scale, VANISHING, k, padded, normalize, TOKENS, num_warps=4
        )
        ctx.save_for_backward(score, expert)
        ctx.scale, ctx.normalize = scale, normalize
        return weight

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        score, expert = ctx.saved_tensors
        (rows, experts), k = score.shape, expert.shape[1]
        padded, columns = triton.next_power_of_2(k), triton.next_power_of_2(experts)
        m = max(1, SCORES // columns)
        gradient = torch.empty_like(score)
        weight_backward_kernel[(triton.cdiv(rows, m),)](
            score, expert, outputs[0].contiguous(), gradient, rows, experts, ctx.scale, VANISHING, k, padded,
            ctx.normalize, m, columns, num_warps=4,
        )  # fmt: skip
        return gradient, None, None, None


def gates(score: Tensor, expert: Tensor, *, scale: float = 1.0, normalize: bool = True) -> Tensor:
    """`pure.model.route.gates`.

    score      [N E] f32
    expert     [N K] i64, none twice in a row
    returns    [N K] f32
    """
    return Gates.apply(score, expert, scale, normalize)  # pyright: ignore[reportReturnType]
