"""Latent attention of one token of a single row, in three launches between two products.

H heads · C channels of a query, P of them rotated · R latent · Z channels a head of keys and values, U those of values
A width of the query part · N places of the cache · S parts of a sum

The first launch takes the queries to the latents and writes the cache's row, the second attends to parts of the keys,
the third joins the parts and takes them back to values. Products before and after are `row.product`. The token's place
and the rest of the cache are read before the launches ahead have ended, as weights are: who counts the place up, and
what wrote earlier rows, ended before the first launch of this token began.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels import row
from nmoe.effects.kernels.attention import mla_cached
from nmoe.effects.kernels.early import fetch, launched, release, wait
from nmoe.effects.kernels.row import Parts, inverse_rms, summed
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


FETCHED = 24 << 20
"""Bytes of the first product of the shared experts, or of a dense MLP, that are asked for while attention waits for
itself: an H200's L2 cache has 50 MB, and attention's own weights are 31."""


@triton.jit
def rotated(even, odd, c, s, to, at, inside):
    """Pairs of channels with their position, at their place in `to`."""
    dtype = to.dtype.element_ty
    even, odd = even.to(dtype).to(tl.float32), odd.to(dtype).to(tl.float32)
    tl.store(to + at, (even * c - odd * s).to(dtype), mask=inside)
    tl.store(to + at + 1, (odd * c + even * s).to(dtype), mask=inside)


@triton.jit
def latents_of_head(
    q, q_squares, up, query, later, program, H, q_step, q_width, R, C, P, Z, later_size, eps,
    Q_PARTS: tl.constexpr, Q_SQUARES: tl.constexpr, NP: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some latents of a head's query, and a share of weights that are read later."""
    head = program // tl.cdiv(R, RANKS)
    latent = (program - head * tl.cdiv(R, RANKS)) * RANKS + tl.arange(0, RANKS)
    channel = tl.arange(0, NP)
    inside = (latent < R)[:, None] & (channel < C - P)[None, :]
    block = tl.load(up + (latent[:, None] * H + head) * Z + channel[None, :], mask=inside, other=0.0)
    if later is not None:
        share = tl.cdiv(later_size, H * tl.cdiv(R, RANKS) * 16) * 16
        begin = program * share
        size: tl.constexpr = later.dtype.element_ty.primitive_bitwidth // 8
        fetch(later + begin // size, tl.minimum(share, later_size - begin), EARLY)
    wait(EARLY)
    dtype = query.dtype.element_ty
    value = summed(None, q, head * C + channel, channel < C - P, q_step, Q_PARTS)
    value = (value * inverse_rms(q_squares, q_width, eps, Q_SQUARES)).to(dtype).to(tl.float32)
    result = tl.sum(block.to(tl.float32) * value[None, :], 1)
    tl.store(query + head * R + latent, result.to(dtype), mask=latent < R)


@triton.jit
def new_row(
    q, q_squares, product, squares, gain, cos, sin, place, padding, turned, cache,
    H, q_step, q_width, product_step, width, A, R, P, C, eps,
    Q_PARTS: tl.constexpr, Q_SQUARES: tl.constexpr, PARTS: tl.constexpr, SQUARES: tl.constexpr,
    RP: tl.constexpr, PP: tl.constexpr, HP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The row of the cache, and the rotated channels of all queries."""
    latent, pair, head = tl.arange(0, RP), tl.arange(0, PP), tl.arange(0, HP)
    real = pair < P // 2
    factor = tl.load(gain + latent, mask=latent < R, other=0.0).to(tl.float32)
    at = tl.load(place)
    entry = (at - tl.minimum(at, tl.load(padding).to(tl.int64))) * (P // 2) + pair
    c, s = tl.load(cos + entry, mask=real, other=0.0), tl.load(sin + entry, mask=real, other=0.0)
    wait(EARLY)
    dtype = cache.dtype.element_ty
    scale, q_scale = inverse_rms(squares, width, eps, SQUARES), inverse_rms(q_squares, q_width, eps, Q_SQUARES)
    value = summed(None, product, A + latent, latent < R, product_step, PARTS) * scale
    value = value.to(dtype).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / R + eps) * factor
    own = cache + at * (R + P)
    tl.store(own + latent, value.to(dtype), mask=latent < R)
    even = summed(None, product, A + R + 2 * pair, real, product_step, PARTS)
    odd = summed(None, product, A + R + 2 * pair + 1, real, product_step, PARTS)
    rotated(even * scale, odd * scale, c, s, own + R, 2 * pair, real)
    here = head[:, None] * C + (C - P) + 2 * pair[None, :]
    inside = (head < H)[:, None] & real[None, :]
    all_even = summed(None, q, here, inside, q_step, Q_PARTS)
    all_odd = summed(None, q, here + 1, inside, q_step, Q_PARTS)
    at_turned = head[:, None] * P + 2 * pair[None, :]
    rotated(all_even * q_scale, all_odd * q_scale, c[None, :], s[None, :], turned, at_turned, inside)


@triton.jit
def query_kernel(
    q, q_squares, product, squares, up, gain, cos, sin, place, padding, query, turned, cache, later,
    H, q_step, q_width, product_step, width, A, R, P, C, Z, later_size, eps,
    Q_PARTS: tl.constexpr, Q_SQUARES: tl.constexpr, PARTS: tl.constexpr, SQUARES: tl.constexpr,
    NP: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, HP: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some latents of a head's query; the last program: what positions enter."""
    release(EARLY)
    program = tl.program_id(0)
    if program < H * tl.cdiv(R, RANKS):
        latents_of_head(
            q, q_squares, up, query, later, program, H, q_step, q_width, R, C, P, Z, later_size, eps,
            Q_PARTS, Q_SQUARES, NP, RANKS, EARLY,
        )  # fmt: skip
    else:
        new_row(
            q, q_squares, product, squares, gain, cos, sin, place, padding, turned, cache,
            H, q_step, q_width, product_step, width, A, R, P, C, eps,
            Q_PARTS, Q_SQUARES, PARTS, SQUARES, RP, PP, HP, EARLY,
        )  # fmt: skip


@triton.jit
def value_kernel(
    part, top, total, place, padding, up, out, H, parts, R, U, Z,
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
    last = tl.load(place).to(tl.int32)
    real = index < tl.minimum(parts, tl.cdiv(last - tl.minimum(last, tl.load(padding)) + 1, KEYS))
    wait(EARLY)
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
    later: Tensor | None,
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
    later    a weight that the layer reads after this, of which the first bytes are fetched, or None

    Writes:  `cache`.
    """
    (rank, heads, both), turns, values = p.up.shape, 2 * rope.cos.shape[-1], p.out.shape[1]
    product, total = row.product(x, None if added is None else Parts(parts=added), p.down, gain, eps, keep=True)
    width = p.down.shape[1] - rank - turns
    q = product
    if isinstance(p.query, QueryUp):
        q, _ = row.product(None, product, p.query.up.flatten(1), p.query.norm, eps)
    query, turned = x.new_empty(heads, rank), x.new_empty(heads, turns)
    channels = both - values + turns
    fetched = 0 if later is None else min(FETCHED, later.nbytes // 16 * 16)
    query_kernel[(heads * triton.cdiv(rank, tile.query) + 1,)](
        q.parts, q.squares, product.parts, product.squares, p.up, p.norm, rope.cos, rope.sin,
        place, padding, query, turned, cache, later,
        heads, q.parts.stride(0), q.width, product.parts.stride(0), product.width, width, rank, turns, channels, both,
        fetched, eps,
        len(q.parts), len(q.squares), len(product.parts), len(product.squares),
        triton.next_power_of_2(both - values), triton.next_power_of_2(rank),
        triton.next_power_of_2(turns // 2), triton.next_power_of_2(heads), tile.query,
        **launched(x), num_warps=tile.num_warps,
    )  # fmt: skip
    parts = min(keys.programs, triton.cdiv(cache.shape[1], keys.keys))
    part = torch.empty(parts, heads, rank, device=x.device)
    top, weights = (torch.empty(parts, heads, device=x.device) for _ in range(2))
    mla_cached.attend_kernel[(parts, 1, triton.cdiv(heads, keys.heads))](
        query, turned, rope.cos, rope.sin, cache, padding, place,
        part, top, weights, heads, 1, turned.stride(0), turns, cache.stride(0), scale,
        rank, max(16, triton.next_power_of_2(rank)), turns, max(16, triton.next_power_of_2(turns)),
        keys.heads, keys.keys, SINGLE=True, **launched(x), num_warps=keys.num_warps, num_stages=keys.num_stages,
    )  # fmt: skip
    slices = triton.cdiv(rank, tile.value)
    o = torch.empty(slices, heads * values, device=x.device)
    value_kernel[(heads, slices, triton.cdiv(values, tile.columns))](
        part, top, weights, place, padding, p.up, o, heads, parts, rank, values, both,
        keys.keys, keys.programs, tile.value, tile.columns, **launched(x), num_warps=tile.num_warps,
    )  # fmt: skip
    out, _ = row.product(None, Parts(parts=o), p.out.flatten(0, 1))
    return total, out.parts
