"""Flash attention with grouped queries: `pure.model.attention.gqa.project` and `attend_gqa`, bitwise repeatable.

Letters: B sequences, T positions, H query heads, K heads of keys and values, G = H / K, J = H + 2 K, C channels a head
of queries and keys, U of values: for the branches of `nsa` they differ, and its compressed keys are M blocks of tokens.

Queries, keys and values are read where one product left them; nothing is padded, and keys are never repeated for their
group. Only blocks of keys that some query of a block sees are visited, so that cost grows linearly with a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.config.attention import GQA_HEAD_DIMS
from nmoe.effects.kernels.attention.blocks import box, described, ends, readable
from nmoe.effects.kernels.attention.gqa_kernels import dkv_kernel, dq_kernel, forward_kernel
from nmoe.effects.kernels.attention.rope import rotate_heads_
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import AttentionTile
from nmoe.errors import InputError
from nmoe.pure.model.attention.blocks import SHARERS
from nmoe.pure.model.rope import Rope

SHORT = 4
"""Blocks of a window up to which a kernel masks all of them, in one loop; beyond, only those that need it."""


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of the three kernels; `block_m` of `forward` and `dq` counts queries times heads."""

    forward: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile


@attrs.frozen(kw_only=True)
class Blocks:
    """What compressed keys stand for; a query sees those that end at or before it."""

    begins: Tensor  # [B M] i32, first token of each, T where there is none; of whole rows every `stride`-th
    size: int  # tokens of a block
    stride: int  # tokens from one to the next


@attrs.frozen(kw_only=True)
class Mask:
    """Which keys a query sees besides those up to its own."""

    start: Tensor | tuple[()]  # [B T] i32, first token of a query's document
    window: int | None = None  # keys a query sees at most; None: all
    blocks: Blocks | None = None  # of compressed keys; they have no window


