"""The experts of one token, routed and shared, in two launches.

D hidden size · E experts · K chosen ones · F width of an expert, S of the shared ones together, or of a dense MLP

Shared experts are columns of the first product and rows of the second beside those of the chosen ones, and a dense MLP
is that alone. Every program of the first launch chooses the experts anew from the router's products: a launch would
take longer. The second leaves parts of a sum, which the next layer adds to the row where it reads it.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.early import launched, release, wait
from nmoe.effects.kernels.moe.few import FewTile, chosen, scored
from nmoe.effects.kernels.moe.router import TINY
from nmoe.effects.kernels.row import Parts
from nmoe.pure.model.route import VANISHING


@attrs.frozen(kw_only=True)
class SingleTiles:
    """How both products are cut up."""

    up: FewTile
    down: FewTile
    parts: int  # of the sum that the second one leaves


TILES = SingleTiles(
    up=FewTile(block_k=64, block_n=64, num_warps=4, num_stages=6),
    down=FewTile(block_k=128, block_n=64, num_warps=8, num_stages=5),
    parts=8,
)
"""8 experts of 2048 x 1408 are 176 programs and 128: all of them run at once on 132 multiprocessors."""


@attrs.frozen(kw_only=True)
class Choice:
    """How a router's products become experts and weights, as in `pure.model.route.route`."""

    top_k: int
    scale: float
    normalize: bool
    softmax: bool


@triton.jit
def up_kernel(
    x, squares, partial, bias, up, plain, expert, weight, a, D, F, S, parts, E,
    scale, tiny, vanishing, eps,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, PARTS: tl.constexpr, SQUARES: tl.constexpr, SP: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Activation of some columns of a chosen expert, or of the plain MLP; the first program keeps the choice."""
    release(EARLY)
    program, inner = tl.program_id(0), tl.arange(0, ROWS)
    wait(EARLY)
    whole = tl.sum(tl.load(squares + tl.arange(0, SP), mask=tl.arange(0, SP) < SQUARES, other=0.0), 0)
    factor = tl.rsqrt(whole / D + eps)
    if up is None:
        first, limit, offset = program * COLUMNS, S, 0
        base = plain
    else:
        blocks = tl.cdiv(F, COLUMNS)
        own = program // blocks
        column, part, place = tl.arange(0, EP), tl.arange(0, PARTS), tl.arange(0, KP)
        real = column < E
        known = (part < parts)[:, None] & real[None, :]
        logit = tl.sum(tl.load(partial + part[:, None] * E + column[None, :], mask=known, other=0.0), 0) * factor
        value = scored(logit, real, tiny, SOFTMAX)
        steered = value + tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        experts, weights = chosen(value, steered, column, real, scale, vanishing, EP, K, KP, NORMALIZE)
        if program == 0:
            tl.store(expert + place, experts, mask=place < K)
            tl.store(weight + place, weights, mask=place < K)
        at = tl.sum(tl.where(place == own, experts, 0), 0)
        base = up + at * D * (2 * F)
        first, limit, offset = (program - own * blocks) * COLUMNS, F, own * F
        if plain is not None:
            base = tl.where(own < K, base, plain)
            first = tl.where(own < K, first, (program - K * blocks) * COLUMNS)
            limit = tl.where(own < K, F, S)
            offset = tl.where(own < K, offset, K * F)
    f = first + tl.arange(0, COLUMNS)
    within = (f < limit)[None, :]
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in tl.range(0, D, ROWS, num_stages=STAGES):
        row = d + inner
        inside = (row < D)[:, None] & within
        number = tl.load(x + row, mask=row < D, other=0.0)[:, None]
        here = base + row.to(tl.int64)[:, None] * (2 * limit) + f[None, :]
        gates += number * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        values += number * tl.load(here + limit, mask=inside, other=0.0).to(tl.float32)
    dtype = base.dtype.element_ty
    # rounded where the grouped GEMM rounds; kept in 32 bits, which a pipeline can copy one by one
    gate = (tl.sum(gates, 0) * factor).to(dtype).to(tl.float32)
    value = (tl.sum(values, 0) * factor).to(dtype).to(tl.float32)
    tl.store(a + offset + f, (gate * tl.sigmoid(gate) * value).to(dtype).to(tl.float32), mask=f < limit)


@triton.jit
def down_kernel(
    a, expert, weight, down, plain, out, D, F, S, K: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of one part of the weighted sum, whose rows are those of all experts, one after another."""
    release(EARLY)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, ROWS)
    real = (column < D)[None, :]
    blocks = tl.cdiv(F, ROWS)
    rest = tl.cdiv(S, ROWS)
    every = K * blocks + rest
    begin = tl.program_id(1) * every // tl.num_programs(1)
    end = (tl.program_id(1) + 1) * every // tl.num_programs(1)
    wait(EARLY)
    if down is not None:
        place = tl.arange(0, KP)
        experts = tl.load(expert + place, mask=place < K, other=0)
        weights = tl.load(weight + place, mask=place < K, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        if down is None:
            first, limit, offset, factor = block * ROWS, S, 0, 1.0
            base = plain
        else:
            own = block // blocks
            # not by loads, for which a pipeline would wait before it begins
            base = down + tl.sum(tl.where(place == own, experts, 0), 0) * F * D
            factor = tl.sum(tl.where(place == own, weights, 0.0), 0)
            first, limit, offset = (block - own * blocks) * ROWS, F, own * F
            if plain is not None:
                base = tl.where(own < K, base, plain)
                factor = tl.where(own < K, factor, 1.0)
                first = tl.where(own < K, first, (block - K * blocks) * ROWS)
                limit = tl.where(own < K, F, S)
                offset = tl.where(own < K, offset, K * F)
        row = first + inner
        number = tl.load(a + offset + row, mask=row < limit, other=0.0) * factor
        inside = (row < limit)[:, None] & real
        here = base + row.to(tl.int64)[:, None] * D + column[None, :]
        total += number[:, None] * tl.load(here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1) * D + column, tl.sum(total, 0), mask=column < D)


