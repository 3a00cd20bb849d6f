"""Native sparse attention: a query reads summaries of all blocks, the tokens of the best blocks, and a window.

B sequences · T tokens · D width · H query heads · K heads of keys and values · G = H / K query heads a group
C channels a head of queries and keys · U of values · N tokens a compressed block · M compressed blocks of a row
S selected blocks of a query · m, s, t the compressed blocks, selected tokens and queries of one block of queries
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, residual, zeros
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.attention.blocks import again, best, gathered, query_blocks, softmax
from nmoe.pure.model.attention.cached import New, visible_last
from nmoe.pure.model.attention.gqa import KvCache, attend_cached, attend_gqa
from nmoe.pure.model.attention.nsa_cost import QUERIES, num_blocks, num_pooled
from nmoe.pure.model.rope import Documents, Rope, rotate, table


@record
class KeyPool:
    """Makes one key of a block's N: an embedding of the place in the block is added, then a perceptron."""

    position: Tensor = param("N C", Role.GAIN, zeros)
    up: Tensor = param("(N C) C", Role.POOL, normal("N", "C"))
    down: Tensor = param("C C", Role.POOL, normal("C"))


@record
class ValuePool:
    """The same of values."""

    position: Tensor = param("N U", Role.GAIN, zeros)
    up: Tensor = param("(N U) U", Role.POOL, normal("N", "U"))
    down: Tensor = param("U U", Role.POOL, normal("U"))


@record
class Nsa:
    """Attention of one block. Keys and values are made three times, one a branch: compressed, selected, window."""

    q: Tensor = param("D (H C)", Role.MATRIX, normal("D"))
    k: Tensor = param("D 3 (K C)", Role.MATRIX, normal("D"))
    v: Tensor = param("D 3 (K U)", Role.MATRIX, normal("D"))
    gate: Tensor = param("D 3 H", Role.MATRIX, normal("D"))
    key_pool: KeyPool
    value_pool: ValuePool
    out: Tensor = param("(H U) D", Role.MATRIX, residual("H", "U"))


def specs(c: sections.Nsa) -> Nsa:
    """Specs of one block's attention."""
    return spec_tree(Nsa, key_pool=spec_tree(KeyPool), value_pool=spec_tree(ValuePool))


def dims(c: sections.Nsa) -> dict[str, int]:
    """Sizes of the axes that only attention has: H, K, C, U and N."""
    return {"H": c.num_heads, "K": c.num_kv_heads, "C": c.head_dim, "U": c.v_head_dim, "N": c.compressed_block}


@record
class NsaOps:
    """What a device implements of native sparse attention; a field has the signature of its reference."""

    compressed: Callable[..., tuple[Tensor, Tensor]]
    selected: Callable[..., Tensor]
    window: Callable[..., Tensor]


