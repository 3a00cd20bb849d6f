"""Causal flash attention for MLA: `pure.model.attention.mla.attend_mla`, with a bitwise repeatable backward pass.

Letters: B sequences, T positions, H heads, C channels of a query, P of them rotated, Z = C - P + U channels of `kv`,
U channels of a value.

The forward pass is cuDNN's or our own; the backward pass is two kernels of our own, one that owns queries and one that
owns keys, so that every sum has one owner and one order; on Hopper they are those of `attention.hopper`. Keys are never
assembled for our kernels: a head's own channels and the shared rotated ones are multiplied apart. Channels are read
through descriptors, which fill with zeros what a block has beyond a sequence's or a head's end.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.effects.kernels.attention import hopper, mla_assemble
from nmoe.effects.kernels.attention.blocks import box, described, ends, readable
from nmoe.effects.kernels.attention.hopper import mla_dkv
from nmoe.effects.kernels.attention.mla_kernels import dkv_kernel, dq_kernel, forward_kernel
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import AttentionTile
from nmoe.errors import InputError


@attrs.frozen(kw_only=True)
class Tiles:
    """How the three kernels are cut up: forward, gradient of queries, gradient of keys and values."""

    forward: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile
    hopper: bool = False  # whether there are the kernels of `attention.hopper`: sm_90

    def specialized(self, q: Tensor, kv: Tensor, k_rope: Tensor) -> bool:
        """Whether the backward pass is that of `attention.hopper`: bf16, its heads' sizes, lengths of whole blocks."""
        nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
        fits = (nope, rope, kv.shape[-1] - nope) == hopper.SIZES and q.shape[1] % hopper.BLOCK == 0
        return self.hopper and fits and q.dtype == torch.bfloat16


def mla_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    tiles: Tiles,
    forward: Literal["cudnn", "triton"] = "triton",
) -> Tensor:
    """Causal softmax attention; a head's key is its own part of `kv` beside the shared `k_rope`.

    q        [B T H C]       the last P channels are rotated; bf16 or fp16
    kv       [B T H Z]       C - P channels of key, then U of value
    k_rope   [B T P]         rotated key, shared by all heads
    start    [B T] i32 | ()  query i sees keys start[i]..i; must not decrease along T. (): all keys up to i
    scale    factor on the scores, positive
    tiles    block sizes of each pass
    forward  forward pass: cuDNN's is faster (5.82 against 6.26 ms with backward, docs/log.md, 2026-11-24) but takes no
             `start`; a single position is always ours
    returns  [B T H U]
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    forward 2·(C + U), backward 2·(4·C + 3·U) FLOPs for each pair of query and visible key, times H.
    """
    return mla_attention_sums(q, kv, k_rope, start, scale=scale, tiles=tiles, forward=forward)[0]


def mla_attention_sums(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    tiles: Tiles,
    forward: Literal["cudnn", "triton"],
) -> tuple[Tensor, Tensor]:
    """`mla_attention`, and the natural logarithms [B H T] f32 of the sums of exponentials, without a gradient."""
    check(q, kv, k_rope, start, scale=scale, forward=forward)
    return MlaAttention.apply(q, kv, k_rope, start, scale, forward, tiles)


def mla_attention_cudnn(
    q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float
) -> Tensor:
    """`mla_attention` with cuDNN's own backward pass; the last bits of its gradient of `q` differ from run to run."""
    check(q, kv, k_rope, start, scale=scale, forward="cudnn")
    return MlaAttentionCudnn.apply(q, kv, k_rope, scale)


