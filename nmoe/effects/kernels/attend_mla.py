"""Causal latent attention: `pure.attention.mla.attend_mla` with a backward pass that is bitwise repeatable.

Forward is cuDNN's or our own; backward is two kernels of our own, one that owns queries and one that owns keys, so that
every sum has one owner and one order. Keys are never assembled for our kernels: a head's own channels and the shared
rotated ones are multiplied apart. Channels are read through descriptors, which fill with zeros what a block has beyond
a sequence's or a head's end.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.tile import Tile
from nmoe.errors import InputError

__all__ = ["TILES", "Tiles", "attend_mla", "attend_mla_cudnn"]

HIDDEN = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@attrs.frozen(kw_only=True)
class Tiles:
    """m queries by n keys a step of each kernel; the programs of k heads run side by side, longest first."""

    forward: Tile
    dq: Tile
    dkv: Tile


TILES = Tiles(
    forward=Tile(m=128, n=64, k=8, warps=8, stages=3),
    dq=Tile(m=128, n=64, k=8, warps=8, stages=3),
    dkv=Tile(m=32, n=64, k=8, warps=4, stages=2),
)


def attend_mla(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    forward: Literal["cudnn", "triton"] = "triton",
    tiles: Tiles = TILES,
) -> Tensor:
    """Causal softmax attention; a head's key is its own part of `kv` beside the shared `k_rope`.

    q        [B T H C]       the last P channels are rotated; bf16 or fp16
    kv       [B T H Z]       C - P channels of key, then U of value
    k_rope   [B T P]         rotated key, shared by all heads
    start    [B T] i32 | ()  query i sees keys start[i]..i; must not decrease along T. (): all keys up to i
    scale    factor on the scores, positive
    forward  whose forward pass: cuDNN's is the faster one and knows no `start`
    returns  [B T H U]
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    forward 2·(C + U), backward 2·(4·C + 3·U) FLOPs for each pair of query and visible key, times H.
    """
    check(q, kv, k_rope, start, scale=scale, forward=forward)
    return Attend.apply(q, kv, k_rope, start, scale, forward, tiles)


def attend_mla_cudnn(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """`attend_mla` with cuDNN's own backward pass, whose gradient of `q` differs from run to run in the last bits."""
    check(q, kv, k_rope, start, scale=scale, forward="cudnn")
    return cudnn_forward(q, kv, k_rope, scale)[0]


def check(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], *, scale: float, forward: str) -> None:
    """Refuse what the kernels would compute wrongly or not at all."""
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    sizes = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": kv.shape[-1] - nope}
    step = 16 // q.element_size()
    problems = [
        f"model.attention.{key}: a multiple of {step} up to 256 for the attention kernels, got {size}; "
        f"write {min(256, max(step, -(-size // step) * step))}"
        for key, size in sizes.items()
        if size < step or size % step or size > 256
    ]
    if len({q.dtype, kv.dtype, k_rope.dtype}) > 1 or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"attend_mla: q, kv and k_rope all in bf16 or all in fp16, got {q.dtype}, {kv.dtype}, {k_rope.dtype}; "
            "use the reference for other formats"
        )
    if not scale > 0:
        problems.append(f"attend_mla: scale > 0, got {scale}; negate q instead")
    if forward == "cudnn" and isinstance(start, Tensor):
        problems.append("attend_mla: cuDNN's forward sees whole sequences, got start; pass forward='triton'")
    if problems:
        raise InputError(*problems)


