"""Latent attention of one new token a row over the filled part of its cache.

B sequences of one query each · N places of a cache · H heads · C channels of a query, P of them rotated · R latent
Z channels a head of keys and values

Queries and key are rotated where they are read, so that their projections are followed by no launch of its own. A row's
keys are shared out over programs, each of which attends to its part for some heads; another launch joins them.
"""

from __future__ import annotations

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe.effects.kernels.early import fetch, release, wait
from nmoe.pure.model.attention.cached import New
from nmoe.pure.model.attention.mla import Mla, QueryUp
from nmoe.pure.model.rope import Rope


@attrs.frozen(kw_only=True)
class CachedTile:
    """Block sizes and launch options."""

    heads: int  # of a program, at least 16
    keys: int  # of a step
    programs: int  # most of them that share a row, a power of two
    num_warps: int
    num_stages: int


TILE = CachedTile(heads=16, keys=32, programs=64, num_warps=4, num_stages=2)

JOINED = 128
"""Channels of a head that one program joins."""


@triton.jit
def latents_kernel(
    product, query_gain, gain, cos, sin, position, query, latent, product_row, A, R, P, eps,
    AP: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """Of a row of [query part | latent | key]: the query part normed where it has a gain, and the row of the cache."""
    row = tl.program_id(0).to(tl.int64)
    channel, part, pair = tl.arange(0, AP), tl.arange(0, RP), tl.arange(0, PP)
    own = product + row * product_row
    if query_gain is not None:
        value = tl.load(own + channel, mask=channel < A, other=0.0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 0) / A + eps)
        value *= tl.load(query_gain + channel, mask=channel < A, other=0.0).to(tl.float32)
        tl.store(query + row * A + channel, value.to(query.dtype.element_ty), mask=channel < A)
    value = tl.load(own + A + part, mask=part < R, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / R + eps)
    value *= tl.load(gain + part, mask=part < R, other=0.0).to(tl.float32)
    tl.store(latent + row * (R + P) + part, value.to(latent.dtype.element_ty), mask=part < R)
    at = tl.load(position + row).to(tl.int64) * (P // 2) + pair
    c, s = tl.load(cos + at, mask=pair < P // 2, other=0.0), tl.load(sin + at, mask=pair < P // 2, other=0.0)
    even = tl.load(own + A + R + 2 * pair, mask=pair < P // 2, other=0.0).to(tl.float32)
    odd = tl.load(own + A + R + 2 * pair + 1, mask=pair < P // 2, other=0.0).to(tl.float32)
    key = latent + row * (R + P) + R + 2 * pair
    tl.store(key, (even * c - odd * s).to(latent.dtype.element_ty), mask=pair < P // 2)
    tl.store(key + 1, (odd * c + even * s).to(latent.dtype.element_ty), mask=pair < P // 2)


@triton.jit
def attend_kernel(
    query, q, cos, sin, cache, start, position, out, top, total, H, B, q_row, q_head, cache_row, scale,
    R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    SINGLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of a row's keys: values summed by weights relative to `top`, and the sum of the weights.

    Of a single row `q` is rotated already, `position` is that in the cache, and a part without keys leaves what nobody
    reads as it is.
    """
    release(EARLY)
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    latent, rotated, place = tl.arange(0, RP), tl.arange(0, PP), tl.arange(0, KEYS)
    if SINGLE:
        last = tl.load(position).to(tl.int32)
        first = tl.minimum(tl.load(start), last)
        begin, end = first + part * KEYS, last + 1
        size: tl.constexpr = (R + P) * (cache.dtype.element_ty.primitive_bitwidth // 8)
        fetch(cache + begin * (R + P), tl.minimum(KEYS, last - begin) * size, EARLY)
        wait(EARLY)
    else:
        first = tl.load(start + row)
        placed = tl.load(position + row)
        begin, end = first + part * KEYS, first + placed + 1
    if (not SINGLE) or begin < end:
        real = head < H
        of_latent = real[:, None] & (latent < R)[None, :]
        wide = tl.load(query + (head.to(tl.int64)[:, None] * B + row) * R + latent[None, :], mask=of_latent, other=0.0)
        here = q + row * q_row + head.to(tl.int64)[:, None] * q_head + rotated[None, :]
        turned = tl.load(here, mask=real[:, None] & (rotated < P)[None, :], other=0.0)
        if not SINGLE:
            pair = tl.arange(0, PP // 2)
            entry = placed.to(tl.int64) * (P // 2) + pair
            c = tl.load(cos + entry, mask=pair < P // 2, other=0.0)[None, :]
            s = tl.load(sin + entry, mask=pair < P // 2, other=0.0)[None, :]
            even, odd = tl.split(tl.reshape(turned.to(tl.float32), (HEADS, PP // 2, 2)))
            joined = tl.join(even * c - odd * s, odd * c + even * s)
            turned = tl.reshape(joined, (HEADS, PP)).to(q.dtype.element_ty)
        best = tl.full((HEADS,), -float("inf"), tl.float32)
        weights = tl.zeros((HEADS,), tl.float32)
        summed = tl.zeros((HEADS, RP), tl.float32)
        # which keys are summed together does not depend on the room, so that a text does not on its length
        for at in range(begin, end, tl.num_programs(0) * KEYS):
            key = at + place
            address = cache + row * cache_row + key.to(tl.int64)[:, None] * (R + P)
            inside = (key < end)[:, None]
            value = tl.load(address + latent[None, :], mask=inside & (latent < R)[None, :], other=0.0)
            other = tl.load(address + R + rotated[None, :], mask=inside & (rotated < P)[None, :], other=0.0)
            score = (tl.dot(wide, tl.trans(value)) + tl.dot(turned, tl.trans(other))) * scale
            score = tl.where((key < end)[None, :], score, -float("inf"))
            higher = tl.maximum(best, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            shrink = tl.exp(best - higher)
            weights = weights * shrink + tl.sum(weight, 1)
            summed = tl.dot(weight.to(value.dtype), value, summed * shrink[:, None])
            best = higher
        at = (row * tl.num_programs(0) + part) * H + head
        tl.store(top + at, best, mask=real)
        tl.store(total + at, weights, mask=real)
        tl.store(out + at[:, None] * R + latent[None, :], summed, mask=of_latent)


@triton.jit
def join_kernel(
    part, top, total, out, parts, H, B, R: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The parts of some channels of one head of a row as one."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, latent = tl.arange(0, PARTS), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (row * parts + index) * H + head
    real = index < parts
    best = tl.load(top + at, mask=real, other=-float("inf"))
    share = tl.exp(best - tl.max(best, 0))  # 0 of a part without keys
    weights = tl.sum(share * tl.load(total + at, mask=real, other=0.0), 0)
    inside = real[:, None] & (latent < R)[None, :]
    value = tl.load(part + at[:, None] * R + latent[None, :], mask=inside, other=0.0)
    joined = tl.sum(share[:, None] * value, 0) / weights
    tl.store(out + (head.to(tl.int64) * B + row) * R + latent, joined.to(out.dtype.element_ty), mask=latent < R)


def attend_new(
    p: Mla, x: Tensor, cache: Tensor, new: New, rope: Rope, *, eps: float, scale: float, tile: CachedTile = TILE
) -> tuple[Tensor, Tensor]:
    """`pure.model.attention.mla.attend_new` of one new token a row, by kernels that read no key beyond it.

    x        [B 1 D]   normed block input
    scale    factor on the scores
    returns  [B 1 H U], and the cache with the new tokens [B N R+P]; without gradients
    """
    query, rows = latents(x[:, 0] @ p.down, p, rope, new, eps)
    cache = new.store(cache, rows[:, None], new.place)
    if isinstance(p.query, QueryUp):
        query = query @ p.query.up.flatten(1)
    return attend(query.unflatten(-1, (p.up.shape[1], -1)), cache, p.up, rope, new, scale, tile), cache


def latents(product: Tensor, p: Mla, rope: Rope, new: New, eps: float) -> tuple[Tensor, Tensor]:
    """The query part of each row, normed where it is a latent, and what the cache keeps of it: norms, rotation.

    product  [B A+R+P]
    returns  [B A], [B R+P]
    """
    rank, rotated = p.up.shape[0], 2 * rope.cos.shape[-1]
    width, gain = product.shape[1] - rank - rotated, p.query.norm if isinstance(p.query, QueryUp) else None
    query = None if gain is None else torch.empty(len(product), width, dtype=product.dtype, device=product.device)
    kept = torch.empty(len(product), rank + rotated, dtype=product.dtype, device=product.device)
    latents_kernel[(len(product),)](
        product, gain, p.norm, rope.cos, rope.sin,
        new.documents.position.contiguous(), query, kept, product.stride(0), width, rank, rotated, eps,
        triton.next_power_of_2(width), triton.next_power_of_2(rank), triton.next_power_of_2(rotated // 2), num_warps=8,
    )  # fmt: skip
    return product[:, :width] if query is None else query, kept


def attend(q: Tensor, cache: Tensor, up: Tensor, rope: Rope, new: New, scale: float, tile: CachedTile = TILE) -> Tensor:
    """Attention of one query a row, not rotated yet, over what it sees of its cache.

    q        [B H C]
    cache    [B N R+P]
    up       [R H Z]
    returns  [B 1 H U]
    """
    (rows, heads, channels), (places, rank) = q.shape, (cache.shape[1], up.shape[0])
    rotated = cache.shape[-1] - rank
    nope = channels - rotated
    up_key, up_value = up.split((nope, up.shape[-1] - nope), dim=-1)
    query = q[..., :nope].transpose(0, 1) @ up_key.permute(1, 2, 0)  # [H B R]
    parts = min(tile.programs, triton.cdiv(places, tile.keys))
    part = torch.empty(rows, parts, heads, rank, device=q.device)
    top, total = (torch.empty(rows, parts, heads, device=q.device) for _ in range(2))
    out = torch.empty(heads, rows, rank, dtype=q.dtype, device=q.device)
    padded, turned = max(16, triton.next_power_of_2(rank)), max(16, triton.next_power_of_2(rotated))
    attend_kernel[(parts, rows, triton.cdiv(heads, tile.heads))](
        query.contiguous(), q[..., nope:], rope.cos, rope.sin, cache,
        new.documents.start.contiguous(), new.documents.position.contiguous(),
        part, top, total, heads, rows, q.stride(0), q.stride(1), cache.stride(0), scale,
        rank, padded, rotated, turned, tile.heads, tile.keys, SINGLE=False, EARLY=False,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    join_kernel[(rows, heads, triton.cdiv(rank, JOINED))](
        part, top, total, out, parts, heads, rows, rank, JOINED, tile.programs, num_warps=4
    )
    return (out @ up_value.transpose(0, 1)).transpose(0, 1)[:, None]