def check(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], *, scale: float, forward: str) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:  InputError with each problem.
    """
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    sizes = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": kv.shape[-1] - nope}
    step = 16 // q.element_size()
    problems = [
        f"model.attention.{key}: expected a multiple of {step} up to 256 for the attention kernels, got {size}; "
        f"write {min(256, max(step, -(-size // step) * step))}"
        for key, size in sizes.items()
        if size < step or size % step or size > 256
    ]
    if len({q.dtype, kv.dtype, k_rope.dtype}) > 1 or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"mla_attention: expected q, kv and k_rope all in bf16 or all in fp16, "
            f"got {q.dtype}, {kv.dtype}, {k_rope.dtype}; use the reference for other formats"
        )
    if not scale > 0:
        problems.append(f"mla_attention: expected scale > 0, got {scale}; negate q instead")
    if forward == "cudnn" and isinstance(start, Tensor):
        problems.append(
            "mla_attention: expected no start for cuDNN's forward, which sees whole sequences, got start; "
            "pass forward='triton'"
        )
    if problems:
        raise InputError(*problems)


class MlaAttention(torch.autograd.Function):
    """cuDNN's or our forward pass with our backward pass."""

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
    ) -> tuple[Tensor, Tensor]:
        """Output, and the logarithm of each row's sum of exponentials, which is kept for backward."""
        q, kv, k_rope = (readable(x) for x in (q, kv, k_rope))
        if forward == "cudnn" and q.shape[1] > 1:
            o, lse = cudnn_forward(q, kv, k_rope, scale)
        else:
            o, lse = triton_forward(q, kv, k_rope, start, scale, tiles.forward)
        ctx.save_for_backward(q, kv, k_rope, o, lse, *((start,) if isinstance(start, Tensor) else ()))
        ctx.scale, ctx.tiles = scale, tiles
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # of `lse` there is none
        return o, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, kv and k_rope."""
        q, kv, k_rope, o, lse, *start = ctx.saved_tensors
        given = (*start, ())[0]
        do = readable(gradients[0])
        dq, top, delta = dq_pass(q, kv, k_rope, given, o, lse, do, ctx.scale, ctx.tiles)
        return dq, *dkv_pass(q, kv, k_rope, given, top, delta, do, ctx.scale, ctx.tiles), None, None, None, None


class MlaAttentionCudnn(torch.autograd.Function):
    """cuDNN both ways; whole keys are made again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> Tensor:
        """Output."""
        o, lse, *_, seed, offset, _ = cudnn(q, kv, k_rope, scale)
        ctx.save_for_backward(q, kv, k_rope, o, lse, seed, offset)
        ctx.scale = scale
        return o.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, kv and k_rope."""
        q, kv, k_rope, o, lse, seed, offset = ctx.saved_tensors
        nope, length = q.shape[-1] - k_rope.shape[-1], q.shape[1]
        k = mla_assemble.keys(kv, k_rope, nope)
        given = [tensor.transpose(1, 2) for tensor in (gradients[0], q, k, kv[..., nope:])]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *given, o, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=ctx.scale
        )
        dkv, dk_rope = mla_assemble.gradients(dk.transpose(1, 2), dv.transpose(1, 2), k_rope.shape[-1])
        return dq.transpose(1, 2), dkv, dk_rope, None


def cudnn(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> tuple[Any, ...]:
    """What torch's operator for cuDNN returns: the output [B H T U], the log-sums, and what its backward wants."""
    nope = q.shape[-1] - k_rope.shape[-1]
    k = mla_assemble.keys(kv, k_rope, nope)
    operands = (tensor.transpose(1, 2) for tensor in (q, k, kv[..., nope:]))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*operands, None, True, 0.0, True, False, scale=scale)