class Attend(torch.autograd.Function):
    """Ties a forward pass to our backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        start: Tensor | tuple[()],
        scale: float,
        forward: str,
        tiles: Tiles,
    ) -> Tensor:
        """Output, and the logarithm of each row's sum of exponentials kept for backward."""
        q, kv, k_rope = (readable(each) for each in (q, kv, k_rope))
        if forward == "cudnn":
            o, lse = cudnn_forward(q, kv, k_rope, scale)
        else:
            o, lse = triton_forward(q, kv, k_rope, start, scale, tiles.forward)
        ctx.save_for_backward(q, kv, k_rope, o, lse, *((start,) if isinstance(start, Tensor) else ()))
        ctx.scale, ctx.tiles = scale, tiles
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, kv and k_rope."""
        q, kv, k_rope, o, lse, *start = ctx.saved_tensors
        given = (*start, ())[0]
        found = backward(q, kv, k_rope, given, o, lse, readable(gradients[0]), ctx.scale, ctx.tiles)
        return *found, None, None, None, None


def cudnn_forward(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's output [B T H U], and natural logarithms [B H T] of the sums of exponentials, in fp32."""
    nope = q.shape[-1] - k_rope.shape[-1]
    k = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, q.shape[2], -1)), dim=-1)
    operands = (each.transpose(1, 2) for each in (q, k, kv[..., nope:]))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *operands, None, True, 0.0, True, False, scale=scale
    )
    return o.transpose(1, 2), lse.squeeze(-1)


def triton_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Our output [B T H U], and natural logarithms [B H T] of the sums of exponentials, in fp32."""
    batch, positions, heads, _ = q.shape
    nope = q.shape[-1] - k_rope.shape[-1]
    o = q.new_empty(batch, positions, heads, kv.shape[-1] - nope)
    lse = q.new_empty(batch, heads, positions, dtype=torch.float32)
    forward_kernel[grid(q, tile.m)](
        **operands(q, kv, k_rope, tile),
        o=described(o, tile.m),
        lse=lse,
        start=start if isinstance(start, Tensor) else None,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return o, lse


def backward(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | tuple[()],
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope, each in the format of its tensor.

    The gradient of `k_rope` is summed over heads in fp32 from one rounded part a head.
    """
    batch, positions, heads, _ = q.shape
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    lse = lse.contiguous()  # cuDNN lays it out [B T H] when it packs sequences
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    parts = q.new_empty(batch, heads, positions, rope)
    tile = tiles.dq
    dq_kernel[grid(q, tile.m)](
        **operands(q, kv, k_rope, tile),
        o=described(o, tile.m),
        do=described(do, tile.m),
        dq=described(dq[..., :nope], tile.m),
        dq_rope=described(dq[..., nope:], tile.m),
        lse=lse,
        delta=delta,
        start=start if isinstance(start, Tensor) else None,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = tiles.dkv
    dkv_kernel[grid(q, tile.n)](
        **operands(q, kv, k_rope, tile),
        do=described(do, tile.m),
        dk=described(dkv[..., :nope], tile.n),
        dk_rope=described(parts.transpose(1, 2), tile.n),
        dv=described(dkv[..., nope:], tile.n),
        lse=lse,
        delta=delta,
        start=start if isinstance(start, Tensor) else None,
        end=ends(start) if isinstance(start, Tensor) else None,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dq, dkv, parts.sum(1)


def ends(start: Tensor) -> Tensor:
    """One past the last query that sees each key, [B T] i32: how many starts are not after it."""
    keys = torch.arange(start.shape[1], dtype=start.dtype, device=start.device)
    return torch.searchsorted(start, keys.expand_as(start).contiguous(), right=True, out_int32=True)


def readable(x: Tensor) -> Tensor:
    """`x` where a descriptor can read it: channels side by side, all else in steps of 16 bytes; or a copy that is."""
    width = x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step * width % 16 == 0 for step in x.stride()[:-1])
    return x if fits else x.contiguous()


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of `rows` positions of one head of x [B T H channels], all its channels rounded up to a power of two."""
    batch, positions, heads, channels = x.shape
    by_batch, by_position, by_head, by_channel = x.stride()
    shape, strides = [batch, heads, positions, channels], [by_batch, by_head, by_position, by_channel]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, box(channels)])


def box(channels: int) -> int:
    """Channels of a block: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(channels))


def operands(q: Tensor, kv: Tensor, k_rope: Tensor, tile: Tile) -> dict[str, TensorDescriptor]:
    """What every kernel reads."""
    nope = q.shape[-1] - k_rope.shape[-1]
    return {
        "q": described(q[..., :nope], tile.m),
        "q_rope": described(q[..., nope:], tile.m),
        "k": described(kv[..., :nope], tile.n),
        "k_rope": described(k_rope[:, :, None], tile.n),
        "v": described(kv[..., nope:], tile.n),
    }


