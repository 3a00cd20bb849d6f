"""The router and the routed experts of a few tokens: a step of generation reads weights, and computes next to nothing.

Letters: N tokens, K chosen experts, P = N·K pairs, D hidden size, F expert width, E experts.

Grouped GEMMs sort the pairs and fill tiles of 128 rows, of which a token fills one. Here a program takes a part of one
pair's product, on the plain cores: every weight of a chosen expert is read once, and of the others none. The result of
a pair depends on no other pair, and sums have one order.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.moe.router import TINY, order_key
from nmoe.pure.model.route import VANISHING, Routed, Routing

PAIRS = 64
"""Most pairs of tokens and experts that are few: beyond, experts have several rows and grouped GEMMs read them once."""


@attrs.frozen(kw_only=True)
class FewTile:
    """Rows and columns of a weight that a program holds at once, and launch options."""

    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


UP = FewTile(block_k=128, block_n=64, num_warps=8, num_stages=4)
DOWN = FewTile(block_k=256, block_n=32, num_warps=8, num_stages=3)
"""Of a token, 6 of 64 experts of 2048 x 1408: 21.7 and 14.1 us on an H200, 3.2 and 2.5 TB/s."""
SEVERAL = FewTile(block_k=64, block_n=64, num_warps=4, num_stages=4)
"""Of both from 32 pairs on: 118 and 64 us for 48, smaller blocks being slower for a token; docs/log.md, 2026-11-29."""
ROUTER = 128
"""Channels of a token that one program multiplies with the router."""
SUM = 512
"""Channels of a token that one program sums over its experts."""


@triton.jit
def logits_kernel(x, router, partial, D, E, ROWS: tl.constexpr, EP: tl.constexpr):
    """Products of `ROWS` channels of a token with the router; partial [N parts E]."""
    part, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = part * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, EP)
    value = tl.load(x + token * D + row, mask=row < D, other=0.0).to(tl.float32)
    inside = (row < D)[:, None] & (column < E)[None, :]
    weight = tl.load(router + row[:, None] * E + column[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(value[:, None] * weight, 0)
    tl.store(partial + (token * tl.num_programs(0) + part) * E + column, total, mask=column < E)


@triton.jit
def scored(logit, real, tiny, SOFTMAX: tl.constexpr):
    """Scores of a token's logits [EP]."""
    if SOFTMAX:
        logit = tl.where(real, logit, -float("inf"))
        value = tl.exp(logit - tl.max(logit, 0))
        value = value / tl.sum(value, 0)
    else:
        value = 1 / (1 + tl.exp(-logit))
        # not by maximum, which may lose what is not a number
        value = tl.where(value < tiny, tiny, value)
    return value