def cudnn_forward(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's output [B T H U], and natural logarithms [B H T] of the sums of exponentials, in fp32."""
    o, lse, *_ = cudnn(q, kv, k_rope, scale)
    return o.transpose(1, 2), lse.squeeze(-1)


def triton_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], scale: float, tile: AttentionTile
) -> tuple[Tensor, Tensor]:
    """Our output [B T H U], and natural logarithms [B H T] of the sums of exponentials, in fp32."""
    batch, positions, heads, _ = q.shape
    nope = q.shape[-1] - k_rope.shape[-1]
    o = q.new_empty(batch, positions, heads, kv.shape[-1] - nope)
    lse = q.new_empty(batch, heads, positions, dtype=torch.float32)
    forward_kernel[grid(q, tile.block_m)](
        **operands(q, kv, k_rope, tile),
        o=described(o, tile.block_m),
        lse=lse,
        start=start if isinstance(start, Tensor) else None,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return o, lse


def dq_pass(
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
    """Gradient of q, and what `dkv_pass` needs of each query.

    returns  dq [B T H C]; top and delta, both [B·H T] f32: the logarithm to base 2 of a row's sum of exponentials, and
             what softmax takes off each of its rows' gradients
    """
    batch, positions, heads, _ = q.shape
    nope, tile = q.shape[-1] - k_rope.shape[-1], tiles.dq
    # Descriptors read rows that begin at multiples of 16 bytes.
    top, delta = lse.new_empty(2, batch * heads, -(-positions // 4) * 4)[..., :positions]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dq_kernel[grid(q, tile.block_m)](
        **operands(q, kv, k_rope, tile),
        o=described(o, tile.block_m),
        do=described(do, tile.block_m),
        dq=described(dq[..., :nope], tile.block_m),
        dq_rope=described(dq[..., nope:], tile.block_m),
        lse=lse.contiguous(),  # cuDNN lays it out [B T H] when it packs sequences
        top=top,
        delta=delta,
        padded=top.stride(0),
        start=start if isinstance(start, Tensor) else None,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dq, top, delta


def dkv_pass(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: Tensor | tuple[()],
    top: Tensor,
    delta: Tensor,
    do: Tensor,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Gradients of kv and k_rope; the latter is summed over heads in fp32 from one rounded part a head."""
    end = ends(start) if isinstance(start, Tensor) else None
    if tiles.specialized(q, kv, k_rope):
        dkv, parts = mla_dkv.gradients(q, kv, k_rope, end, top, delta, do, scale)
        return dkv, parts.sum(1)
    batch, positions, heads, _ = q.shape
    tile = tiles.dkv
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    parts = q.new_empty(batch, heads, positions, rope)
    dkv_kernel[grid(q, tile.block_n)](
        **operands(q, kv, k_rope, tile),
        do=described(do, tile.block_m),
        dk=described(dkv[..., :nope], tile.block_n),
        dk_rope=described(parts.transpose(1, 2), tile.block_n),
        dv=described(dkv[..., nope:], tile.block_n),
        top=TensorDescriptor.from_tensor(top, [1, tile.block_m]),
        delta=TensorDescriptor.from_tensor(delta, [1, tile.block_m]),
        end=end,
        **numbers(q, scale),
        **constants(q, kv, k_rope, start, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dkv, parts.sum(1)


def operands(q: Tensor, kv: Tensor, k_rope: Tensor, tile: AttentionTile) -> dict[str, TensorDescriptor]:
    """What every kernel reads."""
    nope = q.shape[-1] - k_rope.shape[-1]
    return {
        "q": described(q[..., :nope], tile.block_m),
        "q_rope": described(q[..., nope:], tile.block_m),
        "k": described(kv[..., :nope], tile.block_n),
        "k_rope": described(k_rope[:, :, None], tile.block_n),
        "v": described(kv[..., nope:], tile.block_n),
    }


def numbers(q: Tensor, scale: float) -> dict[str, Any]:
    """Sizes and the scale."""
    return {"positions": q.shape[1], "heads": q.shape[2], "rows": q.shape[0] * q.shape[2], "scale": scale}


def constants(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()], tile: AttentionTile) -> dict[str, Any]:
    """What a kernel is compiled for."""
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    return {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "heads_per_group": tile.heads,
        "nope": box(nope),
        "rope": box(rope),
        "value": box(kv.shape[-1] - nope),
        "documents": isinstance(start, Tensor),
    }


def grid(q: Tensor, size: int) -> tuple[int]:
    """One program a block of positions of each head of each sequence."""
    return (triton.cdiv(q.shape[1], size) * q.shape[0] * q.shape[2],)
