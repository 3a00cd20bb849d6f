"""Latent attention of one token of a single row, in three launches between two products.

H heads · C channels of a query, P of them rotated · R latent · Z channels a head of keys and values, U of them of values
A width of the query part · N places of the cache · S parts of a sum

The first launch takes the queries to the latents and writes the cache's row, the second attends to parts of the keys,
the third joins the parts and takes them back to values. Products before and after are `row.product`.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels import row
from nmoe.effects.kernels.attention import mla_cached
from nmoe.effects.kernels.early import launched, release, wait
from nmoe.effects.kernels.row import summed
from nmoe.pure.model.attention.mla import Mla, QueryUp
from nmoe.pure.model.rope import Rope


@attrs.frozen(kw_only=True)
class SingleTile:
    """Latents and channels of `up` that a program holds in registers."""

    query: int  # latents of a program of the first launch, which has all channels of a key
    value: int  # latents of one of the third
    columns: int  # channels of a value there
    num_warps: int


TILE = SingleTile(query=64, value=128, columns=64, num_warps=4)
"""16 KB a program: 128 programs for 16 heads of 128 + 128 channels and 512 latents, in either launch."""


@triton.jit
def query_kernel(
    q, product, up, gain, cos, sin, place, padding, query, turned, cache, where,
    H, q_step, product_step, A, R, P, C, Z, eps,
    Q_PARTS: tl.constexpr, PARTS: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, HP: tl.constexpr,
    RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some latents of a head's query; the last program: rotated queries, the row of the cache, and its place."""
    release(EARLY)
    program = tl.program_id(0)
    blocks = tl.cdiv(R, RANKS)
    nope = C - P
    dtype = query.dtype.element_ty
    if program < H * blocks:
        head = program // blocks
        latent, channel = (program - head * blocks) * RANKS + tl.arange(0, RANKS), tl.arange(0, NP)
        inside = (latent < R)[:, None] & (channel < nope)[None, :]
        block = tl.load(up + (latent[:, None] * H + head) * Z + channel[None, :], mask=inside, other=0.0)
        wait(EARLY)
        value = summed(None, q, head * C + channel, channel < nope, q_step, Q_PARTS).to(dtype).to(tl.float32)
        result = tl.sum(block.to(tl.float32) * value[None, :], 1)
        tl.store(query + head * R + latent, result.to(dtype), mask=latent < R)
    else:
        latent, pair, head = tl.arange(0, RP), tl.arange(0, PP), tl.arange(0, HP)
        real = pair < P // 2
        factor = tl.load(gain + latent, mask=latent < R, other=0.0).to(tl.float32)
        wait(EARLY)
        at = tl.load(place)
        start = tl.minimum(at, tl.load(padding).to(tl.int64))
        position = at - start
        tl.store(where, start.to(tl.int32))
        tl.store(where + 1, position.to(tl.int32))
        c = tl.load(cos + position * (P // 2) + pair, mask=real, other=0.0)
        s = tl.load(sin + position * (P // 2) + pair, mask=real, other=0.0)
        value = summed(None, product, A + latent, latent < R, product_step, PARTS).to(dtype).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 0) / R + eps) * factor
        own = cache + at * (R + P)
        tl.store(own + latent, value.to(dtype), mask=latent < R)
        even = summed(None, product, A + R + 2 * pair, real, product_step, PARTS).to(dtype).to(tl.float32)
        odd = summed(None, product, A + R + 2 * pair + 1, real, product_step, PARTS).to(dtype).to(tl.float32)
        tl.store(own + R + 2 * pair, (even * c - odd * s).to(dtype), mask=real)
        tl.store(own + R + 2 * pair + 1, (odd * c + even * s).to(dtype), mask=real)
        here = head[:, None] * C + nope + 2 * pair[None, :]
        inside = (head < H)[:, None] & real[None, :]
        even = summed(None, q, here, inside, q_step, Q_PARTS).to(dtype).to(tl.float32)
        odd = summed(None, q, here + 1, inside, q_step, Q_PARTS).to(dtype).to(tl.float32)
        c, s = c[None, :], s[None, :]
        at_turned = turned + head[:, None] * P + 2 * pair[None, :]
        tl.store(at_turned, (even * c - odd * s).to(dtype), mask=inside)
        tl.store(at_turned + 1, (odd * c + even * s).to(dtype), mask=inside)


@triton.jit
def value_kernel(
    part, top, total, position, up, out, H, parts, R, U, Z,
    KEYS: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of some latents of a head as one, times some columns of its values: part of a sum over latents."""
    release(EARLY)
    head = tl.program_id(0)
    latent = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, PARTS)
    inside = (latent < R)[:, None] & (column < U)[None, :]
    block = tl.load(up + (latent[:, None] * H + head) * Z + (Z - U) + column[None, :], mask=inside, other=0.0)
    wait(EARLY)
    real = index < tl.minimum(parts, tl.cdiv(tl.load(position) + 1, KEYS))
    best = tl.load(top + index * H + head, mask=real, other=-float("inf"))
    share = tl.exp(best - tl.max(best, 0))
    weights = tl.sum(share * tl.load(total + index * H + head, mask=real, other=0.0), 0)
    here = part + (index * H + head)[:, None] * R + latent[None, :]
    value = tl.load(here, mask=real[:, None] & (latent < R)[None, :], other=0.0)
    joined = tl.sum(share[:, None] * value, 0) / weights
    # rounded where the products of several rows round
    joined = joined.to(up.dtype.element_ty).to(tl.float32)
    result = tl.sum(joined[:, None] * block.to(tl.float32), 0)
    tl.store(out + (tl.program_id(1) * H + head) * U + column, result, mask=column < U)


def attend_(
    p: Mla,
    x: Tensor,
    added: Tensor | None,
    gain: Tensor,
    cache: Tensor,
    place: Tensor,
    padding: Tensor,
    rope: Rope,
    *,
    eps: float,
    scale: float,
    tile: SingleTile = TILE,
    keys: mla_cached.CachedTile = mla_cached.TILE,
) -> tuple[Tensor, Tensor]:
    """The row that `x` [D] and `added` [S D] are together, and parts of what attention adds to it [S' D] f32.

    gain     [D]        of the norm before it
    cache    [1 N R+P]  of which the row at `place` is written
    place    0-d i64    of the token in the cache
    padding  [1] i32    tokens in front that count for nothing

    Writes:  `cache`.
    """
    (rank, heads, both), rotated, values = p.up.shape, 2 * rope.cos.shape[-1], p.out.shape[1]
    product, total = row.product(x, added, p.down, gain, eps, keep=True)
    width = p.down.shape[1] - rank - rotated
    q = product
    if isinstance(p.query, QueryUp):
        q, _ = row.product(None, product, p.query.up.flatten(1), p.query.norm, eps)
    query, turned = x.new_empty(heads, rank), x.new_empty(heads, rotated)
    where = torch.empty(2, dtype=torch.int32, device=x.device)
    channels = both - values + rotated
    query_kernel[(heads * triton.cdiv(rank, tile.query) + 1,)](
        q, product, p.up, p.norm, rope.cos, rope.sin, place, padding, query, turned, cache, where,
        heads, q.stride(0), product.stride(0), width, rank, rotated, channels, both, eps,
        len(q), len(product), triton.next_power_of_2(both - values), triton.next_power_of_2(rank),
        triton.next_power_of_2(rotated // 2), triton.next_power_of_2(heads), tile.query,
        **launched(x), num_warps=tile.num_warps,
    )  # fmt: skip
    parts = min(keys.programs, triton.cdiv(cache.shape[1], keys.keys))
    part = torch.empty(parts, heads, rank, device=x.device)
    top, weights = (torch.empty(parts, heads, device=x.device) for _ in range(2))
    mla_cached.attend_kernel[(parts, 1, triton.cdiv(heads, keys.heads))](
        query, turned, rope.cos, rope.sin, cache, where[:1], where[1:],
        part, top, weights, heads, 1, turned.stride(0), rotated, cache.stride(0), scale,
        rank, max(16, triton.next_power_of_2(rank)), rotated, max(16, triton.next_power_of_2(rotated)),
        keys.heads, keys.keys, SINGLE=True, **launched(x), num_warps=keys.num_warps, num_stages=keys.num_stages,
    )  # fmt: skip
    slices = triton.cdiv(rank, tile.value)
    o = torch.empty(slices, heads * values, device=x.device)
    value_kernel[(heads, slices, triton.cdiv(values, tile.columns))](
        part, top, weights, where[1:], p.up, o, heads, parts, rank, values, both,
        keys.keys, keys.programs, tile.value, tile.columns, **launched(x), num_warps=tile.num_warps,
    )  # fmt: skip
    out, _ = row.product(None, o, p.out.flatten(0, 1))
    return total, out
