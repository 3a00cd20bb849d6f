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


@attrs.frozen(kw_only=True)
class TopKTile:
    """Block size and launch option of the top-k kernel."""

    block_m: int  # rows a program chooses for
    num_warps: int
    num_stages: int


TILE = TopKTile(block_m=8, num_warps=4, num_stages=1)

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


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bf16 factors, summed and returned in fp32."""
    # torch has the product with a wider result for GPUs only
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def matmul_bf16x3(x: Tensor, w: Tensor) -> Tensor:
    """x @ w for x in bf16 and w in fp32, in fp32.

    x        [N D]
    w        [D E]
    returns  [N E]
    """
    return matmul_fp32(x, torch.cat(split_bf16x3(w), -1)).unflatten(-1, (3, -1)).sum(-2)


def product_gradients(x: Tensor, router: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and w from that of `matmul_bf16x3(x, w)`."""
    high, middle, _ = split_bf16x3(d)
    w_high, w_middle, _ = split_bf16x3(router)
    # sixteen bits of each factor: the sum is rounded to the eight of bf16
    dx = torch.cat((high, high, middle), -1) @ torch.cat((w_high, w_middle, w_high), -1).T
    return dx, matmul_bf16x3(x.T, d)


class Scores(torch.autograd.Function):
    """Keeps its arguments and its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        # sigmoid is 0 below a logit of -103 (-87 where tiny numbers are flushed), and weights of chosen zeros are 0/0
        score = torch.sigmoid(matmul_bf16x3(x, router)).clamp_min(TINY)
        ctx.save_for_backward(x, router, score)
        return score

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, router, score = ctx.saved_tensors
        return product_gradients(x, router, outputs[0] * score * (1 - score))


class Logits(torch.autograd.Function):
    """Keeps its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return matmul_bf16x3(x, router)

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