def numbers(q: Tensor, scale: float) -> dict[str, Any]:
    """Sizes and the scale."""
    return {"positions": q.shape[1], "heads": q.shape[2], "rows": q.shape[0] * q.shape[2], "scale": scale}


def constants(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], tile: Tile) -> dict[str, Any]:
    """What a kernel is compiled for."""
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    return {
        "m_size": tile.m,
        "n_size": tile.n,
        "together": tile.k,
        "nope": box(nope),
        "rope": box(rope),
        "value": box(kv.shape[-1] - nope),
        "documents": isinstance(start, Tensor),
    }


def grid(q: Tensor, size: int) -> tuple[int]:
    """One program a block of positions of each head of each sequence."""
    return (triton.cdiv(q.shape[1], size) * q.shape[0] * q.shape[2],)


@triton.jit
def place(blocks, rows, together: tl.constexpr):
    """Block and (sequence, head) of this program: first blocks of `together` heads, then their second ones, ...

    Together they stay within the cache; the long ones come first, so that no long one is alone at the end.
    """
    per_group = blocks * together
    group = tl.program_id(0) // per_group
    within = tl.program_id(0) % per_group
    width = tl.minimum(rows - group * together, together)
    return within // width, group * together + within % width


@triton.jit
def block(x, b, h, t, size: tl.constexpr, channels: tl.constexpr):
    return tl.reshape(x.load([b, h, t, 0]), (size, channels))


@triton.jit
def put_(x, b, h, t, value, size: tl.constexpr, channels: tl.constexpr):
    x.store([b, h, t, 0], tl.reshape(value.to(x.dtype), (1, 1, size, channels)))


@triton.jit
def visible(queries, keys, first, documents: tl.constexpr):
    """Where a query sees a key; the three broadcast."""
    seen = queries >= keys
    if documents:
        seen = seen & (first <= keys)
    return seen


@triton.jit
def key_ranges(start, b, m, positions, m_size: tl.constexpr, n_size: tl.constexpr, documents: tl.constexpr):
    """Keys of a block of queries: from where to where every query sees all, and the whole."""
    diagonal = m // n_size * n_size
    until = tl.minimum(m + m_size, positions)
    if documents:
        at = start + b.to(tl.int64) * positions
        begin = tl.load(at + m) // n_size * n_size
        full = tl.minimum(tl.cdiv(tl.load(at + until - 1), n_size) * n_size, diagonal)
    else:
        begin = 0
        full = 0
    return begin, full, diagonal, until


@triton.jit
def forward_range(
    acc,
    total,
    top,
    q,
    q_rope,
    queries,
    first,
    k,
    k_rope,
    v,
    b,
    h,
    begin,
    end,
    scale2,
    n_size: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for n in tl.range(begin, end, n_size):
        s = tl.dot(q, block(k, b, h, n, n_size, nope).T)
        s = tl.dot(q_rope, block(k_rope, b, 0, n, n_size, rope).T, s)
        if masked:
            # Scaled before the comparison: a hidden score minus itself must be exactly zero.
            keys = n + tl.arange(0, n_size)
            s = tl.where(visible(queries[:, None], keys[None, :], first[:, None], documents), s * scale2, HIDDEN)
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        else:
            higher = tl.maximum(top, tl.max(s, 1) * scale2)
            p = tl.exp2(s * scale2 - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), block(v, b, h, n, n_size, value), acc * shrink[:, None])
        top = higher
    return acc, total, top


