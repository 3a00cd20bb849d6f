"""Products of the experts, routed and shared, in fp8, MXFP8 or NVFP4: how operands are rounded, the exact products.

Operands are rounded, and their values multiplied in a format that holds each of them: what is computed is what a GPU
with such products computes, but for the order of sums and what `grouped` says of bf16. Letters: P rows sorted by
expert, E experts, I the axis summed over, O the axis of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.pure.core.key import Key
from nmoe.pure.formats import e4m3, mxfp8, nvfp4
from nmoe.pure.formats import random as draws
from nmoe.pure.model.experts import Rows, swiglu

Rounded = tuple[Tensor, Tensor]
"""Values that the format of the products holds, and the factor on each matrix, all leading axes."""


@attrs.frozen(kw_only=True)
class Recipe:
    """How a precision rounds the operands of the three products of a weight. The last axis is the one summed over.

    operand   format that holds every rounded value; in which operands are multiplied, with sums in fp32
    rows      activations of the forward product, and of the weight gradient along tokens
    weight    the weight of the forward product, and of the input gradient
    gradient  the result's gradient; given noise
    rotated   whether the weight gradient's operands are rotated along the tokens before they are rounded
    block     tokens that share a scale in the weight gradient, 0: its operands stay as they are
    noisy     whether gradients are rounded stochastically
    """

    operand: torch.dtype
    rows: Callable[[Tensor], Rounded]
    weight: Callable[[Tensor], Rounded]
    gradient: Callable[[Tensor, Tensor | None], Rounded]
    rotated: bool
    block: int
    noisy: bool


def _e4m3(x: Tensor, rows: int) -> Rounded:
    return e4m3.dequantise(*e4m3.quantise(x, rows=rows), rows=rows), _one(x)


def _mxfp8(x: Tensor) -> Rounded:
    return mxfp8.dequantise(*mxfp8.quantise(x)), _one(x)


def _nvfp4(x: Tensor, rows: int, noise: Tensor | None) -> Rounded:
    codes, scale, factor = nvfp4.quantise(x, rows=rows, noise=noise)
    return nvfp4.dequantise(codes, scale, torch.ones_like(factor), rows=rows), factor


def _one(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:-2], device=x.device)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # DeepSeek-V3 (arXiv:2412.19437), 3.3; but for the weight gradient, which in fp8 costs a GPU more than it saves
        "fp8": Recipe(
            operand=torch.float32,  # a scale has 24 bits
            rows=lambda x: _e4m3(x, 1),
            weight=lambda w: _e4m3(w, e4m3.BLOCK),
            gradient=lambda dy, noise: _e4m3(dy, 1),
            rotated=False,
            block=0,
            noisy=False,
        ),
        # Mishra et al. (arXiv:2506.08027): e4m3 for gradients too; each operand rounded anew along its summed axis
        "mxfp8": Recipe(
            operand=torch.bfloat16,
            rows=_mxfp8,
            weight=_mxfp8,
            gradient=lambda dy, noise: _mxfp8(dy),
            rotated=False,
            block=mxfp8.BLOCK,
            noisy=False,
        ),
        # NVIDIA (arXiv:2509.25149), section 4: the weight's blocks are square, so that its transpose has its values
        "nvfp4": Recipe(
            operand=torch.bfloat16,
            rows=lambda x: _nvfp4(x, 1, None),
            weight=lambda w: _nvfp4(w, nvfp4.BLOCK, None),
            gradient=lambda dy, noise: _nvfp4(dy, 1, noise),
            rotated=True,
            block=nvfp4.BLOCK,
            noisy=True,
        ),
    }
)
"""By the name that `precision.compute` has."""


def grouped(a: Tensor, b: Tensor, end: Tensor, operand: torch.dtype) -> Tensor:
    """Grouped product: of rows with their expert's matrix, or of two stretches of rows for each expert.

    Sums are in fp32. In bf16 each is rounded to bf16, as torch's grouped products return nothing wider: once for a
    result in bf16, and once more for one that a factor multiplies, where kernels round after the factor alone.

    a        [P I]
    b        [E I O], or [P O] with `a` as [I P]
    end      [E] i32   one past each expert's last row
    operand  format of both operands, which holds their values
    returns  [P O], or [E I O], f32 with values of `operand`
    """
    return F.grouped_mm(a.type(operand), b.type(operand), offs=end).float()


class LowProduct(torch.autograd.Function):
    """Keeps its arguments; their rounded forms are made again in the backward pass."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, expert: Tensor, count: Tensor, recipe: Recipe, key: Key) -> Tensor:
        end = count.cumsum(0).to(torch.int32)
        x, x_factor = recipe.rows(rows)
        w, w_factor = recipe.weight(weight.mT)
        y = grouped(x, w.mT, end, recipe.operand)
        return (y * (x_factor * w_factor)[expert][:, None]).to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, expert, count, ctx.recipe, ctx.key = inputs
        ctx.save_for_backward(rows, weight, expert, count)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, expert, count = ctx.saved_tensors
        dy, recipe, key = outputs[0], ctx.recipe, ctx.key
        end = count.cumsum(0).to(torch.int32)
        salt = draws.salt(dy)

        def rounded(x: Tensor, part: str) -> Rounded:
            return recipe.gradient(x, draws.noise(key.fold(part), salt, tuple(x.shape)) if recipe.noisy else None)

        d, d_factor = rounded(dy, "input gradient")
        w, w_factor = recipe.weight(weight)
        dx = grouped(d, w.mT, end, recipe.operand) * (d_factor * w_factor)[expert][:, None]

        if not recipe.block:
            dw = F.grouped_mm(rows.mT, dy, offs=end)
            return dx.to(rows.dtype), dw.to(weight.dtype), None, None, None, None
        x, d, end = _in_blocks(rows, dy, expert, count, recipe.block)
        if recipe.rotated:
            sign = draws.signs(key.fold("rotation"), dy)
            x, d = draws.hadamard(x, sign), draws.hadamard(d, sign)
        x, x_factor = recipe.rows(x)
        d, d_factor = rounded(d, "weight gradient")
        dw = grouped(x, d.mT, end, recipe.operand) * (x_factor * d_factor)
        return dx.to(rows.dtype), dw.to(weight.dtype), None, None, None, None


