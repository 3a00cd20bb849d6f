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
from nmoe.pure.model.attention.blocks import WORKSPACE, again, best, gathered, query_blocks, softmax
from nmoe.pure.model.attention.gqa import KvCache, attend_cached, attend_gqa, attended, executed
from nmoe.pure.model.rope import Documents, Rope, rotate, table, visible_cached

QUERIES = 128
"""Queries whose scores, and whose copies of selected keys, exist at once."""


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

    pooled: KvCache  # keys and values of the compressed blocks that are certain, [B M K C] and [B M K U]
    unpooled: KvCache  # of the tokens from the first block on that is not, keys unrotated
    selected: KvCache  # of all S tokens
    window: KvCache  # of the last window - 1


def empty_cache(c: sections.Nsa, num_sequences: int, like: Tensor) -> NsaCache:
    """The cache before the first token, in the format of `like`."""
    k, v = (like.new_zeros(num_sequences, 0, c.num_kv_heads, width) for width in (c.head_dim, c.v_head_dim))
    return NsaCache(*(KvCache(k, v) for _ in range(4)))


def extend(
    p: Nsa,
    x: Tensor,
    cache: NsaCache,
    documents: Documents,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: NsaOps,
    c: sections.Nsa,
    *,
    eps: float,
) -> tuple[Tensor, NsaCache]:
    """`nsa` of new tokens that also see those in the cache.

    x          [B T D]   normed block input of the new tokens
    documents  of the new tokens; `start` is counted from the first token of the row, cached ones included
    returns    [B T D], and the cache with the new tokens
    """
    before, block, stride = cache.selected.k.shape[1], c.compressed_block, c.compressed_stride
    total = before + x.shape[1]
    q, k_pooled, k_selected, k_window, v = _inputs(p, x, rope, documents.position)
    unpooled = cache.unpooled.joined(k_pooled, v[:, :, 0])
    selected = cache.selected.joined(k_selected, v[:, :, 1])
    window = cache.window.joined(k_window, v[:, :, 2])

    # a row has one document, behind padding of which each token is its own
    start = torch.minimum(torch.arange(total, device=x.device), documents.start[:, -1:])
    first = first_tokens(total, start, block=block, stride=stride, device=x.device)
    done = cache.pooled.k.shape[1]
    at = first[:, done:].clamp(max=total - 1)
    placed = at - start.gather(1, at)
    within = at - done * stride
    pooled = cache.pooled.joined(
        rotate(pool(p.key_pool, unpooled.k, within), rope, placed), pool(p.value_pool, unpooled.v, within)
    )
    scale = c.head_dim**-0.5
    compressed, chosen = attend_compressed(
        *(q, pooled.k, pooled.v, first, documents.start),
        scale=scale,
        block=block,
        stride=stride,
        selected_block=c.selected_block,
        num_selected=c.num_selected,
        before=before,
    )
    branches = (
        compressed,
        attend_selected(
            *(q, selected.k, selected.v, chosen, documents.start), scale=scale, block=c.selected_block, before=before
        ),
        attend_cached(q, window.k, window.v, (), visible_cached(documents, window.k.shape[1], c.window), scale=scale),
    )
    # a block begins up to stride - 1 tokens after its place, so the last place may still get one
    certain = max(0, _num_pooled(total, block, stride) - 1)
    kept = NsaCache(
        KvCache(pooled.k[:, :certain], pooled.v[:, :certain]),
        unpooled.without((certain - done) * stride),
        selected,
        window.without(max(0, window.k.shape[1] - c.window + 1)),
    )
    return _joined(p, x, *branches), kept


def first_tokens(length: int, start: Tensor | tuple[()], *, block: int, stride: int, device: torch.device) -> Tensor:
    """The first token of each compressed block, or `length` where there is none.

    The blocks of a document begin at every `stride`-th of its tokens and lie in it whole, so that at most one begins
    among the tokens m·stride .. (m + 1)·stride - 1 of a row: its place is m, and those of a document are neighbours.

    start    [B T] i32 or ()   index in the row of each token's document; (): rows are whole
    returns  [B M] i64, or [1 M] for whole rows
    """
    count = _num_pooled(length, block, stride)
    token = torch.arange(count * stride, device=device)  # below `length`, because a stride is no longer than a block
    if not isinstance(start, Tensor):
        return token[None, ::stride]
    last = (token + block - 1).clamp(max=length - 1)
    begins = (token + block <= length) & ((token - start[:, token]) % stride == 0) & (start[:, last] == start[:, token])
    return torch.where(begins, token, length).unflatten(1, (count, stride)).amin(2)