@triton.jit
def chosen(
    value, steered, column, real, scale, vanishing,
    EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The K experts of the largest `steered` scores and their weights, [KP] each."""
    place = tl.arange(0, KP)
    key = order_key(steered, column, real, EP)
    expert, own = tl.zeros((KP,), tl.int64), tl.zeros((KP,), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, 0)
        at = EP - 1 - (best & 0xFFFFFFFF)
        expert = tl.where(place == k, at, expert)
        own = tl.where(place == k, tl.sum(tl.where(column == at, value, 0.0), 0), own)
        key = tl.where(key == best, -0x8000000000000000, key)
    if NORMALIZE:
        total = tl.sum(own, 0)
        lacking = tl.where(total < vanishing, vanishing - total, 0.0)
        own = scale * (own + lacking / K) / (total + lacking)
    else:
        own = scale * own
    return expert, own


@triton.jit
def choose_kernel(
    partial, shift, bias, score, expert, favoured, weight, parts, E, scale, tiny, vanishing,
    PARTS: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Scores of a token, its experts, and their weights."""
    token = tl.program_id(0).to(tl.int64)
    column, part, place = tl.arange(0, EP), tl.arange(0, PARTS), tl.arange(0, KP)
    real = column < E
    inside = (part < parts)[:, None] & real[None, :]
    logit = tl.sum(tl.load(partial + (token * parts + part[:, None]) * E + column[None, :], mask=inside, other=0.0), 0)
    if shift is not None:
        logit += tl.load(shift + column, mask=real, other=0.0).to(tl.float32)
    value = scored(logit, real, tiny, SOFTMAX)
    tl.store(score + token * E + column, value, mask=real)
    key = order_key(value, column, real, EP)
    for k in tl.static_range(K):
        best = tl.max(key, 0)
        tl.store(favoured + token * K + k, EP - 1 - (best & 0xFFFFFFFF))
        key = tl.where(key == best, -0x8000000000000000, key)
    steered = value + tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    at, own = chosen(value, steered, column, real, scale, vanishing, EP, K, KP, NORMALIZE)
    tl.store(expert + token * K + place, at, mask=place < K)
    tl.store(weight + token * K + place, own, mask=place < K)


@triton.jit
def up_kernel(
    x, expert, up, bias, a, D, F, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Activation of some columns of a pair."""
    pair = tl.program_id(1).to(tl.int64)
    chosen = tl.load(expert + pair).to(tl.int64)
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, ROWS)
    inside = (f < F)[None, :]
    here = up + chosen * D * (2 * F) + f[None, :]
    token = x + pair // K * D
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in tl.range(0, D, ROWS, num_stages=STAGES):
        row = d + inner
        real = (row < D)[:, None] & inside
        number = tl.load(token + row, mask=row < D, other=0.0).to(tl.float32)[:, None]
        at = here + row.to(tl.int64)[:, None] * (2 * F)
        gates += number * tl.load(at, mask=real, other=0.0).to(tl.float32)
        values += number * tl.load(at + F, mask=real, other=0.0).to(tl.float32)
    gate, value = tl.sum(gates, 0), tl.sum(values, 0)
    if bias is not None:
        own = bias + chosen * (2 * F) + f
        gate += tl.load(own, mask=f < F, other=0.0).to(tl.float32)
        value += tl.load(own + F, mask=f < F, other=0.0).to(tl.float32)
    # rounded where the grouped GEMM rounds
    gate, value = gate.to(a.dtype.element_ty).to(tl.float32), value.to(a.dtype.element_ty).to(tl.float32)
    if LIMIT is None:
        activation = gate * tl.sigmoid(gate) * value
    else:
        gate = tl.minimum(gate, LIMIT)
        activation = (tl.clamp(value, -LIMIT, LIMIT) + 1) * (gate * tl.sigmoid(ALPHA * gate))
    tl.store(a + pair * F + f, activation.to(a.dtype.element_ty), mask=f < F)


@triton.jit
def down_kernel(a, expert, down, y, D, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Some columns of a pair's result, in fp32."""
    pair = tl.program_id(1).to(tl.int64)
    chosen = tl.load(expert + pair).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, ROWS)
    inside = (column < D)[None, :]
    here = down + chosen * F * D + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for f in tl.range(0, F, ROWS, num_stages=STAGES):
        row = f + inner
        number = tl.load(a + pair * F + row, mask=row < F, other=0.0).to(tl.float32)[:, None]
        real = (row < F)[:, None] & inside
        total += number * tl.load(here + row.to(tl.int64)[:, None] * D, mask=real, other=0.0).to(tl.float32)
    tl.store(y + pair * D + column, tl.sum(total, 0), mask=column < D)


@triton.jit
def sum_kernel(
    y, weight, expert, out, count, pairs, D, E,
    K: tl.constexpr, BLOCK: tl.constexpr, EP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Some columns of a token's result; the first program counts the pairs of each expert."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        total += tl.load(weight + pair) * tl.load(y + pair * D + column, mask=column < D, other=0.0)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        every, experts = tl.arange(0, PAIRS), tl.arange(0, EP)
        chosen = tl.load(expert + every, mask=every < pairs, other=-1)
        hits = tl.sum((chosen[:, None] == experts[None, :].to(tl.int64)).to(tl.int64), 0)
        tl.store(count + experts, hits, mask=experts < E)


def route(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    shift: Tensor | tuple[()] = (),
    *,
    top_k: int,
    scale: float = 1.0,
    normalize: bool = True,
    softmax: bool = False,
) -> Routed:
    """`pure.model.route.route_tokens` without groups, of a few tokens; scores have no gradient.

    x        [N D]
    router   [D E] f32
    bias     [E] f32
    shift    [E] or ()
    """
    (tokens, width), experts = x.shape, router.shape[1]
    parts = triton.cdiv(width, ROUTER)
    partial, score = (torch.empty(shape, device=x.device) for shape in ((tokens, parts, experts), (tokens, experts)))
    expert, favoured = (torch.empty(tokens, top_k, dtype=torch.int64, device=x.device) for _ in range(2))
    weight = torch.empty(tokens, top_k, device=x.device)
    padded = triton.next_power_of_2(experts)
    logits_kernel[(parts, tokens)](x.contiguous(), router, partial, width, experts, ROUTER, padded, num_warps=8)
    choose_kernel[(tokens,)](
        partial, shift if isinstance(shift, Tensor) else None, bias, score, expert, favoured, weight,
        parts, experts, scale, TINY, VANISHING, triton.next_power_of_2(parts), padded, top_k,
        triton.next_power_of_2(top_k), softmax, normalize, num_warps=4,
    )  # fmt: skip
    return Routed(Routing(expert, weight), score, favoured)


def moe_experts(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    bias: Tensor | tuple[()] = (),
    *,
    limit: float | None = None,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`pure.model.experts.moe_experts` of at most `PAIRS` pairs, without gradients.

    x        [N D]
    up       [E D 2 F]
    down     [E F D]
    bias     [E 2 F] or ()
    returns  [N D] in the format of `x`, [E] i64
    """
    (tokens, width), top_k, (experts, inner) = x.shape, routing.expert.shape[1], down.shape[:2]
    x, expert, pairs = x.contiguous(), routing.expert.contiguous(), tokens * top_k
    first, second = (UP, DOWN) if pairs < PAIRS // 2 else (SEVERAL, SEVERAL)
    a = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    y = torch.empty(pairs, width, device=x.device)
    out, count = torch.empty_like(x), torch.empty(experts, dtype=torch.int64, device=x.device)
    up_kernel[(triton.cdiv(inner, first.block_n), pairs)](
        x, expert, up, bias if isinstance(bias, Tensor) else None, a, width, inner, top_k,
        first.block_k, first.block_n, first.num_stages, limit, alpha, num_warps=first.num_warps,
    )  # fmt: skip
    down_kernel[(triton.cdiv(width, second.block_n), pairs)](
        a, expert, down, y, width, inner, second.block_k, second.block_n, second.num_stages, num_warps=second.num_warps
    )
    sum_kernel[(triton.cdiv(width, SUM), tokens)](
        y, routing.weight.contiguous(), expert, out, count, pairs, width, experts,
        top_k, SUM, max(16, triton.next_power_of_2(experts)), max(16, triton.next_power_of_2(pairs)), num_warps=4,
    )  # fmt: skip
    return out, count
