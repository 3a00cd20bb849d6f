"""Sparse latent attention and its indexer: `pure.model.attention.dsa.select` and `attend_dsa`, bitwise repeatable.

Letters: B sequences, T positions, H heads, R latent and P rotated channels of a key, X heads of the indexer of Y
channels, S slots: keys that a query reads.

No tensor has an element for each pair of positions, nor for each pair that is attended and head: scores of the indexer
are made for so many queries at a time as `PAIRS` holds, and so are weights, and probabilities and their gradients.
What pairs add to keys is summed by `lists`; parts and sums lie where gradients of later queries go, of which the last
are made when the sums are read.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import triton
from torch import Tensor

from nmoe.config.attention import DSA_MOST
from nmoe.effects.kernels.attention import dsa_index_kernels as index_kernels
from nmoe.effects.kernels.attention import dsa_kernels as kernels
from nmoe.effects.kernels.attention.blocks import box
from nmoe.effects.kernels.attention.lists import Parts, Sums
from nmoe.effects.kernels.derivative import first_order
from nmoe.effects.kernels.tables import SparseTile
from nmoe.errors import InputError
from nmoe.pure.model.attention.dsa import PAIRS


@attrs.frozen(kw_only=True)
class Tiles:
    """Tile sizes of each kernel."""

    score: SparseTile
    select: SparseTile
    weights: SparseTile
    output: SparseTile
    mean: SparseTile
    index_loss: SparseTile
    delta: SparseTile
    pairs: SparseTile
    dq: SparseTile
    parts: SparseTile
    gather: SparseTile
    index_gradient: SparseTile
    index_parts: SparseTile
    index_gather: SparseTile


def select(q: Tensor, k: Tensor, w: Tensor, start: Tensor | tuple[()] = (), *, count: int, tiles: Tiles) -> Tensor:
    """The `count` keys of the highest score of each query among those up to its own; of equal ones the lower.

    q, k, w  [B T X Y], [B T Y], [B T X]   as `project_index` makes them; no gradient
    start    [B T] i32 or ()   query i reads no key before start[i]; must not decrease along T. (): all keys up to i
    returns  [B T S] i32       indices in the row, ascending, -1 where there are fewer; S = min(count, T)
    Cost:    2·X·(Y + 1) FLOPs for each pair of query and visible key, of queries with more keys than `count`.
    """
    q, k, w = (tensor.detach().contiguous() for tensor in (q, k, w))
    batch, length, heads, channels = q.shape
    tile, slots = tiles.score, min(count, length)
    chosen = torch.empty(batch, length, slots, dtype=torch.int32, device=q.device)
    row_blocks = triton.cdiv(length, tile.block_m)
    blocks = batch * row_blocks
    at_once = min(blocks, max(1, PAIRS // (tile.block_m * length * 4)))
    scores = q.new_empty(at_once * tile.block_m, length, dtype=torch.float32)
    common: dict[str, Any] = {
        "start": start if isinstance(start, Tensor) else None,
        "scores": scores,
        "row_blocks": row_blocks,
        "positions": length,
        "count": count,
        "block_m": tile.block_m,
        "documents": isinstance(start, Tensor),
    }
    for first in range(0, blocks, at_once):
        number = min(at_once, blocks - first)
        index_kernels.score_kernel[(number * triton.cdiv(length, tile.block_n),)](
            q=q,
            k=k,
            w=w,
            first_block=first,
            heads=heads,
            block_n=tile.block_n,
            channels=channels,
            channels_box=box(channels),
            heads_box=box(heads),
            **common,
            **launch(tile),
        )
        index_kernels.select_kernel[(number * tile.block_m,)](
            chosen=chosen,
            first_block=first,
            slots=slots,
            block_n=tiles.select.block_n,
            **common,
            **launch(tiles.select),
        )
    return chosen


def dsa_attention(
    q: Tensor,
    kv: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    chosen: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    rank: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the chosen keys, and how far the indexer's softmax over them is from it.

    q        [B T H R+P]       in the latent's channels, then the rotated ones; bf16 or fp16
    kv       [B T R+P]         latents and rotated keys, shared by all heads; the value is the latent
    index_q, index_k, index_w  as `project_index` makes them
    chosen   [B T S] i32       as `select` makes it
    start    [B T] i32 or ()   first token of each token's document, which `chosen` holds to: not read
    scale    factor on the scores, positive
    rank     R
    returns  [B T H R], and the sum over queries of KL(mean of the heads' probabilities || the indexer's), 0-d, whose
             gradient goes to the indexer alone
    Raises:  InputError for formats and sizes that the kernels do not take.
    Cost:    forward 2·(3 R + 2 P), backward 2·(5 R + 3 P) FLOPs for each pair of query and key, times H; the indexer
             2·X·Y forward and 8·X·Y backward.
    """
    check(q, kv, scale=scale, rank=rank)
    o, target = DsaAttention.apply(q, kv, chosen, scale, rank, tiles)
    return o, IndexLoss.apply(index_q, index_k, index_w, chosen, target, tiles)


