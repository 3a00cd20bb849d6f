"""The router on a GPU: `pure.route.scores` on the tensor cores with factors in full fp32, and `pure.model.route.first`.

A number in fp32 is the sum of three in bf16, to the last bit. Tokens are in bf16 already, so a product with the three
parts, summed in fp32, is the product in fp32, but for how sums are rounded: tensor cores cut off. Measured on an H200,
the scores are within 1e-6 of fp64, four times as far as those of an fp32 product.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.derivative import first_order
from nmoe.pure.model.route import VANISHING, Routed, Routing


@attrs.frozen(kw_only=True)
class TopKTile:
    """Block size and launch option of the top-k kernel."""

    block_m: int  # rows a program chooses for
    num_warps: int
    num_stages: int


TILE = TopKTile(block_m=8, num_warps=4, num_stages=1)

SCORES = 2048
"""Scores of a program of their gradient: 16 of a thread."""

SPLIT = 1024
"""Numbers of a router that a program splits."""

CHOICES = 512
"""Scores of a program that chooses: 4 of a thread, in keys of 64 bits."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest score: the weights of tokens whose scores all vanish are equal, and sum to the scale."""


@triton.jit
def order_key(value, column, real, EP: tl.constexpr):
    """Numbers as integers in their order, no two equal: of equal numbers the lower column has the larger key.

    Its low half is EP - 1 less the column. NaN is the largest, as for torch's sort.
    """
    value = tl.where(value == 0.0, 0.0, value)  # a negative zero is as large as a positive one
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value != value, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (order.to(tl.int64) << 32) | (EP - 1 - column).to(tl.int64)
    return tl.where(real, key, -0x8000000000000000)


