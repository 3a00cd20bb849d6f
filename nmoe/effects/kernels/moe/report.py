"""What is told of a router: entropy, sequence-wise imbalance with its gradient, margins; one pass over scores each way.

In plain torch it is 40 passes over [N E], 0.4 of the 5.8 ms of a layer of 64 experts of 384 (docs/log.md, 2026-11-29).

Letters: B sequences, T tokens of one, N = B T, E experts, K chosen ones; in a kernel M is the tokens of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order
from nmoe.pure.model.route import BINS, VANISHING

SPAN = 64
"""Tokens of a program: 8 bytes of partial sums for 256 of scores."""

SCORES = 1024
"""Scores at once, 8 of a thread: with 32 there are 123 spills."""

WARPS = 4


@triton.jit
def _shares(score, E, vanishing):
    """Scores over their sum, as `pure.model.route.shares` fills them up; the sum, and by what it divides."""
    total = tl.sum(score, 1)
    filled = tl.maximum(total, vanishing)
    return total, filled, (score + ((filled - total) / E)[:, None]) / filled[:, None]


@triton.jit
def _chosen(expert, row, real, column, K: tl.constexpr):
    """Which experts each token chose."""
    hot = (row < 0)[:, None] & (column < 0)[None, :]
    for k in tl.static_range(K):
        hot |= tl.load(expert + row * K + k, mask=real, other=-1).to(tl.int32)[:, None] == column[None, :]
    return hot


@triton.jit
def report_kernel(
    score, favoured, bias, expert, hits, shares, entropy, margins, T, E, vanishing,
    K: tl.constexpr, BINS: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    spans = tl.cdiv(T, SPAN)
    program = tl.program_id(0)
    first = (program // spans).to(tl.int64) * T
    column = tl.arange(0, EP)
    summed = tl.zeros((M, EP), tl.float32)
    information = tl.zeros((M, EP), tl.float32)
    counted = tl.zeros((M, EP), tl.int32)
    for begin in range(0, SPAN, M):
        token = program % spans * SPAN + begin + tl.arange(0, M)
        real = token < T
        row = first + token
        inside = real[:, None] & (column < E)[None, :]
        value = tl.load(score + row[:, None] * E + column[None, :], mask=inside, other=0.0)
        _, _, share = _shares(value, E, vanishing)
        share = tl.where(inside, share, 0.0)
        summed += share
        information += share * tl.log(tl.where(share == 0.0, 1.0, share))
        counted += _chosen(favoured, row, real, column, K).to(tl.int32)
        if margins is not None:
            biased = value + tl.load(bias + column, mask=column < E, other=0.0)[None, :]
            hot = _chosen(expert, row, real, column, K)
            lowest = tl.min(tl.where(hot, biased, float("inf")), 1)
            best_left = tl.max(tl.where(hot | (column >= E)[None, :], float("-inf"), biased), 1)
            place = (((lowest + best_left) / 2)[:, None] - value + 1) * (BINS / 2)
            # what is no number counts in the first bin, as in the reference
            place = tl.where(place >= 0, tl.minimum(place, BINS - 1), 0.0).to(tl.int32)
            # whole numbers: their sum does not depend on who is first
            tl.atomic_add(margins + column[None, :] * BINS + place, 1, mask=inside, sem="relaxed")
    part = program.to(tl.int64) * E + column
    tl.store(shares + part, tl.sum(summed, 0), mask=column < E)
    tl.store(hits + part, tl.sum(counted, 0), mask=column < E)
    tl.store(entropy + program, -tl.sum(tl.sum(information, 1), 0))


@triton.jit
def sum_kernel(
    hits, shares, entropy, fraction, total, E, SPANS, even, share_of_token, M: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, EP)
    counted = tl.zeros((M, EP), tl.int32)
    summed = tl.zeros((M, EP), tl.float32)
    information = tl.zeros((M,), tl.float32)
    for begin in range(0, SPANS, M):
        span = begin + tl.arange(0, M)
        inside = (span < SPANS)[:, None] & (column < E)[None, :]
        at = (sequence * SPANS + span)[:, None] * E + column[None, :]
        counted += tl.load(hits + at, mask=inside, other=0)
        summed += tl.load(shares + at, mask=inside, other=0.0)
        information += tl.load(entropy + sequence * SPANS + span, mask=span < SPANS, other=0.0)
    wanted = tl.sum(counted, 0).to(tl.float32) * even
    tl.store(fraction + sequence * E + column, wanted, mask=column < E)
    tl.store(total + 2 * sequence, tl.sum(wanted * tl.sum(summed, 0), 0) * share_of_token)
    tl.store(total + 2 * sequence + 1, tl.sum(information, 0) * share_of_token / tl.num_programs(0))


@triton.jit
def imbalance_backward_kernel(
    score, fraction, grad_output, gradient, T, E, share_of_token, vanishing, M: tl.constexpr, EP: tl.constexpr
):  # fmt: skip
    chunks = tl.cdiv(T, M)
    sequence = (tl.program_id(0) // chunks).to(tl.int64)
    token = tl.program_id(0) % chunks * M + tl.arange(0, M)
    column = tl.arange(0, EP)
    inside = (token < T)[:, None] & (column < E)[None, :]
    at = (sequence * T + token)[:, None] * E + column[None, :]
    value = tl.load(score + at, mask=inside, other=0.0)
    total, filled, share = _shares(value, E, vanishing)
    wanted = tl.load(fraction + sequence * E + column, mask=column < E, other=0.0)
    wanted *= tl.load(grad_output) * share_of_token
    # of a sum that is filled up only the differences of the scores count
    mean = tl.where(total < vanishing, tl.sum(wanted, 0) / E, tl.sum(wanted[None, :] * share, 1))
    tl.store(gradient + at, (wanted[None, :] - mean[:, None]) / filled[:, None], mask=inside)


class Report(torch.autograd.Function):
    """Keeps the scores, which the router keeps too, and a number an expert and sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        score: Tensor,
        favoured: Tensor,
        bias: Tensor,
        expert: Tensor,
        bins: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        score, favoured, expert = score.contiguous(), favoured.contiguous(), expert.contiguous()
        (sequences, tokens, experts), k = score.shape, favoured.shape[-1]
        m, padded = block(experts)
        spans = triton.cdiv(tokens, SPAN)
        hits = torch.empty(sequences, spans, experts, dtype=torch.int32, device=score.device)
        shares = torch.empty(sequences, spans, experts, device=score.device)
        entropy = torch.empty(sequences * spans, device=score.device)
        fraction = torch.empty(sequences, experts, device=score.device)
        total = torch.empty(sequences, 2, device=score.device)
        margins = torch.zeros(experts, bins, dtype=torch.int32, device=score.device)
        report_kernel[(sequences * spans,)](
            score, favoured, bias, expert, hits, shares, entropy, margins if bins else None, tokens, experts, VANISHING,
            k, bins, SPAN, m, padded, num_warps=WARPS,
        )  # fmt: skip
        sum_kernel[(sequences,)](
            hits, shares, entropy, fraction, total, experts, spans, experts / (k * tokens), 1 / tokens, m, padded,
            num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(score, fraction)
        margins, (imbalance, entropy) = margins.to(torch.int64), total.sum(0)
        ctx.mark_non_differentiable(entropy, margins)
        return entropy, imbalance, margins

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        score, fraction = ctx.saved_tensors
        sequences, tokens, experts = score.shape
        m, padded = block(experts)
        gradient = torch.empty_like(score)
        imbalance_backward_kernel[(sequences * triton.cdiv(tokens, m),)](
            score, fraction, outputs[1], gradient, tokens, experts, 1 / tokens, VANISHING, m, padded, num_warps=WARPS
        )
        return gradient, *[None] * 4


def block(experts: int) -> tuple[int, int]:
    """Tokens of a program, and columns."""
    padded = triton.next_power_of_2(experts)
    return max(1, min(SPAN, SCORES // padded)), padded


def report(
    score: Tensor, favoured: Tensor, bias: Tensor, expert: Tensor, *, margins: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`pure.model.route.report`; sums are taken in another order.

    score     [B T E] f32
    favoured  [B T K] i64
    bias      [E] f32
    expert    [N K] i64
    margins   whether they are wanted
    returns   entropy and imbalance, 0-d f32, and margins [E BINS] i64 or [E 0]
    """
    return Report.apply(score, favoured, bias, expert, BINS if margins else 0)  # pyright: ignore[reportReturnType]