def project(
    x: Tensor,
    qkv: Tensor,
    rope: Rope,
    positions: Tensor | tuple[()] = (),
    *,
    num_heads: int,
    bias: Tensor | tuple[()] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`pure.model.attention.gqa.project`: all three are views of one product, rotated in place while it is fresh."""
    heads = (x @ qkv.flatten(1)).unflatten(-1, qkv.shape[1:])
    heads = heads + bias if isinstance(bias, Tensor) else heads
    return rotate_heads_(heads, rope, positions, num_heads=num_heads)


def gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | tuple[()] = (),
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    window: int | None = None,
    tiles: Mapping[int | None, Tiles],
) -> Tensor:
    """Causal softmax attention over the last `window` keys, with a sink in the denominator.

    q, k, v  [B T H C], [B T K C]  bf16 or fp16; may be slices of one product
    sinks    [H] or ()             logits of a key without a value; (): a plain softmax
    start    [B T] i32 or ()       query i sees no key before start[i]; must not decrease along T. (): all keys up to i
    scale    factor on the scores, positive
    window   keys a query sees, its own included; None: all
    tiles    block sizes of each pass, by window
    returns  [B T H C]
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    forward 4·C, backward 10·C FLOPs for each pair of query and visible key, times H.
    """
    check(q, k, v, scale=scale, window=window)
    span = None if window is None or window >= q.shape[1] else window
    return GqaAttention.apply(q, k, v, sinks, Mask(start=start, window=span), scale, tiles[window])[0]


def check(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:  InputError with each problem.
    """
    problems: list[str] = []
    if q.shape[-1] not in GQA_HEAD_DIMS:
        known = " or ".join(map(str, GQA_HEAD_DIMS))
        problems.append(f"gqa_attention: expected {known} channels a head, got {q.shape[-1]}; use the reference")
    if q.shape[2] % k.shape[2] or k.shape != v.shape:
        problems.append(
            f"gqa_attention: expected k and v of one shape, whose heads divide the {q.shape[2]} query heads, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}; choose groups of the same size"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"gqa_attention: expected q, k and v all in bf16 or all in fp16, got {q.dtype}, {k.dtype}, {v.dtype}; "
            "use the reference for other formats"
        )
    if not scale > 0:
        problems.append(f"gqa_attention: expected scale > 0, got {scale}; negate q instead")
    if window is not None and window < 1:
        problems.append(f"gqa_attention: expected window >= 1, got {window}; a query sees its own key at least")
    if problems:
        raise InputError(*problems)


class GqaAttention(torch.autograd.Function):
    """Forward pass, and a backward pass of two kernels: one owns queries, the other keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | tuple[()],
        mask: Mask,
        scale: float,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        """Output, and the logarithm of each row's sum of exponentials, which is kept for backward: `forward_pass`."""
        q, k, v = (readable(x) for x in (q, k, v))
        o, lse = forward_pass(q, k, v, sinks, mask, scale, tiles.forward)
        begins = None if mask.blocks is None else mask.blocks.begins
        ctx.save_for_backward(
            q, k, v, o, lse, *(x if isinstance(x, Tensor) else None for x in (mask.start, begins, sinks))
        )
        ctx.mask = attrs.evolve(
            mask, start=(), blocks=mask.blocks and attrs.evolve(mask.blocks, begins=lse.new_empty(0))
        )
        ctx.scale, ctx.tiles = scale, tiles
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # of `lse` there is none
        return o, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and sinks."""
        q, k, v, o, lse, start, begins, sinks = ctx.saved_tensors
        blocks = ctx.mask.blocks and attrs.evolve(ctx.mask.blocks, begins=begins)
        mask = attrs.evolve(ctx.mask, start=() if start is None else start, blocks=blocks)
        do = gradients[0].contiguous()
        dq, delta, parts = dq_pass(q, k, v, () if sinks is None else sinks, mask, o, lse, do, ctx.scale, ctx.tiles.dq)
        dsinks = None if parts is None else torch.empty_like(sinks)
        dk, dv = dkv_pass(q, k, v, mask, lse, delta, do, parts, dsinks, ctx.scale, ctx.tiles.dkv)
        return dq, dk, dv, dsinks, None, None, None


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | tuple[()], mask: Mask, scale: float, tile: AttentionTile
) -> tuple[Tensor, Tensor]:
    """Output [B T H U], and logarithms to base 2 [B·H T] of the sums of exponentials, sinks included, in fp32."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = by_row(q)
    size, pack = packing(q, k, tile)
    near, far = parted(k)
    forward_kernel[grid(q.shape[1], size, q.shape[0] * q.shape[2] // pack)](
        q=q,
        k=described(near, tile.block_n),
        k_far=far if far is None else described(far, tile.block_n),
        v=described(v, tile.block_n),
        o=packed(o, size, pack),
        lse=lse,
        sinks=sinks if isinstance(sinks, Tensor) else None,
        padded=lse.stride(0),
        rows=q.shape[0] * (q.shape[2] // pack),
        **dict(zip(("q_by_batch", "q_by_position", "q_by_head"), q.stride()[:3], strict=True)),
        pack=pack,
        width=q.shape[-1],
        sunk=isinstance(sinks, Tensor),
        **seen_from(mask),
        **common(q, k, v, mask, scale, tile, tile.block_n),
    )
    return o, lse


def dq_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | tuple[()],
    mask: Mask,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    scale: float,
    tile: AttentionTile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of q, and what `dkv_pass` needs of each row.

    returns  dq [B T H C]; delta [B·H T] f32, what softmax takes off each of a row's gradients; parts [H parts] f32 of
             the gradients of sinks, or None
    """
    batch, positions, heads, _ = q.shape
    size, pack = packing(q, k, tile)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = by_row(q)
    parts = lse.new_empty(heads, batch * triton.cdiv(positions, size)) if isinstance(sinks, Tensor) else None
    near, far = parted(k)
    dq_near, dq_far = parted(dq)
    dq_kernel[grid(positions, size, batch * heads // pack)](
        q=q,
        k=described(near, tile.block_n),
        k_far=far if far is None else described(far, tile.block_n),
        v=described(v, tile.block_n),
        o=o,
        do=do,
        dq=packed(dq_near, size, pack),
        dq_far=dq_far if dq_far is None else packed(dq_far, size, pack),
        lse=lse,
        delta=delta,
        sinks=sinks if isinstance(sinks, Tensor) else None,
        sink_parts=parts,
        padded=lse.stride(0),
        rows=batch * (heads // pack),
        **dict(zip(("q_by_batch", "q_by_position", "q_by_head"), q.stride()[:3], strict=True)),
        pack=pack,
        width=q.shape[-1],
        value_width=v.shape[-1],
        sunk=isinstance(sinks, Tensor),
        **seen_from(mask),
        **common(q, k, v, mask, scale, tile, tile.block_n),
    )
    return dq, delta, parts


def dkv_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    parts: Tensor | None,
    dsinks: Tensor | None,
    scale: float,
    tile: AttentionTile,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, summed over the queries of a group in fp32 and rounded once.

    Writes:  dsinks [H], from their parts.
    """
    batch, positions, kv_heads = q.shape[0], q.shape[1], k.shape[2]
    # Compressed keys are few and their readers many: programs share the readers of a block, each with sums of its own.
    shares = 1 if mask.blocks is None else max(1, min(SHARERS, triton.cdiv(positions, tile.block_m)))
    share = triton.cdiv(triton.cdiv(positions, shares), tile.block_m) * tile.block_m
    dk, dv = (
        torch.empty(shares * batch, *x.shape[1:], dtype=x.dtype if shares == 1 else torch.float32, device=x.device)
        for x in (k, v)
    )
    (q_near, q_far), (near, far), (dk_near, dk_far) = (parted(x) for x in (q, k, dk))
    told = common(q, k, v, mask, scale, tile, tile.block_m)
    if far is not None and mask.window is not None:
        # with more channels, the registers of one loop
        told["split"] = False
    dkv_kernel[(*grid(k.shape[1], tile.block_n, batch * kv_heads), shares)](
        q=described(q_near, tile.block_m),
        q_far=q_far if q_far is None else described(q_far, tile.block_m),
        k=described(near, tile.block_n),
        k_far=far if far is None else described(far, tile.block_n),
        v=described(v, tile.block_n),
        do=described(do, tile.block_m),
        dk=described(dk_near, tile.block_n),
        dk_far=dk_far if dk_far is None else described(dk_far, tile.block_n),
        dv=described(dv, tile.block_n),
        lse=TensorDescriptor.from_tensor(lse, [1, tile.block_m]),
        delta=TensorDescriptor.from_tensor(delta, [1, tile.block_m]),
        sink_parts=parts,
        dsinks=dsinks,
        parts=0 if parts is None else parts.shape[1],
        sunk=parts is not None,
        end=ends(mask.start) if isinstance(mask.start, Tensor) else None,
        begins=None if mask.blocks is None else mask.blocks.begins,
        share=share,
        rows=batch * kv_heads,
        group=q.shape[2] // kv_heads,
        **told,
    )
    if shares == 1:
        return dk, dv
    joined = (each.unflatten(0, (shares, batch)).sum(0) for each in (dk, dv))
    dk, dv = (total.to(x.dtype) for total, x in zip(joined, (k, v), strict=True))
    return dk, dv


def by_row(q: Tensor) -> Tensor:
    """A number a query and head, [B·H T] f32; rows begin at multiples of 16 bytes, as descriptors read them."""
    batch, positions, heads, _ = q.shape
    return q.new_empty(batch * heads, -(-positions // 4) * 4, dtype=torch.float32)[:, :positions]


def packing(q: Tensor, k: Tensor, tile: AttentionTile) -> tuple[int, int]:
    """Queries and heads of a program that owns rows: the largest power of two that divides a group, so none is idle."""
    group = q.shape[2] // k.shape[2]
    pack = min(group & -group, tile.block_m)
    return tile.block_m // pack, pack


def parted(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first channels of x, as many as the largest power of two of them, and the others, if there are."""
    near = 1 << (x.shape[-1].bit_length() - 1)
    return x[..., :near], x[..., near:] if x.shape[-1] > near else None


def packed(x: Tensor, size: int, pack: int) -> TensorDescriptor:
    """Blocks of `size` positions of `pack` heads of x [B T H C], all channels rounded up to a power of two."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, size, pack, box(x.shape[-1])])


def grid(positions: int, size: int, rows: int) -> tuple[int]:
    """One program a block of `size` positions of each of `rows`."""
    return (triton.cdiv(positions, size) * rows,)


def seen_from(mask: Mask) -> dict[str, Any]:
    """What kernels that own queries are given of the mask."""
    return {
        "start": mask.start if isinstance(mask.start, Tensor) else None,
        "begins": None if mask.blocks is None else mask.blocks.begins,
    }


def common(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, tile: AttentionTile, step: int) -> dict[str, Any]:
    """What every kernel is given; `step` positions of the masked axis are a step of its loop."""
    near, far = parted(k)
    return {
        "positions": q.shape[1],
        "num_keys": k.shape[1],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "window": mask.window or 0,
        "block": 1 if mask.blocks is None else mask.blocks.size,
        "stride": 1 if mask.blocks is None else mask.blocks.stride,
        "scale": scale,
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "side_by_side": tile.heads,
        "near": box(near.shape[-1]),
        "far": 0 if far is None else box(far.shape[-1]),
        "value": box(v.shape[-1]),
        "compressed": mask.blocks is not None,
        "documents": isinstance(mask.start, Tensor),
        "windowed": mask.window is not None,
        "split": mask.window is None or mask.window > SHORT * step,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