@triton.jit
def forward_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    o,
    lse,
    start,
    positions,
    heads,
    rows,
    scale,
    m_size: tl.constexpr,
    n_size: tl.constexpr,
    together: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Output of one block of queries of one head."""
    blocks = tl.cdiv(positions, m_size)
    index, row = place(blocks, rows, together)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * m_size
    queries = m + tl.arange(0, m_size)
    first = queries
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=queries < positions, other=0)
    tile = block(q, b, h, m, m_size, nope)
    tile_rope = block(q_rope, b, h, m, m_size, rope)
    scale2 = scale * LOG2_E
    acc = tl.zeros([m_size, value], tl.float32)
    total = tl.zeros([m_size], tl.float32)
    top = tl.full([m_size], float("-inf"), tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, m_size, n_size, documents)
    if documents:
        acc, total, top = forward_range(
            acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, begin, full, scale2,
            n_size, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, total, top = forward_range(
        acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, full, diagonal, scale2,
        n_size, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, total, top = forward_range(
        acc, total, top, tile, tile_rope, queries, first, k, k_rope, v, b, h, diagonal, until, scale2,
        n_size, nope, rope, value, True, documents,
    )  # fmt: skip
    put_(o, b, h, m, acc / total[:, None], m_size, value)
    at = lse + row.to(tl.int64) * positions + queries
    tl.store(at, (top + tl.log2(total)) * LN_2, mask=queries < positions)


@triton.jit
def dq_range(
    acc,
    acc_rope,
    q,
    q_rope,
    do,
    lse2,
    delta,
    queries,
    first,
    k,
    k_rope,
    v,
    b,
    h,
    begin,
    end,
    scale2,
    n_size: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for n in tl.range(begin, end, n_size):
        keys = block(k, b, h, n, n_size, nope)
        keys_rope = block(k_rope, b, 0, n, n_size, rope)
        s = tl.dot(q, keys.T)
        s = tl.dot(q_rope, keys_rope.T, s)
        dp = tl.dot(do, block(v, b, h, n, n_size, value).T)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if masked:
            at = n + tl.arange(0, n_size)
            p = tl.where(visible(queries[:, None], at[None, :], first[:, None], documents), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        acc = tl.dot(ds, keys, acc)
        acc_rope = tl.dot(ds, keys_rope, acc_rope)
    return acc, acc_rope


@triton.jit
def dq_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    o,
    do,
    dq,
    dq_rope,
    lse,
    delta,
    start,
    positions,
    heads,
    rows,
    scale,
    m_size: tl.constexpr,
    n_size: tl.constexpr,
    together: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Gradient of one block of queries of one head, and for `dkv_kernel` what softmax takes off each of its rows."""
    blocks = tl.cdiv(positions, m_size)
    index, row = place(blocks, rows, together)
    b = row // heads
    h = row % heads
    m = (blocks - 1 - index) * m_size
    queries = m + tl.arange(0, m_size)
    inside = queries < positions
    first = queries
    if documents:
        first = tl.load(start + b.to(tl.int64) * positions + queries, mask=inside, other=0)
    at = row.to(tl.int64) * positions + queries
    gradient = block(do, b, h, m, m_size, value)
    off = tl.sum(gradient.to(tl.float32) * block(o, b, h, m, m_size, value).to(tl.float32), 1)
    tl.store(delta + at, off, mask=inside)
    lse2 = tl.load(lse + at, mask=inside, other=0.0) * LOG2_E
    tile = block(q, b, h, m, m_size, nope)
    tile_rope = block(q_rope, b, h, m, m_size, rope)
    scale2 = scale * LOG2_E
    acc = tl.zeros([m_size, nope], tl.float32)
    acc_rope = tl.zeros([m_size, rope], tl.float32)
    begin, full, diagonal, until = key_ranges(start, b, m, positions, m_size, n_size, documents)
    if documents:
        acc, acc_rope = dq_range(
            acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, begin, full,
            scale2, n_size, nope, rope, value, True, documents,
        )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, full, diagonal,
        scale2, n_size, nope, rope, value, False, documents,
    )  # fmt: skip
    acc, acc_rope = dq_range(
        acc, acc_rope, tile, tile_rope, gradient, lse2, off, queries, first, k, k_rope, v, b, h, diagonal, until,
        scale2, n_size, nope, rope, value, True, documents,
    )  # fmt: skip
    put_(dq, b, h, m, acc * scale, m_size, nope)
    put_(dq_rope, b, h, m, acc_rope * scale, m_size, rope)