def experts(
    x: Parts,
    logits: Tensor,
    bias: Tensor,
    routed: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor] | None,
    choice: Choice,
    eps: float,
    tiles: SingleTiles = TILES,
) -> Tensor:
    """The chosen experts of a token and the shared ones, as parts of a sum.

    x        [1 D]       times its gain; `eps` of its norm
    logits   [S' E] f32  parts of the router's products with that
    bias     [E] f32     of the choice
    routed   [E D 2 F], [E F D]
    plain    [D 2 S], [S D], or None
    returns  [S'' D] f32
    """
    (parts, count), inner = logits.shape, routed[1].shape[1]
    numbers = (parts, count, choice.scale, TINY, VANISHING, eps, choice.top_k)
    shapes = tuple(map(triton.next_power_of_2, (choice.top_k, count, parts)))
    form = (choice.softmax, choice.normalize)
    return _run(x, (logits, bias, routed[0]), routed[1], plain, inner, choice.top_k, (numbers, shapes, form), tiles)


def mlp(x: Parts, up: Tensor, down: Tensor, eps: float, tiles: SingleTiles = TILES) -> Tensor:
    """`pure.model.experts.mlp` of one row, `x` as in `experts`, as parts of a sum [S' D] f32."""
    numbers = (1, 1, 1.0, TINY, VANISHING, eps, 0)
    return _run(x, (None, None, None), None, (up, down), 0, 0, (numbers, (1, 1, 1), (False, False)), tiles)


def _run(
    x: Parts,
    router: tuple[Tensor | None, Tensor | None, Tensor | None],
    down: Tensor | None,
    plain: tuple[Tensor, Tensor] | None,
    inner: int,
    top_k: int,
    settings: tuple[tuple[Any, ...], ...],
    tiles: SingleTiles,
) -> Tensor:
    """Both launches."""
    scaled, squares = x.parts[0], x.squares
    if squares is None:
        raise ValueError("experts: expected a row with the sums of its squares, got none; pass what `row.route` gives")
    where, width, others = scaled.device, len(scaled), 0 if plain is None else len(plain[1])
    plain_up, plain_down = (None, None) if plain is None else plain
    expert = torch.empty(top_k, dtype=torch.int64, device=where)
    weight, a = torch.empty(top_k, device=where), torch.empty(top_k * inner + others, device=where)
    first, second, (numbers, shapes, form) = tiles.up, tiles.down, settings
    programs = top_k * triton.cdiv(inner, first.block_n) + triton.cdiv(others, first.block_n)
    up_kernel[(programs,)](
        scaled, squares, *router, plain_up, expert, weight, a, width, inner, others,
        *numbers, *shapes, len(squares), triton.next_power_of_2(len(squares)), *form,
        first.block_k, first.block_n, first.num_stages, **launched(scaled), num_warps=first.num_warps,
    )  # fmt: skip
    out = torch.empty(tiles.parts, width, device=where)
    down_kernel[(triton.cdiv(width, second.block_n), tiles.parts)](
        a, expert, weight, down, plain_down, out, width, inner, others, top_k, triton.next_power_of_2(max(1, top_k)),
        second.block_k, second.block_n, second.num_stages, **launched(scaled), num_warps=second.num_warps,
    )  # fmt: skip
    return out