@triton.jit
def top_k_kernel(x, out, rows, E, M: tl.constexpr, EP: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.arange(0, EP)
    inside = (row < rows)[:, None] & (column < E)[None, :]
    value = tl.load(x + row[:, None] * E + column[None, :], mask=inside, other=0.0)
    key = order_key(value, column[None, :], (column < E)[None, :], EP)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        tl.store(out + row * K + k, EP - 1 - (best & 0xFFFFFFFF), mask=row < rows)
        key = tl.where(key == best[:, None], -0x8000000000000000, key)


def top_k(x: Tensor, num: int, tile: TopKTile = TILE) -> Tensor:
    """Indices of the `num` largest entries of the last axis, ties to the lower index.

    x        [... E] f32
    returns  [... num] i64
    Raises:  ValueError for more entries than there are: the kernel would name columns that are not there.
    """
    columns = x.shape[-1]
    if not 1 <= num <= columns:
        raise ValueError(f"router.top_k: expected from 1 to {columns} entries of {columns}, got {num}; lower top_k")
    x = x.contiguous()
    rows = x.numel() // columns
    out = torch.empty(*x.shape[:-1], num, dtype=torch.int64, device=x.device)
    padded = triton.next_power_of_2(columns)
    top_k_kernel[(triton.cdiv(rows, tile.block_m),)](
        x, out, rows, columns, tile.block_m, padded, num, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    return out


def split_bf16x3(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bf16 tensors whose sum is `x`, in f32, exactly, as long as the smallest of them is a normal number."""
    high = x.to(torch.bfloat16)
    rest = x - high.float()
    middle = rest.to(torch.bfloat16)
    return high, middle, (rest - middle.float()).to(torch.bfloat16)


@triton.jit
def _round_bf16(x):
    """The nearest number of bf16, ties to even, and its bits; in integers, which the interpreter computes rightly."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(x != x, 0x7FC0, bits)  # a NaN's payload would carry into the sign
    return (bits << 16).to(tl.float32, bitcast=True), bits.to(tl.int16)


@triton.jit
def split_kernel(w, wide, narrow, size, E, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + at, mask=at < size, other=0.0)
    high, high_bits = _round_bf16(value)
    middle, middle_bits = _round_bf16(value - high)
    _, low_bits = _round_bf16(value - high - middle)
    to = at // E * (3 * E) + at % E
    tl.store(wide + to, high_bits, mask=at < size)
    tl.store(wide + E + to, middle_bits, mask=at < size)
    tl.store(wide + 2 * E + to, low_bits, mask=at < size)
    tl.store(narrow + to, high_bits, mask=at < size)
    tl.store(narrow + E + to, middle_bits, mask=at < size)
    tl.store(narrow + 2 * E + to, high_bits, mask=at < size)


def split_router(router: Tensor) -> tuple[Tensor, Tensor]:
    """The parts that `split_bf16x3` makes of a router, for its products: one launch in the place of 15.

    router   [D E] f32
    returns  [D 3E] bf16   high, middle and low part, that a token's vector is multiplied with
             [D 3E] bf16   high, middle and high part, that `products_of_parts` takes
    """
    router, (width, experts) = router.contiguous(), router.shape
    wide, narrow = (torch.empty(width, 3 * experts, dtype=torch.bfloat16, device=router.device) for _ in range(2))
    split_kernel[(triton.cdiv(router.numel(), SPLIT),)](
        router, wide.view(torch.int16), narrow.view(torch.int16), router.numel(), experts, SPLIT, num_warps=4
    )
    return wide, narrow


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bf16 factors, summed and returned in fp32."""
    # torch has the product with a wider result for GPUs only
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def matmul_bf16x3(x: Tensor, wide: Tensor) -> Tensor:
    """x @ w for x in bf16 and w in fp32, in fp32.

    x        [N D]
    wide     [D 3E]   of `split_router(w)`
    returns  [N E]
    """
    return matmul_fp32(x, wide).unflatten(-1, (3, -1)).sum(-2)


def product_gradients(x: Tensor, router: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and w from that of `matmul_bf16x3`.

    router   [D 3E]   as of `products_of_parts`
    """
    high, middle, low = split_bf16x3(d)
    return products_of_parts(x, router, torch.cat((high, high, middle), -1), torch.cat((high, middle, low), -1))


def products_of_parts(x: Tensor, router: Tensor, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and w from the parts of that of their product.

    router   [D 3E] bf16   high, middle and high part of w
    narrow   [N 3E] bf16   high, high and middle part
    wide     [N 3E] bf16   high, middle and low part
    """
    # sixteen bits of each factor: the sum is rounded to the eight of bf16
    return narrow @ router.T, matmul_fp32(x.T, wide).unflatten(-1, (3, -1)).sum(-2)


@triton.jit
def score_gradient_kernel(
    gradient, score, expert, grad_weight, narrow, wide, rows, E, scale, vanishing,
    K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, M: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.arange(0, EP)
    real = row < rows
    inside = real[:, None] & (column < E)[None, :]
    at = row[:, None] * E + column[None, :]
    value = tl.load(score + at, mask=inside, other=0.0)
    d = tl.load(gradient + at, mask=inside, other=0.0)
    if expert is not None:
        filled = tl.full((M,), 1.0, tl.float32)
        mean = tl.zeros((M,), tl.float32)
        if NORMALIZE:
            place = tl.arange(0, KP)
            pair = row[:, None] * K + place[None, :]
            there = real[:, None] & (place < K)[None, :]
            own = tl.load(score + row[:, None] * E + tl.load(expert + pair, mask=there, other=0), mask=there, other=0.0)
            given = tl.load(grad_weight + pair, mask=there, other=0.0)
            total = tl.sum(own, 1)
            filled = tl.maximum(total, vanishing)
            # of a sum that is filled up only the differences of the scores count
            mean = tl.where(total < vanishing, tl.sum(given, 1) / K, tl.sum(given * own, 1) / filled)
        for k in tl.static_range(K):
            chosen = tl.load(expert + row * K + k, mask=real, other=-1).to(tl.int32)
            share = scale * (tl.load(grad_weight + row * K + k, mask=real, other=0.0) - mean) / filled
            d += tl.where(chosen[:, None] == column[None, :], share[:, None], 0.0)
    d = d * value * (1 - value)
    high, high_bits = _round_bf16(d)
    middle, middle_bits = _round_bf16(d - high)
    _, low_bits = _round_bf16(d - high - middle)
    to = row[:, None] * (3 * E) + column[None, :]
    tl.store(narrow + to, high_bits, mask=inside)
    tl.store(narrow + E + to, high_bits, mask=inside)
    tl.store(narrow + 2 * E + to, middle_bits, mask=inside)
    tl.store(wide + to, high_bits, mask=inside)
    tl.store(wide + E + to, middle_bits, mask=inside)
    tl.store(wide + 2 * E + to, low_bits, mask=inside)


def score_gradient(
    gradient: Tensor,
    score: Tensor,
    expert: Tensor | None = None,
    grad_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradient of the logits of a sigmoid, in the parts that `products_of_parts` takes.

    The bits of torch's 15 passes over [N E]; with choices, the gradient of their weights is added to the scores'.

    gradient     [N E] f32   of `score`
    score        [N E] f32
    expert       [N K] i64, or None
    grad_weight  [N K] f32   of `pure.model.route.gates`, with `scale` and `normalize`; None without `expert`
    """
    gradient, (rows, experts) = gradient.contiguous(), score.shape
    narrow, wide = (torch.empty(rows, 3 * experts, dtype=torch.bfloat16, device=score.device) for _ in range(2))
    padded, k = triton.next_power_of_2(experts), 1 if expert is None else expert.shape[1]
    m = max(1, SCORES // padded)
    # no fused multiply-adds: they would take the parts of a gradient that is not rounded to fp32
    score_gradient_kernel[(triton.cdiv(rows, m),)](
        gradient, score, expert, grad_weight, narrow.view(torch.int16), wide.view(torch.int16), rows, experts, scale,
        VANISHING, k, triton.next_power_of_2(k), normalize, m, padded, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return narrow, wide


@triton.jit
def choose_kernel(
    product, bias, score, expert, favoured, weight, rows, E, tiny, scale, vanishing,
    K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, M: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real = row < rows
    column, place = tl.arange(0, EP), tl.arange(0, KP)
    inside = real[:, None] & (column < E)[None, :]
    at = product + row[:, None] * (3 * E) + column[None, :]
    logit = tl.load(at, mask=inside, other=0.0) + tl.load(at + E, mask=inside, other=0.0)
    value = 1 / (1 + tl.exp(-(logit + tl.load(at + 2 * E, mask=inside, other=0.0))))
    # not by maximum, which may lose what is not a number
    value = tl.where(value < tiny, tiny, value)
    tl.store(score + row[:, None] * E + column[None, :], value, mask=inside)
    here = (column < E)[None, :]
    key = order_key(value, column[None, :], here, EP)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        tl.store(favoured + row * K + k, EP - 1 - (best & 0xFFFFFFFF), mask=real)
        key = tl.where(key == best[:, None], -0x8000000000000000, key)
    key = order_key(value + tl.load(bias + column, mask=column < E, other=0.0)[None, :], column[None, :], here, EP)
    chosen = tl.zeros((M, KP), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        which = EP - 1 - (best & 0xFFFFFFFF)
        tl.store(expert + row * K + k, which, mask=real)
        own = tl.sum(tl.where(column[None, :] == which[:, None], value, 0.0), 1)
        chosen = tl.where(place[None, :] == k, own[:, None], chosen)
        key = tl.where(key == best[:, None], -0x8000000000000000, key)
    result = scale * chosen
    if NORMALIZE:
        total = tl.sum(chosen, 1)
        filled = tl.maximum(total, vanishing)
        result = scale * (chosen + ((filled - total) / K)[:, None]) / filled[:, None]
    tl.store(weight + row[:, None] * K + place[None, :], result, mask=real[:, None] & (place < K)[None, :])


class Route(torch.autograd.Function):
    """Keeps the tokens, the router in parts, the scores and the choices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, router: Tensor, bias: Tensor, top_k: int, scale: float, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, experts = len(x), router.shape[1]
        wide, narrow = split_router(router)
        product = matmul_fp32(x, wide)
        score = torch.empty(rows, experts, device=x.device)
        expert, favoured = (torch.empty(rows, top_k, dtype=torch.int64, device=x.device) for _ in range(2))
        weight = torch.empty(rows, top_k, device=x.device)
        padded = triton.next_power_of_2(experts)
        m = max(1, CHOICES // padded)
        choose_kernel[(triton.cdiv(rows, m),)](
            product, bias, score, expert, favoured, weight, rows, experts, TINY, scale, VANISHING,
            top_k, triton.next_power_of_2(top_k), normalize, m, padded, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, narrow, score, expert)
        ctx.how = {"scale": scale, "normalize": normalize}
        ctx.mark_non_differentiable(expert, favoured)
        return score, expert, favoured, weight

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, narrow, score, expert = ctx.saved_tensors
        parts = score_gradient(outputs[0], score, expert, outputs[3].contiguous(), **ctx.how)
        return *products_of_parts(x, narrow, *parts), None, None, None, None


def route(x: Tensor, router: Tensor, bias: Tensor, *, top_k: int, scale: float = 1.0, normalize: bool = True) -> Routed:
    """`pure.model.route.route_tokens` by sigmoids without a shift, without groups.

    The product with the router, and one pass each way: scores, both choices and weights; the gradient of the logits.

    x        [N D] bf16
    router   [D E] f32
    bias     [E] f32
    """
    told: Any = Route.apply(x, router, bias, top_k, scale, normalize)
    score, expert, favoured, weight = told
    return Routed(Routing(expert, weight), score, favoured)


class Scores(torch.autograd.Function):
    """Keeps the tokens, the router in parts and its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        # sigmoid is 0 below a logit of -103 (-87 where tiny numbers are flushed), and weights of chosen zeros are 0/0
        wide, narrow = split_router(router)
        score = torch.sigmoid(matmul_bf16x3(x, wide)).clamp_min(TINY)
        ctx.save_for_backward(x, narrow, score)
        return score

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, narrow, score = ctx.saved_tensors
        return products_of_parts(x, narrow, *score_gradient(outputs[0], score))


class Logits(torch.autograd.Function):
    """Keeps the tokens and the router in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        wide, narrow = split_router(router)
        ctx.save_for_backward(x, narrow)
        return matmul_bf16x3(x, wide)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        return product_gradients(*ctx.saved_tensors, outputs[0])


def logits(x: Tensor, router: Tensor, shift: Tensor | tuple[()]) -> Tensor:
    """`pure.route.logits`."""
    y: Any = Logits.apply(x, router)
    return y + shift if isinstance(shift, Tensor) else y


def scores(x: Tensor, router: Tensor, shift: Tensor | tuple[()] = ()) -> Tensor:
    """`pure.route.scores`: affinity of each token to each expert.

    x        [N D] bf16
    router   [D E] f32
    shift    [E] f32 or ()
    returns  [N E] f32 in (0, 1)
    """
    if isinstance(shift, Tensor):
        return torch.sigmoid(logits(x, router, shift)).clamp_min(TINY)
    return Scores.apply(x, router)  # pyright: ignore[reportReturnType]


def softmax_scores(x: Tensor, router: Tensor, shift: Tensor | tuple[()] = ()) -> Tensor:
    """`pure.route.softmax_scores`; arguments as of `scores`."""
    return torch.softmax(logits(x, router, shift), -1)