@triton.jit
def dkv_range(
    acc,
    acc_rope,
    acc_v,
    keys,
    keys_rope,
    values,
    at,
    q,
    q_rope,
    do,
    lse,
    delta,
    start,
    b,
    h,
    begin,
    end,
    positions,
    scale2,
    m_size: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    masked: tl.constexpr,
    documents: tl.constexpr,
):
    for m in tl.range(begin, end, m_size):
        queries = m + tl.arange(0, m_size)
        inside = queries < positions
        tile = block(q, b, h, m, m_size, nope)
        tile_rope = block(q_rope, b, h, m, m_size, rope)
        gradient = block(do, b, h, m, m_size, value)
        # Scores are computed transposed: Triton 3.6 gets the transpose of a product wrong on sm_90.
        s = tl.dot(keys, tile.T)
        s = tl.dot(keys_rope, tile_rope.T, s)
        lse2 = tl.load(lse + queries, mask=inside, other=0.0) * LOG2_E
        p = tl.exp2(s * scale2 - lse2[None, :])
        if masked:
            first = queries
            if documents:
                first = tl.load(start + queries, mask=inside, other=0)
            p = tl.where(visible(queries[None, :], at[:, None], first[None, :], documents), p, 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v)
        dp = tl.dot(values, gradient.T)
        ds = (p * (dp - tl.load(delta + queries, mask=inside, other=0.0)[None, :])).to(tile.dtype)
        acc = tl.dot(ds, tile, acc)
        acc_rope = tl.dot(ds, tile_rope, acc_rope)
    return acc, acc_rope, acc_v


@triton.jit
def dkv_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    do,
    dk,
    dk_rope,
    dv,
    lse,
    delta,
    start,
    end,
    positions,
    heads,
    rows,
    scale,
    m_size: tl.constexpr,
    n_size: tl.constexpr,
    together: tl.constexpr,
    nope: tl.constexpr,
    rope: tl.constexpr,
    value: tl.constexpr,
    documents: tl.constexpr,
):
    """Gradient of one block of keys and values of one head."""
    index, row = place(tl.cdiv(positions, n_size), rows, together)
    b = row // heads
    h = row % heads
    n = index * n_size
    at = n + tl.arange(0, n_size)
    lse += row.to(tl.int64) * positions
    delta += row.to(tl.int64) * positions
    keys = block(k, b, h, n, n_size, nope)
    keys_rope = block(k_rope, b, 0, n, n_size, rope)
    values = block(v, b, h, n, n_size, value)
    scale2 = scale * LOG2_E
    acc = tl.zeros([n_size, nope], tl.float32)
    acc_rope = tl.zeros([n_size, rope], tl.float32)
    acc_v = tl.zeros([n_size, value], tl.float32)
    begin = n // m_size * m_size
    full = tl.cdiv(n + n_size - 1, m_size) * m_size
    until = positions
    split = positions
    if documents:
        start += b.to(tl.int64) * positions
        end += b.to(tl.int64) * positions
        until = tl.load(end + tl.minimum(n + n_size, positions) - 1)
        split = tl.maximum(tl.load(end + n) // m_size * m_size, full)
    acc, acc_rope, acc_v = dkv_range(
        acc, acc_rope, acc_v, keys, keys_rope, values, at, q, q_rope, do, lse, delta, start, b, h, begin,
        tl.minimum(full, until), positions, scale2, m_size, nope, rope, value, True, documents,
    )  # fmt: skip
    acc, acc_rope, acc_v = dkv_range(
        acc, acc_rope, acc_v, keys, keys_rope, values, at, q, q_rope, do, lse, delta, start, b, h, full,
        split, positions, scale2, m_size, nope, rope, value, False, documents,
    )  # fmt: skip
    if documents:
        acc, acc_rope, acc_v = dkv_range(
            acc, acc_rope, acc_v, keys, keys_rope, values, at, q, q_rope, do, lse, delta, start, b, h, split,
            until, positions, scale2, m_size, nope, rope, value, True, documents,
        )  # fmt: skip
    put_(dk, b, h, n, acc * scale, n_size, nope)
    put_(dk_rope, b, h, n, acc_rope * scale, n_size, rope)
    put_(dv, b, h, n, acc_v, n_size, value)