def check(q: Tensor, kv: Tensor, *, scale: float, rank: int) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:  InputError with each problem.
    """
    problems: list[str] = []
    most = DSA_MOST["kv_lora_rank"]
    if not 0 < rank <= most or kv.shape[-1] <= rank or q.shape[-1] != kv.shape[-1]:
        problems.append(
            f"dsa_attention: expected queries and keys of one width, of which up to {most} channels are the latent's, "
            f"got {q.shape[-1]}, {kv.shape[-1]} and {rank}; use the reference"
        )
    if q.dtype != kv.dtype or (q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)):
        problems.append(
            f"dsa_attention: expected q and kv both in bf16 or both in fp16, got {q.dtype} and {kv.dtype}; use the "
            "reference for other formats"
        )
    if not scale > 0:
        problems.append(f"dsa_attention: expected scale > 0, got {scale}; negate q instead")
    if problems:
        raise InputError(*problems)


class DsaAttention(torch.autograd.Function):
    """Output of the chosen keys, and the mean of the heads' probabilities; both passes take the queries in chunks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, chosen: Tensor, scale: float, rank: int, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        """Output [B T H R], and the mean of the heads' probabilities [B T S] f32, to which there is no gradient."""
        q, kv = q.contiguous(), kv.contiguous()
        o, lse, target = forward_pass(q, kv, chosen, scale, rank, tiles)
        ctx.save_for_backward(q, kv, chosen, o, lse)
        ctx.scale, ctx.rank, ctx.tiles = scale, rank, tiles
        ctx.mark_non_differentiable(target)
        ctx.set_materialize_grads(False)  # of `target` there is none
        return o, target

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q and kv."""
        q, kv, chosen, o, lse = ctx.saved_tensors
        return *backward_pass(q, kv, chosen, o, lse, gradients[0].contiguous(), ctx.scale, ctx.tiles), *[None] * 4