def _num_pooled(length: int, block: int, stride: int) -> int:
    """Compressed blocks that end among the first `length` tokens of a row."""
    return 0 if length < block else (length - block) // stride + 1


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
    before: int = 0,
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
    returns  [B T H U], zeros of a query that sees no block, and the selection [B T K S] i32 as `select` has it
    Cost:    2·B·H·(C + U) FLOPs a query and block that ends before the end of the query's block of queries.
    """
    groups, length = k.shape[2], q.shape[1]
    most = min(num_selected, _num_blocks(before + length, selected_block))
    q = (q * scale).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        last = first[:, None, : k.shape[2]] + block - 1
        hidden = last > torch.arange(before + begin, before + end, device=q.device)[:, None]
        if isinstance(start, Tensor):
            hidden = hidden | (first[:, None, : k.shape[2]] < start[:, begin:end, None])
        score = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
        probability = softmax(score, hidden[:, None, :, None])
        o = (probability.to(v.dtype).flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
        return o, probability.detach().sum(3)

    blocks: list[Tensor] = []
    chosen: list[Tensor] = []
    for begin, end in query_blocks(length, QUERIES):
        count = _num_pooled(before + end, block, stride)
        o, weight = again(attend, q[:, :, begin:end], k[:, :, :count], v[:, :, :count], begin, end)
        blocks.append(o)
        position = torch.arange(before + begin, before + end, device=q.device)[None]
        if isinstance(start, Tensor):
            weight = _of_document(weight, start[:, None, begin:end, None] // stride)
            position = position - start[:, begin:end]
        here = select(
            weight,
            position[:, None],
            block=block,
            stride=stride,
            selected_block=selected_block,
            num_blocks=_num_blocks(before + end, selected_block),
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
    before: int = 0,
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
        query = torch.arange(before + begin, before + end, device=q.device)[:, None]
        hidden = (chosen < 0).repeat_interleave(block, -1) | (token > query)
        at = token.masked_fill(hidden, 0)
        score = q @ gathered(k, at).mT
        return softmax(score, hidden[..., None, :]).to(v.dtype) @ gathered(v, at)

    blocks: list[Tensor] = []
    for begin, end in query_blocks(length, QUERIES):
        here = chosen[:, :, begin:end, : _num_blocks(before + end, block)]
        blocks.append(again(attend, q[:, :, begin:end], k, v, here, begin, end))
    return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2, 3)


def _num_blocks(length: int, block: int) -> int:
    """Blocks that the first `length` tokens reach into."""
    return -(-length // block)


REFERENCE = NsaOps(attend_compressed, attend_selected, attend_gqa)


def tables(c: sections.Nsa, num_positions: int) -> Rope:
    """The rotation table; every channel of a query and key is rotated."""
    return table(num_positions, c.head_dim, theta=c.rope_theta, yarn=None)


def attended_compressed(length: int, block: int, stride: int) -> int:
    """Pairs of query and compressed block of one sequence and head that the mask lets through."""
    whole, rest = divmod(max(0, length - block + 1), stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)


def attended_selected(length: int, block: int, count: int) -> int:
    """Pairs of query and selected token of one sequence and head that the mask lets through."""
    complete = min(length, count * block)
    whole, rest = divmod(length - complete, block)
    own = (whole * block * (block + 1) + rest * (rest + 1)) // 2
    return complete * (complete + 1) // 2 + (length - complete) * (count - 1) * block + own


def flops(c: sections.Nsa, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of scores and weighted values of the three branches and of making compressed keys, a token of one layer.

    causal  count the attended pairs only; False: those that the reference computes
    """
    block, stride = c.compressed_block, c.compressed_stride
    if causal:
        compressed = attended_compressed(sequence_length, block, stride)
        selected = attended_selected(sequence_length, c.selected_block, c.num_selected)
        pairs = compressed + selected + attended(sequence_length, c.window)
    else:
        pairs = executed(sequence_length, c.window) + sum(
            (end - begin)
            * (
                _num_pooled(end, block, stride)
                + min(c.num_selected, _num_blocks(end, c.selected_block)) * c.selected_block
            )
            for begin, end in query_blocks(sequence_length, QUERIES)
        )
    attention = 2 * c.num_heads * (c.head_dim + c.v_head_dim) * pairs
    a_block = 2 * c.num_kv_heads * (block + 1) * (c.head_dim**2 + c.v_head_dim**2)
    return (attention + a_block * _num_pooled(sequence_length, block, stride)) // sequence_length


def kept_bytes(c: sections.Nsa, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities; here those of the window
    """
    fp32, index, both = 4, 4, c.head_dim + c.v_head_dim
    blocks = _num_pooled(sequence_length, c.compressed_block, c.compressed_stride)
    a_token = (
        hidden  # input of `q`, `k`, `v` and `gate`
        + 3 * c.num_heads * c.head_dim  # queries of each branch
        + 2 * c.num_kv_heads * both
        + 4 * c.num_heads * c.v_head_dim  # results of each branch, input of `out`
        + 3 * c.num_heads  # gates
    ) * element
    selection = c.num_kv_heads * min(c.num_selected, _num_blocks(sequence_length, c.selected_block)) * index
    pairs = executed(sequence_length, c.window) if square else 0
    window = c.num_heads * pairs * (fp32 + (element if element < fp32 else 0))
    return a_token + selection + (window + _block_bytes(c, element) * blocks) // sequence_length


def _block_bytes(c: sections.Nsa, element: int) -> int:
    """Bytes that autograd keeps of a compressed block: tokens, both sides of the activation, key, value, rotation."""
    both = c.head_dim + c.v_head_dim
    return c.num_kv_heads * both * (c.compressed_block + 3) * element + c.head_dim * 4


def kernel_kept_bytes(c: sections.Nsa) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16; there are no norms that recompute makes again."""
    heads, groups, values = c.num_heads, c.num_kv_heads, c.v_head_dim
    # queries, rotated keys of two branches, values of three, results of each and of all, gates
    narrow = heads * c.head_dim + groups * (2 * c.head_dim + 3 * values) + 4 * heads * values + 3 * heads
    # log-sums, the lists, and the first token of each compressed block
    numbers = 4 * (3 * heads + groups * c.num_selected) + (_block_bytes(c, 2) + 4) // c.compressed_stride
    return 2 * narrow + numbers, 0


def kernel_passing_bytes(c: sections.Nsa, *, tokens: int, sequence_length: int) -> int:
    """Bytes of one layer's backward pass beside what is kept: gradients, inverted lists, and the workspace."""
    lists = (4 + 4 + 8) * c.num_kv_heads * c.num_selected  # owner, sorted owner and place of a query and block
    return tokens * (2 * c.num_heads * (2 * c.head_dim + 3 * c.v_head_dim) + lists) + WORKSPACE