def _in_blocks(rows: Tensor, dy: Tensor, expert: Tensor, count: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and their gradients along tokens, each expert's padded with zeros to whole blocks: no size is data.

    returns  [I P'], [O P'], and the ends [E] i32 in P'
    """
    filled = (count + block - 1) // block * block
    end = filled.cumsum(0)
    place = torch.arange(len(expert), device=expert.device) + (end - filled - (count.cumsum(0) - count))[expert]
    most = -(-(len(expert) + len(count) * (block - 1)) // block) * block
    x, d = (y.new_zeros(most, y.shape[1]).index_copy(0, place, y) for y in (rows, dy))
    return x.mT, d.mT, end.to(torch.int32)


def experts_low(
    rows: Rows,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    activate: Callable[[Tensor], Tensor] = swiglu,
    *,
    recipe: Recipe,
    key: Key,
) -> Tensor:
    """`pure.model.experts.experts` with the products of a recipe.

    up       [E D 2 F]   D and F multiples of 128
    down     [E F D]
    key      of stochastic rounding and of the rotation
    returns  [P D] in the format of `rows.x`
    """
    x = rows.x.index_select(0, rows.source)
    h = _product(x, up.flatten(2), rows, recipe, key.fold("up")).unflatten(-1, (2, -1))
    h = h + bias[rows.expert] if isinstance(bias, Tensor) else h
    return _product(activate(h), down, rows, recipe, key.fold("down"))


def shared_low(
    x: Tensor, up: Tensor, down: Tensor, activate: Callable[[Tensor], Tensor] = swiglu, *, recipe: Recipe, key: Key
) -> Tensor:
    """`pure.model.experts.mlp` of the shared experts with the products of a recipe: one expert that sees each token.

    x     [N D]
    up    [D 2 S]   D and S multiples of 128
    down  [S D]
    key   of stochastic rounding and of the rotation
    """
    every = torch.arange(len(x), device=x.device)
    rows = Rows(x, every, torch.zeros_like(every), every.new_full((1,), len(x)), every)
    return experts_low(rows, up[None], down[None], (), activate, recipe=recipe, key=key.fold("shared"))


@attrs.frozen(kw_only=True)
class Emulated:
    """Experts with the products of a recipe."""

    experts: Callable[..., Tensor]  # `experts_low`
    shared: Callable[..., Tensor]  # `shared_low`


def emulated(recipe: Recipe, key: Key) -> Emulated:
    """The experts with the products of a recipe, for `Ops`."""
    how = {"recipe": recipe, "key": key}
    return Emulated(experts=partial(experts_low, **how), shared=partial(shared_low, **how))


def _product(x: Tensor, weight: Tensor, rows: Rows, recipe: Recipe, key: Key) -> Tensor:
    """x[p] @ weight[expert of p]."""
    return LowProduct.apply(x, weight, rows.expert, rows.count, recipe, key)  # pyright: ignore[reportReturnType]
