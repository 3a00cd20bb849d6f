"""The dense stage of sparse latent attention, `pure.model.attention.dsa.attend_dense`, bitwise repeatable.

Letters: B sequences, T positions, H heads, C channels of a query, P of them rotated, Z = C - P + U channels of `kv`,
U channels of a value, X heads of the indexer of Y channels.

Attention is that of `mla`. The indexer's loss is made from its log-sums, for so many queries at a time as `WORKSPACE`
holds scores of the indexer, a number a pair of positions whatever the heads; gradients are made with it, so that the
heads' probabilities are computed once again and not twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import triton
from torch import Tensor

from nmoe.effects.kernels.attention import dsa_dense_kernels as kernels
from nmoe.effects.kernels.attention import mla
from nmoe.effects.kernels.attention.blocks import box, described, readable
from nmoe.effects.kernels.attention.dsa import launch
from nmoe.effects.kernels.attention.dsa_index_kernels import score_kernel
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import SparseTile
from nmoe.pure.model.attention.blocks import WORKSPACE


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of each kernel of the loss; all take as many queries at once as `score`, a power of two."""

    score: SparseTile
    sums: SparseTile
    target: SparseTile
    query: SparseTile
    key: SparseTile


def dense_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    tiles: Tiles,
    attention: mla.Tiles,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to all keys, and how far the indexer's softmax over them is from it.

    q, kv, k_rope, start, scale  as `mla_attention` takes them
    index_q, index_k, index_w    [B T X Y], [B T Y], [B T X]   as `project_index` makes them
    returns  [B T H U], and the sum over queries of KL(mean of the heads' probabilities || the indexer's), 0-d, whose
             gradient goes to the indexer alone
    Raises:  InputError for formats and sizes that `mla_attention` does not take.
    Cost:    of the loss, for each pair of query and visible key: 2·H·C + 2·X·(Y + 1) FLOPs, and 8·X·Y for gradients,
             which are made forward where any is required.
    """
    forward = "triton" if isinstance(start, Tensor) else "cudnn"
    o, lse = mla.mla_attention_sums(q, kv, k_rope, start, scale=scale, tiles=attention, forward=forward)
    operands = (index_q, index_k, index_w)
    graded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    given = (tensor.detach() for tensor in (q, kv, k_rope, lse))
    return o, DenseIndexLoss.apply(*operands, *given, start, scale, graded, tiles)


class DenseIndexLoss(torch.autograd.Function):
    """KL(mean of the heads' probabilities || the indexer's softmax) over all visible keys, summed over queries."""

    @staticmethod
    def forward(
        ctx: Any,
        index_q: Tensor,
        index_k: Tensor,
        index_w: Tensor,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        lse: Tensor,
        start: Tensor | tuple[()],
        scale: float,
        graded: bool,
        tiles: Tiles,
    ) -> Tensor:
        """The sum; what is kept are its gradients."""
        index = [tensor.contiguous() for tensor in (index_q, index_k, index_w)]
        attended = [*(readable(x) for x in (q, kv, k_rope)), lse.contiguous()]
        loss, gradients = loss_and_gradients(index, attended, start, scale, graded, tiles)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the indexer's queries, keys and weights."""
        # One dimension, so that the product is in fp32 and rounded once.
        by = gradients[0].float().reshape(1)
        return *(torch.mul(gradient, by, out=torch.empty_like(gradient)) for gradient in ctx.saved_tensors), *[None] * 8


def loss_and_gradients(
    index: Sequence[Tensor],
    attended: Sequence[Tensor],
    start: Tensor | tuple[()],
    scale: float,
    graded: bool,
    tiles: Tiles,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, 0-d f32, and if `graded` its gradients towards the indexer's queries, keys and weights, `index`.

    A chunk of blocks of queries lies in one sequence. Gradients of keys are sums over chunks, in fp32 of one sequence
    at a time.

    attended  q, kv, k_rope, and log-sums [B H T] of the attention, as `mla_attention_sums` has them
    """
    (index_q, index_k, index_w), (q, kv, k_rope, lse) = index, attended
    batch, length, heads, channels = index_q.shape
    size, across = tiles.score.block_m, tiles.target.block_n
    row_blocks = triton.cdiv(length, size)
    at_once = min(row_blocks, max(1, WORKSPACE // (size * length * 4)))
    scores = index_q.new_empty(at_once * size, length, dtype=torch.float32)
    top = scores.new_empty(at_once * size)
    parts = scores.new_empty(at_once * size * triton.cdiv(length, across))
    loss = scores.new_zeros(())
    dq, dk, dw = (torch.empty_like(tensor) for tensor in (index_q, index_k, index_w)) if graded else [None] * 3
    total = scores.new_empty(length, channels) if graded else None
    documents = isinstance(start, Tensor)
    common: dict[str, Any] = {"start": start if documents else None, "row_blocks": row_blocks, "positions": length}
    common |= {"block_m": size, "documents": documents}
    indexed: dict[str, Any] = {"q": index_q, "k": index_k, "w": index_w, "heads": heads, "channels": channels}
    indexed["channels_box"] = box(channels)
    nope, rope = q.shape[-1] - k_rope.shape[-1], k_rope.shape[-1]
    heads_of_keys: dict[str, Any] = {
        "q": described(q[..., :nope], size),
        "q_rope": described(q[..., nope:], size),
        "k": described(kv[..., :nope], across),
        "k_rope": described(k_rope[:, :, None], across),
        "nope": box(nope),
        "rope": box(rope),
        "heads": q.shape[2],
    }
    for first in (b * row_blocks + block for b in range(batch) for block in range(0, row_blocks, at_once)):
        begin = first % row_blocks
        number = min(at_once, row_blocks - begin)
        until = min((begin + number) * size, length)  # no query of the chunk sees a later key
        common["first_block"] = first
        score_kernel[(number * triton.cdiv(length, tiles.score.block_n),)](
            scores=scores,
            count=0,
            heads_box=box(heads),
            block_n=tiles.score.block_n,
            **indexed,
            **common,
            **launch(tiles.score),
        )
        kernels.sums_kernel[(number * size,)](
            scores=scores, top=top, block_n=tiles.sums.block_n, **common, **launch(tiles.sums)
        )
        key_blocks = triton.cdiv(until, across)
        kernels.target_kernel[(number * key_blocks,)](
            lse=lse,
            top=top,
            scores=scores,
            parts=parts,
            key_blocks=key_blocks,
            scale=scale,
            block_n=across,
            **heads_of_keys,
            **common,
            **launch(tiles.target),
        )
        loss += parts[: number * size * key_blocks].sum()
        if dk is None or total is None:
            continue
        kernels.query_kernel[(number * heads,)](
            slopes=scores, dq=dq, dw=dw, block_n=tiles.query.block_n, **indexed, **common, **launch(tiles.query)
        )
        if begin == 0:
            total.zero_()
        kernels.key_kernel[(triton.cdiv(until, tiles.key.block_n),)](
            slopes=scores,
            total=total,
            number=number,
            block_n=tiles.key.block_n,
            **indexed,
            **common,
            **launch(tiles.key),
        )
        if begin + number == row_blocks:
            dk[first // row_blocks] = total
    return loss, tuple(gradient for gradient in (dq, dk, dw) if gradient is not None)