def forward_pass(
    q: Tensor, kv: Tensor, chosen: Tensor, scale: float, rank: int, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logarithms to base 2 of rows' sums of exponentials [B T H] f32, and mean of the heads' probabilities.

    Weights of a chunk of queries, their sum over keys, and their sum over heads.
    """
    batch, length, heads, width = q.shape
    slots, fp32 = chosen.shape[-1], torch.float32
    o, lse = q.new_empty(batch, length, heads, rank), q.new_empty(batch, length, heads, dtype=fp32)
    target = torch.empty(chosen.shape, dtype=fp32, device=q.device)
    cut, sum_cut, mean_cut = tiles.weights, tiles.output, tiles.mean
    block = cut.block_n
    blocks = triton.cdiv(slots, block)
    a_query = heads * (slots * q.element_size() + 2 * blocks * fp32.itemsize)
    size = min(batch * length, max(1, PAIRS // a_query))
    p, sums = q.new_empty(size, slots, heads), q.new_empty(2, size, blocks, heads, dtype=fp32)
    common: dict[str, Any] = {"p": p, "top": sums[0], "positions": length, "heads": heads, "slots": slots}
    read: dict[str, Any] = {"kv": kv, "chosen": chosen, "size": sums[1], "rank": rank, "rope": width - rank}
    for first, number in chunks(0, batch * length, size):
        across = blocks_of_heads(cut, heads)
        kernels.weights_kernel[(number, blocks, triton.cdiv(heads, across))](
            q=q,
            first_query=first,
            scale=scale,
            block_m=across,
            block_n=block,
            block_k=cut.block_k,
            **common,
            **read,
            **launch(cut),
        )
        across = blocks_of_heads(sum_cut, heads)
        kernels.output_kernel[(number, triton.cdiv(heads, across), triton.cdiv(rank, sum_cut.block_k))](
            o=o,
            lse=lse,
            first_query=first,
            blocks=blocks,
            block=block,
            block_m=across,
            block_n=min(sum_cut.block_n, block),
            block_k=sum_cut.block_k,
            **common,
            **read,
            **launch(sum_cut),
        )
        slots_of_mean = min(mean_cut.block_n, block)
        kernels.mean_kernel[(number, triton.cdiv(slots, slots_of_mean))](
            lse=lse,
            target=target,
            first_query=first,
            blocks=blocks,
            block=block,
            block_m=blocks_of_heads(mean_cut, heads),
            block_n=slots_of_mean,
            **common,
            **launch(mean_cut),
        )
    return o, lse, target


def backward_pass(
    q: Tensor, kv: Tensor, chosen: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv: pairs of a chunk of queries, their sum over keys, and their sum over queries."""
    batch, length, heads, width = q.shape
    rank, slots = o.shape[-1], chosen.shape[-1]
    delta = torch.empty_like(lse)
    rows = lse.numel()
    kernels.delta_kernel[(triton.cdiv(rows, tiles.delta.block_m),)](
        o=o,
        do=do,
        delta=delta,
        rows=rows,
        block_m=tiles.delta.block_m,
        rank=rank,
        rank_box=box(rank),
        **launch(tiles.delta),
    )
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    sums = Sums.of(kv, chosen, borrowed=dq, tile=tiles.gather)
    common: dict[str, Any] = {"positions": length, "heads": heads, "slots": slots, "rank": rank, "rope": width - rank}

    def pairs(p: Tensor, ds: Tensor, first: int, number: int) -> None:
        """Writes:  p, ds, of a chunk."""
        cut, across = tiles.pairs, blocks_of_heads(tiles.pairs, heads)
        kernels.pairs_kernel[(number, triton.cdiv(slots, cut.block_n), triton.cdiv(heads, across))](
            q=q,
            kv=kv,
            do=do,
            chosen=chosen,
            lse=lse,
            delta=delta,
            p=p,
            ds=ds,
            first_query=first,
            scale=scale,
            block_m=across,
            block_n=cut.block_n,
            block_k=cut.block_k,
            **common,
            **launch(cut),
        )

    def sum_over_keys(ds: Tensor, first: int, number: int) -> None:
        """Writes:  dq, of a chunk."""
        cut, across = tiles.dq, blocks_of_heads(tiles.dq, heads)
        kernels.dq_kernel[(number, triton.cdiv(heads, across), triton.cdiv(width, cut.block_k + cut.block_k // 2))](
            kv=kv,
            chosen=chosen,
            ds=ds,
            dq=dq,
            first_query=first,
            block_m=across,
            block_n=cut.block_n,
            block_k=cut.block_k,
            **common,
            **launch(cut),
        )

    def write_parts(p: Tensor, ds: Tensor, parts: Parts, first: int, number: int, behind: int) -> None:
        """Writes:  parts, of queries that are so many `behind` the first of their chunk."""
        cut = tiles.parts
        kernels.parts_kernel[(number, triton.cdiv(slots, cut.block_n))](
            q=q,
            do=do,
            chosen=chosen,
            p=p,
            ds=ds,
            **parts.places(behind),
            first_query=first,
            block_m=blocks_of_heads(cut, heads),
            block_n=cut.block_n,
            block_k=cut.block_k,
            **common,
            **launch(cut),
        )

    a_query = 2 * slots * heads * q.element_size()
    for b in range(batch):
        sums.total.zero_()
        for first, number, parts in sums.chunks(b, beside=a_query):
            size = min(number, max(1, PAIRS // a_query)) if parts.lent else number
            p, ds = q.new_empty(2, size, slots, heads)
            for begin, some in chunks(first, first + number, size):
                pairs(p, ds, begin, some)
                if begin < sums.kept:
                    sum_over_keys(ds, begin, min(some, sums.kept - begin))
                write_parts(p, ds, parts, begin, some, begin - first)
            del p, ds  # before the next ones
            sums.add_(parts)
            del parts
        dkv[b] = sums.total
    size = min(length, max(1, PAIRS // a_query))
    p, ds = q.new_empty(2, size, slots, heads)
    for first, number in chunks(sums.kept, batch * length, size):
        pairs(p, ds, first, number)
        sum_over_keys(ds, first, number)
    return dq, dkv


def chunks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """First query and number of each chunk."""
    return [(first, min(size, end - first)) for first in range(begin, end, size)]


class IndexLoss(torch.autograd.Function):
    """KL(mean of the heads' probabilities || the indexer's softmax), summed over queries."""

    @staticmethod
    def forward(
        ctx: Any,
        index_q: Tensor,
        index_k: Tensor,
        index_w: Tensor,
        chosen: Tensor,
        target: Tensor,
        tiles: Tiles,
    ) -> Tensor:
        """The sum; what is kept of the attention is the mean of its heads, a number a query and slot."""
        q, k, w = (each.contiguous() for each in (index_q, index_k, index_w))
        batch, length, heads, _ = q.shape
        top, loss = (q.new_empty(batch, length, dtype=torch.float32) for _ in range(2))  # one is kept
        cut = tiles.index_loss
        index_kernels.index_loss_kernel[(batch * length,)](
            loss=loss, heads=heads, target=target, block_n=cut.block_n, **indexed(q, k, w, chosen, top), **launch(cut)
        )
        ctx.save_for_backward(q, k, w, chosen, target, top)
        ctx.tiles = tiles
        return loss.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the indexer's queries, keys and weights."""
        q, k, w, chosen, target, top = ctx.saved_tensors
        tiles, (batch, length, heads, _), slots = ctx.tiles, q.shape, chosen.shape[-1]
        given = {"heads": heads, "target": target, "dy": gradients[0].float(), **indexed(q, k, w, chosen, top)}
        dq, dk, dw = (torch.empty_like(each) for each in (q, k, w))
        sums, cut = Sums.of(k, chosen, borrowed=dq, tile=tiles.index_gather), tiles.index_parts
        for b in range(batch):
            sums.total.zero_()
            for first, number, parts in sums.chunks(b, beside=0):
                index_kernels.index_parts_kernel[(number, triton.cdiv(slots, cut.block_n))](
                    **parts.places(0), first_query=first, block_n=cut.block_n, **given, **launch(cut)
                )
                sums.add_(parts)
            dk[b] = sums.total
        cut = tiles.index_gradient  # the last: the sums were where its gradient goes
        index_kernels.index_gradient_kernel[(batch * length,)](
            dq=dq, dw=dw, block_n=cut.block_n, **given, **launch(cut)
        )
        return dq, dk, dw, *[None] * 3


def indexed(q: Tensor, k: Tensor, w: Tensor, chosen: Tensor, top: Tensor) -> dict[str, Any]:
    """What every kernel of the indexer's loss is given."""
    return {
        "q": q,
        "k": k,
        "w": w,
        "chosen": chosen,
        "top": top,
        "positions": q.shape[1],
        "slots": chosen.shape[-1],
        "channels": q.shape[-1],
        "channels_box": box(q.shape[-1]),
        "heads_box": box(q.shape[2]),
    }


def blocks_of_heads(tile: SparseTile, heads: int) -> int:
    """Heads that a program takes at once: no more than there are, rounded up to what the tensor cores take."""
    return min(tile.block_m, box(heads))


def launch(tile: SparseTile) -> dict[str, int]:
    """Options of a launch."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