def nsa(
    p: Nsa,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: NsaOps,
    c: sections.Nsa,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> Tensor:
    """Native sparse attention of each sequence, or each of its documents, over itself.

    A compressed key has the position of its block's first token; blocks are counted from a document's first token, so
    that a packed document reads as if alone.

    x          [B T D]   normed block input
    documents  which positions each token may see; (): rows are whole
    returns    [B T D]
    Source:    NSA (arXiv:2502.11089) eq. 5-12.
    """
    start, position = (documents.start, documents.position) if isinstance(documents, Documents) else ((), ())
    q, k_pooled, k_selected, k_window, v = _inputs(p, x, rope, position)
    v_pooled, v_selected, v_window = v.unbind(2)

    first = first_tokens(x.shape[1], start, block=c.compressed_block, stride=c.compressed_stride, device=x.device)
    at = first.clamp(max=x.shape[1] - 1)
    placed = position.gather(1, at) if isinstance(position, Tensor) else at.expand(x.shape[0], -1)
    k_pooled = rotate(pool(p.key_pool, k_pooled, at), rope, placed)
    v_pooled = pool(p.value_pool, v_pooled, at)

    scale = c.head_dim**-0.5
    compressed, chosen = ops.compressed(
        q,
        k_pooled,
        v_pooled,
        first,
        start,
        scale=scale,
        block=c.compressed_block,
        stride=c.compressed_stride,
        selected_block=c.selected_block,
        num_selected=c.num_selected,
    )
    selected = ops.selected(q, k_selected, v_selected, chosen, start, scale=scale, block=c.selected_block)
    window = ops.window(q, k_window, v_window, (), start, scale=scale, window=c.window)
    return _joined(p, x, compressed, selected, window)


def _inputs(
    p: Nsa, x: Tensor, rope: Rope, position: Tensor | tuple[()]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries [B T H C], keys [B T K C] of each branch, the compressed one's unrotated, and values [B T 3 K U]."""
    q = rotate((x @ p.q.flatten(1)).unflatten(-1, p.q.shape[1:]), rope, position)
    k, v = ((x @ tensor.flatten(1)).unflatten(-1, tensor.shape[1:]) for tensor in (p.k, p.v))
    k_pooled, k_rotated = k.split((1, 2), dim=2)
    k_selected, k_window = rotate(k_rotated, rope, position).unbind(2)
    return q, k_pooled[:, :, 0], k_selected, k_window, v


def _joined(p: Nsa, x: Tensor, *branches: Tensor) -> Tensor:
    """The gated sum of the branches [B T H U], projected: [B T D]."""
    gate = (x @ p.gate.flatten(1)).sigmoid().unflatten(-1, (3, branches[0].shape[2], 1))
    o = gate[:, :, 0] * branches[0] + gate[:, :, 1] * branches[1] + gate[:, :, 2] * branches[2]
    return o.flatten(-2) @ p.out.flatten(0, 1)


@record
class NsaCache:
    """What later tokens read of earlier ones."""

    pooled: KvCache  # keys and values of the compressed blocks at their places, [B M K C] and [B M K U]
    recent: KvCache  # of the last block + stride tokens, of which blocks are made yet, keys unrotated
    selected: KvCache  # of all tokens at their places
    window: KvCache  # of the last window - 1


def empty_cache(c: sections.Nsa, num_sequences: int, num_tokens: int, like: Tensor) -> NsaCache:
    """The cache before the first token, in the format of `like`."""
    block, stride = c.compressed_block, c.compressed_stride
    # the places that `extend` makes blocks for reach beyond the last one
    rows = (num_tokens // stride + 2, block + stride, num_tokens, min(c.window - 1, num_tokens))

    def zeros(count: int) -> KvCache:
        shape = (num_sequences, count, c.num_kv_heads)
        return KvCache(like.new_zeros(*shape, c.head_dim), like.new_zeros(*shape, c.v_head_dim))

    return NsaCache(*map(zeros, rows))


def extend(
    p: Nsa,
    x: Tensor,
    cache: NsaCache,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: NsaOps,
    c: sections.Nsa,
    *,
    eps: float,
) -> tuple[Tensor, NsaCache]:
    """`nsa` of new tokens that also see those in the cache.

    A place of a compressed block is made again by the tokens that follow until all of its block's tokens are there.

    x        [B T D]   normed block input of the new tokens
    returns  [B T D], and the cache with the new tokens
    """
    documents, before, reach, size = new.documents, new.place[0], new.reach(), x.shape[1]
    block, stride, scale = c.compressed_block, c.compressed_stride, c.head_dim**-0.5
    q, k_pooled, k_selected, k_window, v = _inputs(p, x, rope, documents.position)
    recent = cache.recent.joined(k_pooled, v[:, :, 0])
    selected = cache.selected.with_rows(k_selected, v[:, :, 1], new.place, new)
    window = cache.window.joined(k_window, v[:, :, 2])

    # a row has one document, behind padding of which each token is its own
    start = torch.minimum(torch.arange(reach, device=x.device), documents.start[:, -1:])
    first = first_tokens(reach, start, block=block, stride=stride, device=x.device)
    # blocks that new tokens may complete: a block begins up to stride - 1 tokens after its place
    fresh = (before - block).div(stride, rounding_mode="floor").clamp(min=0) + torch.arange(
        num_blocks(size, stride) + 1, device=x.device
    )
    at = F.pad(first, (0, len(fresh) + 1), value=reach)[:, fresh].clamp(max=reach - 1)
    placed, within = at - start.gather(1, at), at - before + (recent.k.shape[1] - size)
    pooled = cache.pooled.with_rows(
        rotate(pool(p.key_pool, recent.k, within), rope, placed), pool(p.value_pool, recent.v, within), fresh, new
    )
    read, seen = pooled.first(first.shape[1]), selected.first(reach)
    compressed, chosen = attend_compressed(
        *(q, read.k, read.v, first, documents.start),
        scale=scale,
        block=block,
        stride=stride,
        selected_block=c.selected_block,
        num_selected=c.num_selected,
        before=before,
        reach=reach,
    )
    branches = (
        compressed,
        attend_selected(
            *(q, seen.k, seen.v, chosen, documents.start),
            scale=scale,
            block=c.selected_block,
            before=before,
            reach=reach,
        ),
        attend_cached(q, window.k, window.v, (), visible_last(documents, window.k.shape[1], c.window), scale=scale),
    )
    kept = NsaCache(pooled, recent.without(size), selected, window.without(size))
    return _joined(p, x, *branches), kept


def first_tokens(length: int, start: Tensor | tuple[()], *, block: int, stride: int, device: torch.device) -> Tensor:
    """The first token of each compressed block, or `length` where there is none.

    The blocks of a document begin at every `stride`-th of its tokens and lie in it whole, so that at most one begins
    among the tokens m·stride .. (m + 1)·stride - 1 of a row: its place is m, and those of a document are neighbours.

    start    [B T] i32 or ()   index in the row of each token's document; (): rows are whole
    returns  [B M] i64, or [1 M] for whole rows
    """
    count = num_pooled(length, block, stride)
    token = torch.arange(count * stride, device=device)  # below `length`, because a stride is no longer than a block
    if not isinstance(start, Tensor):
        return token[None, ::stride]
    last = (token + block - 1).clamp(max=length - 1)
    begins = (token + block <= length) & ((token - start[:, token]) % stride == 0) & (start[:, last] == start[:, token])
    return torch.where(begins, token, length).unflatten(1, (count, stride)).amin(2)


def pool(p: KeyPool | ValuePool, x: Tensor, first: Tensor) -> Tensor:
    """Keys or values of blocks, each from its N tokens.

    x        [B T K C]
    first    [B M] or [1 M] i64   first token of each block, within the row
    returns  [B M K C]
    """
    length = p.position.shape[0]
    at = (first[..., None] + torch.arange(length, device=x.device)).clamp(max=x.shape[1] - 1)
    tokens = gathered(x.transpose(1, 2), at[:, None]) + p.position.to(x.dtype)
    return (F.silu(tokens.flatten(-2) @ p.up.flatten(0, 1)) @ p.down).transpose(1, 2)


def attend_compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    block: int,
    stride: int,
    selected_block: int,
    num_selected: int,
    before: int | Tensor = 0,
    reach: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the compressed blocks that end at or before a query, and the blocks it selects.

    One block of queries at a time, and again in the backward pass: what autograd keeps grows linearly with T. No
    gradient flows through the selection.

    q        [B T H C]         query head h reads the keys h // G
    k        [B M K C]
    v        [B M K U]
    first    [B M] or [1 M] i64, first token of each block, T where there is none
    start    [B T] i32 or ()   index in the row of each token's document; (): rows are whole
    block, stride              tokens a compressed block, and between the first ones of two
    before   tokens of the row before the first query's
    reach    tokens of the row that are read at most, hidden ones among them; None: as many as the last query sees
    returns  [B T H U], zeros of a query that sees no block, and the selection [B T K S] i32 as `select` has it
    Cost:    2·B·H·(C + U) FLOPs a query and block that ends before the end of the query's block of queries.
    """
    groups, length = k.shape[2], q.shape[1]
    most = min(num_selected, num_blocks(reach or length, selected_block))
    q = (q * scale).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        last = first[:, None, : k.shape[2]] + block - 1
        hidden = last > (before + torch.arange(begin, end, device=q.device))[:, None]
        if isinstance(start, Tensor):
            hidden = hidden | (first[:, None, : k.shape[2]] < start[:, begin:end, None])
        score = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
        probability = softmax(score, hidden[:, None, :, None])
        o = (probability.to(v.dtype).flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
        return o, probability.detach().sum(3)

    blocks: list[Tensor] = []
    chosen: list[Tensor] = []
    for begin, end in query_blocks(length, QUERIES):
        count = num_pooled(reach or end, block, stride)
        o, weight = again(attend, q[:, :, begin:end], k[:, :, :count], v[:, :, :count], begin, end)
        blocks.append(o)
        position = (before + torch.arange(begin, end, device=q.device))[None]
        if isinstance(start, Tensor):
            weight = _of_document(weight, start[:, None, begin:end, None] // stride)
            position = position - start[:, begin:end]
        here = select(
            weight,
            position[:, None],
            block=block,
            stride=stride,
            selected_block=selected_block,
            num_blocks=num_blocks(reach or end, selected_block),
            count=num_selected,
        )
        chosen.append(F.pad(here, (0, most - here.shape[-1]), value=-1))
    return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2, 3), torch.cat(chosen, dim=2).transpose(1, 2)


def _of_document(weight: Tensor, place: Tensor) -> Tensor:
    """`weight` [B K t m] of places in the row, counted from the place [B 1 t 1] where a query's document begins."""
    at = place + torch.arange(weight.shape[-1], device=weight.device)
    beyond = at >= weight.shape[-1]
    return weight.gather(-1, at.masked_fill(beyond, 0).expand_as(weight)).masked_fill(beyond, 0)


def select(
    weight: Tensor, position: Tensor, *, block: int, stride: int, selected_block: int, num_blocks: int, count: int
) -> Tensor:
    """The blocks whose tokens a query reads: its document's first, its own, the one before, and the heaviest others.

    The weight of a block is that of the compressed ones, each in proportion to how much of it lies in the block. All
    query heads of a group share one selection; of equal blocks the lower index is taken.

    weight      [B K t m]            attention to the compressed blocks of the query's document, summed over the group
    position    [B 1 t] or [1 1 t]   of each query in its document
    num_blocks  blocks to choose from, the last query's own among them
    returns     [B K t S] i32        blocks, ascending, then -1 where a query has fewer; S = min(count, num_blocks)
    Source:     NSA (arXiv:2502.11089) eq. 9-11.
    """
    ratio, span = selected_block // stride, block // stride
    padded = F.pad(weight, (span - 1, ratio * num_blocks - weight.shape[-1]))
    total = weight.new_zeros(*weight.shape[:-1], num_blocks)
    for place in range(1 - span, ratio):  # of a compressed block's first stride, from the first of the block
        shared = min(place + span, ratio) - max(place, 0)
        total = total + shared * padded[..., place + span - 1 :: ratio][..., :num_blocks]
    candidate = torch.arange(num_blocks, device=weight.device)
    own = (position // selected_block)[..., None]
    forced = (candidate == 0) | (candidate == own) | (candidate == own - 1)
    total = total.masked_fill(forced, torch.inf).masked_fill(candidate > own, -torch.inf)
    return best(total, count)


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    block: int,
    before: int | Tensor = 0,
    reach: int | None = None,
) -> Tensor:
    """Causal softmax attention over the tokens of the selected blocks.

    One block of queries at a time, and again in the backward pass: the selected keys of no more queries are copied, and
    what autograd keeps grows linearly with T.

    q        [B T H C]         query head h reads the keys h // G
    k        [B T K C]
    v        [B T K U]
    chosen   [B T K S] i32     blocks that a query reads, in its document, ascending; -1: none
    start    [B T] i32 or ()   index in the row of each token's document; (): rows are whole
    block    tokens a block
    before   tokens of the row before the first query's
    reach    tokens of the row that are read at most, hidden ones among them; None: as many as the last query sees
    returns  [B T H U]
    Cost:    2·B·T·H·(C + U)·S·block FLOPs at most.
    """
    groups, length = k.shape[2], q.shape[1]
    q = (q * scale).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    k, v, chosen = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), chosen.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, begin: int, end: int) -> Tensor:
        first = chosen.long() * block
        if isinstance(start, Tensor):
            first = first + start[:, None, begin:end, None]
        token = (first[..., None] + torch.arange(block, device=q.device)).flatten(-2)
        query = (before + torch.arange(begin, end, device=q.device))[:, None]
        hidden = (chosen < 0).repeat_interleave(block, -1) | (token > query)
        at = token.masked_fill(hidden, 0)
        score = q @ gathered(k, at).mT
        return softmax(score, hidden[..., None, :]).to(v.dtype) @ gathered(v, at)

    blocks: list[Tensor] = []
    for begin, end in query_blocks(length, QUERIES):
        here = chosen[:, :, begin:end, : num_blocks(reach or end, block)]
        blocks.append(again(attend, q[:, :, begin:end], k, v, here, begin, end))
    return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2, 3)


REFERENCE = NsaOps(attend_compressed, attend_selected, attend_gqa)


def tables(c: sections.Nsa, num_positions: int) -> Rope:
    """The rotation table; every channel of a query and key is rotated."""
    return table(num_positions, c.head_dim, theta=c.rope_theta, yarn=None)
