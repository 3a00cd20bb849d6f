"""DeepSeek sparse attention: latent attention to the keys that a small indexer finds best for a query.

B sequences · T tokens · D width · H heads · C query and key channels a head, P of them rotated
U value channels a head · Q, R low ranks of the query and of keys and values
X heads of the indexer of Y channels · S keys a query reads
t, n the queries of one block of queries, and the keys that it sees
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, ones, zeros
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.attention import mla
from nmoe.pure.model.attention.blocks import again, best, gathered, query_blocks, softmax
from nmoe.pure.model.attention.cached import New
from nmoe.pure.model.attention.gqa import attended
from nmoe.pure.model.hf_leaf import Leaf, matrix, ordered, same
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.rope import Documents, Rope, rotate

QUERIES = 64
"""Queries whose scores, and whose copies of the keys they read, exist at once."""

PAIRS = 60 * 2**20
"""Bytes that a device's kernels may take at once for what pairs of keys and queries' heads have in a backward pass."""

NORM_EPS = 1e-6
"""Of the norm of the indexer's keys, whatever the model's is: as published."""


@record
class Indexer:
    """Scores of every key for every query, from the query's latent and the block's input."""

    query: Tensor = param("Q (X Y)", Role.MATRIX, normal("Q"))
    key: Tensor = param("D Y", Role.MATRIX, normal("D"))
    gain: Tensor = param("Y", Role.GAIN, ones)
    shift: Tensor = param("Y", Role.GAIN, zeros)
    weight: Tensor = param("D X", Role.MATRIX, normal("D"))


@record
class Dsa:
    """Attention of one block."""

    latent: mla.Mla
    indexer: Indexer


def specs(c: sections.Dsa) -> Dsa:
    """Specs of one block's attention."""
    return spec_tree(Dsa, latent=mla.specs(c), indexer=spec_tree(Indexer))


def dims(c: sections.Dsa) -> dict[str, int]:
    """Sizes of the axes that only attention has: those of latent attention, X and Y."""
    return mla.dims(c) | {"X": c.index_num_heads, "Y": c.index_head_dim}


def at_tokens(c: sections.Dsa, tokens: int) -> sections.Dsa:
    """The section after so many tokens of the run: the warm-up that is over is none."""
    return c if tokens < c.index_warmup_tokens else attrs.evolve(c, index_warmup_tokens=0)


@record
class DsaOps:
    """What a device implements of sparse latent attention; a field has the signature of its reference."""

    query: Callable[..., tuple[Tensor, Tensor]]
    select: Callable[..., Tensor]
    attend: Callable[..., tuple[Tensor, Tensor]]
    dense: Callable[..., tuple[Tensor, Tensor]]


def dsa(
    p: Dsa,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: DsaOps,
    c: sections.Dsa,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Sparse latent attention of each sequence, or each of its documents, over itself, and the indexer's loss.

    The sparse stage reads latents: all heads share the keys [latent | rotated key], and a head's own part of the
    expansion is in its query and output. The dense stage expands them as `mla` does: a pair costs less then, and no
    key is read by itself. No gradient of the attention reaches the indexer, and none of the indexer's loss the rest:
    its inputs and its target are constants.

    x          [B T D]   normed block input
    c          section at this point of the run, as `at_tokens` has it: with a warm-up left every key is read
    documents  which positions each token may see; (): rows are whole
    returns    [B T D], and the weighted loss of the indexer, summed over tokens
    Source:    DeepSeek-V3.2-Exp (2025), sections 1 and 2; without the Hadamard transform and FP8 of its inference.
    """
    start, position = (documents.start, documents.position) if isinstance(documents, Documents) else ((), ())
    main, rank, nope = p.latent, c.kv_lora_rank, c.qk_nope_head_dim
    low, q, kv = _inputs(main, x, rope, norm, ops, c, position, eps)
    index = project_index(p.indexer, x.detach(), low.detach(), rope, position)
    if c.index_warmup_tokens:
        expanded = (kv[..., :rank] @ main.up.flatten(1)).unflatten(-1, main.up.shape[1:])
        o, loss = ops.dense(q, expanded, kv[..., rank:], *index, start, scale=mla.scale(c))
    else:
        up_key, up_value = main.up.split((nope, c.v_head_dim), dim=-1)
        q = torch.cat((torch.einsum("bthc,rhc->bthr", q[..., :nope], up_key), q[..., nope:]), dim=-1)
        chosen = ops.select(*index, start, count=c.index_top_k)
        o, loss = ops.attend(q, kv, *index, chosen, start, scale=mla.scale(c), rank=rank)
        o = torch.einsum("bthr,rhu->bthu", o, up_value)
    return o.flatten(-2) @ main.out.flatten(0, 1), c.index_loss * loss


def _inputs(
    p: mla.Mla,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: DsaOps,
    c: sections.Dsa,
    position: Tensor | tuple[()],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed latent of the query [B T Q], queries [B T H C] and latents behind which are rotated keys [B T R+P]."""
    query, latent, key = (x @ p.down).split((c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    if not isinstance(p.query, mla.QueryUp):
        raise ValueError("dsa: expected a latent of the query, which the indexer reads, got none; set q_lora_rank")
    low = norm(query, p.query.norm, eps=eps)
    q, k_rope = ops.query(low, p.query.up, key, rope, position)
    return low, q, torch.cat((norm(latent, p.norm, eps=eps), k_rope), dim=-1)


@record
class DsaCache:
    """What later tokens read of earlier ones."""

    latent: Tensor  # [B N R+P], as `mla.empty_cache` has it
    index: Tensor  # [B N Y], keys of the indexer


def empty_cache(c: sections.Dsa, num_sequences: int, num_tokens: int, like: Tensor) -> DsaCache:
    """The cache before the first token, in the format of `like`."""
    index = like.new_zeros(num_sequences, num_tokens, c.index_head_dim)
    return DsaCache(mla.empty_cache(c, num_sequences, num_tokens, like), index)


def extend(
    p: Dsa,
    x: Tensor,
    cache: DsaCache,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: DsaOps,
    c: sections.Dsa,
    *,
    eps: float,
) -> tuple[Tensor, DsaCache]:
    """`dsa` of new tokens that also see those in the cache, in the sparse stage.

    x        [B T D]   normed block input of the new tokens
    returns  [B T D], and the cache with the new tokens
    """
    position = new.documents.position
    low, q, kv = _inputs(p.latent, x, rope, norm, ops, c, position, eps)
    index_q, index_k, index_w = project_index(p.indexer, x, low, rope, position)
    after = DsaCache(new.store(cache.latent, kv, new.place), new.store(cache.index, index_k, new.place))
    visible = new.visible
    if not c.index_warmup_tokens:
        score = index_scores(index_q, after.index[:, : new.reach()], index_w).masked_fill(~visible, -torch.inf)
        chosen = best(score, c.index_top_k).long()
        none = visible.shape[-1]  # a column for the queries that read fewer
        visible = F.pad(torch.zeros_like(visible), (0, 1)).scatter(-1, chosen.where(chosen >= 0, none), True)[
            ..., :none
        ]
    o = mla.attend_latent(q, after.latent[:, : new.reach()], p.latent.up, visible, scale=mla.scale(c))
    return o.flatten(-2) @ p.latent.out.flatten(0, 1), after


def project_index(
    p: Indexer, x: Tensor, low: Tensor, rope: Rope, positions: Tensor | tuple[()]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and weights of the indexer; the first P channels of queries and keys are rotated.

    x          [B T D]
    low        [B T Q]   normed latent of the query
    positions  [B T]     as in `rotate`
    returns    q [B T X Y], k [B T Y], w [B T X], with the scale of the scores in the weights
    """
    rotated = 2 * rope.cos.shape[-1]
    q = (low @ p.query.flatten(1)).unflatten(-1, p.query.shape[1:])
    upcasted = upcast(x @ p.key)
    k = F.layer_norm(upcasted, upcasted.shape[-1:], p.gain.to(upcasted.dtype), p.shift.to(upcasted.dtype), NORM_EPS).to(
        x.dtype
    )
    q, k = (
        torch.cat((rotate(tensor[..., :rotated], rope, positions), tensor[..., rotated:]), dim=-1) for tensor in (q, k)
    )
    return q, k, (x @ p.weight) * (q.shape[2] * q.shape[3]) ** -0.5


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """How well each key suits each query: [B t n], in fp32 at least.

    q        [B t X Y]
    k        [B n Y], or [B t n Y] of each query's own keys
    w        [B t X]
    """
    score = q @ k.mT if k.ndim == 4 else (q.flatten(1, 2) @ k.mT).unflatten(1, q.shape[1:3])
    return (upcast(w)[..., None, :] @ upcast(score).relu())[..., 0, :]


def select(q: Tensor, k: Tensor, w: Tensor, start: Tensor | tuple[()] = (), *, count: int) -> Tensor:
    """The keys that each query reads: exactly the `count` of the highest score among those up to its own.

    One block of queries at a time: no scores of all queries exist. There is no gradient.

    q, k, w  as `project_index` makes them
    start    [B T] i32 or ()   query i reads no key before start[i]; (): all keys up to i
    returns  [B T S] i32       indices in the row, ascending, -1 where there are fewer; S = min(count, T)
    Cost:    2·B·T²·X·(Y + 1) FLOPs, half of them above the diagonal.
    """
    q, k, w = q.detach(), k.detach(), w.detach()
    length, chosen = q.shape[1], list[Tensor]()
    for begin, end in query_blocks(length, QUERIES):
        score = index_scores(q[:, begin:end], k[:, :end], w[:, begin:end])
        score = score.masked_fill(_hidden(begin, end, start, q.device), -torch.inf)
        here = best(score, count)
        chosen.append(F.pad(here, (0, min(count, length) - here.shape[-1]), value=-1))
    return torch.cat(chosen, dim=1)


def attend_dsa(
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
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the chosen keys, and how far the indexer's softmax over them is from it.

    One block of queries at a time, and again in the backward pass: the chosen keys of no more queries are copied, and
    what autograd keeps grows linearly with T.

    q        [B T H R+P]       in the latent's channels, then the rotated ones
    kv       [B T R+P]         latents and rotated keys, shared by all heads; the value is the latent
    index_q, index_k, index_w  as `project_index` makes them
    chosen   [B T S] i32       keys that a query reads, -1: none
    start    [B T] i32 or ()   first token of each token's document, which `chosen` holds to: not read
    rank     R
    returns  [B T H R], and the sum over queries of KL(mean of the heads' probabilities || the indexer's), 0-d; the
             gradient of the latter goes to the indexer alone
    Cost:    2·B·T·S·(H·(2 R + P) + X·(Y + 1)) FLOPs.
    Source:  DeepSeek-V3.2-Exp eq. 4.
    """

    def attend(
        q: Tensor, index_q: Tensor, index_w: Tensor, here: Tensor, kv: Tensor, index_k: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, at = here < 0, here.clamp(min=0).long()
        kv, index_k = (gathered(tensor[:, None], at[:, None])[:, 0] for tensor in (kv, index_k))
        probability = softmax(q @ kv.mT * scale, hidden[:, :, None])
        o = probability.to(kv.dtype) @ kv[..., :rank]
        return o, _divergence(probability, index_scores(index_q, index_k, index_w), hidden)

    return _by_blocks(
        (attend, *(tensor[:, begin:end] for tensor in (q, index_q, index_w, chosen)), kv, index_k)
        for begin, end in query_blocks(q.shape[1], QUERIES)
    )


def attend_dense(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend_mla`, and how far the indexer's softmax over all keys is from it: the stage in which the indexer begins.

    In blocks of queries, as `attend_dsa`.

    q        [B T H C]         the last P channels are rotated
    kv       [B T H Z]         C - P channels of key, then U of value
    k_rope   [B T P]           rotated key, shared by all heads
    index_q, index_k, index_w  as `project_index` makes them
    start    [B T] i32 or ()   query i sees the keys start[i]..i; (): the keys up to i
    returns  [B T H U], and the sum over queries of KL(mean of the heads' probabilities || the indexer's), 0-d; the
             gradient of the latter goes to the indexer alone
    Cost:    2·B·T²·(H·(C + U) + X·(Y + 1)) FLOPs, half of them above the diagonal.
    Source:  DeepSeek-V3.2-Exp eq. 3.
    """
    nope = q.shape[-1] - k_rope.shape[-1]

    def attend(
        q: Tensor, index_q: Tensor, index_w: Tensor, kv: Tensor, k_rope: Tensor, index_k: Tensor, begin: int
    ) -> tuple[Tensor, Tensor]:
        hidden = _hidden(begin, begin + q.shape[1], start, q.device)
        score = torch.einsum("bthc,bnhc->bthn", q[..., :nope], kv[..., :nope])
        score = score + torch.einsum("bthp,bnp->bthn", q[..., nope:], k_rope)
        probability = softmax(score * scale, hidden[:, :, None])
        o = torch.einsum("bthn,bnhu->bthu", probability.to(kv.dtype), kv[..., nope:])
        return o, _divergence(probability, index_scores(index_q, index_k, index_w), hidden)

    return _by_blocks(
        (
            attend,
            *(tensor[:, begin:end] for tensor in (q, index_q, index_w)),
            *(tensor[:, :end] for tensor in (kv, k_rope, index_k)),
            begin,
        )
        for begin, end in query_blocks(q.shape[1], QUERIES)
    )


def _divergence(probability: Tensor, own: Tensor, hidden: Tensor) -> Tensor:
    """KL(mean of the heads' probabilities || softmax of the indexer's scores), summed over queries; the first is given.

    probability  [B t H n]
    own          [B t n]     scores of the indexer
    hidden       [b t n]     bool
    """
    target = probability.detach().mean(2)
    own = own.masked_fill(hidden, torch.finfo(own.dtype).min).log_softmax(-1).masked_fill(hidden, 0)
    return (torch.xlogy(target, target) - target * own).sum()


def _by_blocks(blocks: Iterable[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """Outputs of blocks of queries behind each other, and the sum of their losses, each computed `again`."""
    outputs, losses = zip(*(again(*block) for block in blocks), strict=True)
    return torch.cat(outputs, dim=1), torch.stack(losses).sum()


def _hidden(begin: int, end: int, start: Tensor | tuple[()], device: torch.device) -> Tensor:
    """Which of the keys 0..end-1 the queries begin..end-1 do not see: [B t n] or [1 t n] bool."""
    query, key = torch.arange(begin, end, device=device)[:, None], torch.arange(end, device=device)
    hidden = (key > query)[None]
    return hidden | (key < start[:, begin:end, None]) if isinstance(start, Tensor) else hidden


REFERENCE = DsaOps(mla.query, select, attend_dsa, attend_dense)


def flops(c: sections.Dsa, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of scores, weighted values and the indexer's scores in the sparse stage, a token of one layer.

    causal  count the pairs that are attended, and those that the indexer must score; False: all that the reference
            computes, the indexer's loss included
    """
    length, rank = sequence_length, c.kv_lora_rank
    a_pair = 2 * c.num_heads * (2 * rank + c.qk_rope_head_dim)
    an_index = 2 * c.index_num_heads * (c.index_head_dim + 1)
    if causal:
        return (a_pair * attended(length, c.index_top_k) + an_index * attended(length, None)) // length
    scored = sum((end - begin) * end for begin, end in query_blocks(length, QUERIES))
    return (a_pair + an_index) * min(length, c.index_top_k) + an_index * scored // length


def kept_bytes(c: sections.Dsa, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities: never, it makes them again
    """
    fp32, index, statistics = 4, 4, 4
    heads, rank, rotated = c.num_heads, c.kv_lora_rank, c.qk_rope_head_dim
    narrow = (
        hidden  # input of `down`, and of the indexer
        + c.q_lora_rank  # normed latent of the query
        + heads * (c.qk_nope_head_dim + rotated)  # queries
        + heads * (rank + rotated)  # the same in the latent's channels
        + (rank + rotated)  # keys
        + heads * (rank + c.v_head_dim)  # outputs, before and after the expansion
        + (c.index_num_heads + 1) * c.index_head_dim
        + c.index_num_heads
    )
    # the latents' norms keep their input and the scaled one, the norm of the indexer's keys its input
    norms = 2 * (c.q_lora_rank + rank) + c.index_head_dim + statistics
    return narrow * element + norms * fp32 + min(c.index_top_k, sequence_length) * index


def kernel_kept_bytes(c: sections.Dsa) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16, and those of the norm that recompute makes again.

    Of a sequence shorter than `index_top_k` they keep fewer indices and targets.
    """
    fp32, index, element = 4, 4, 2
    heads, rank, rotated = c.num_heads, c.kv_lora_rank, c.qk_rope_head_dim
    narrow = (
        (c.q_lora_rank + rank + rotated)  # product of `down`, which the norms read
        + heads * (c.qk_nope_head_dim + rotated)  # queries
        + heads * (rank + rotated)  # the same in the latent's channels
        + (rank + rotated)  # keys
        + heads * (rank + c.v_head_dim)  # outputs, before and after the expansion
        + (c.index_num_heads + 1) * c.index_head_dim
        + c.index_num_heads
    )
    # input of the norm of the indexer's keys and its statistics, the log-sums of heads and of the indexer
    wide = (c.index_head_dim + 2 + heads + 1) * fp32
    return narrow * element + wide + c.index_top_k * (index + fp32), c.q_lora_rank * element


def kernel_passing_bytes(c: sections.Dsa, *, tokens: int, sequence_length: int) -> int:
    """Bytes of one layer's backward pass beside what is kept: gradients in the latent's channels, and the workspace.

    Sums of one sequence's keys in fp32 lie where gradients of queries go, if that is enough.
    """
    element, fp32 = 2, 4
    width = c.kv_lora_rank + c.qk_rope_head_dim
    a_token = c.num_heads * ((c.kv_lora_rank + width) * element + fp32) + width * element
    fits = tokens * c.num_heads * element >= sequence_length * fp32
    return tokens * a_token + (0 if fits else sequence_length * width * fp32) + PAIRS


HF_KEYS: Mapping[str, str] = MappingProxyType(
    {"index_topk": "index_top_k", "index_n_heads": "index_num_heads", "index_head_dim": "index_head_dim"}
)
"""Key of `transformers.DeepseekV32Config` -> field of the section, beside those of latent attention."""


def hf_settings(c: sections.Dsa) -> dict[str, Any]:
    """Keys of `transformers.DeepseekV32Config` that describe this attention."""
    return mla.hf_settings(c) | {theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()}


def hf_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The table of this section in a `config.json`, values unchecked, and what this attention cannot express."""
    section, problems = mla.hf_section(config)
    problems += [f"{key}: expected a value, got nothing; write it" for key in HF_KEYS if key not in config]
    return section | {ours: config[theirs] for theirs, ours in HF_KEYS.items() if theirs in config}, problems


def hf_leaves(c: sections.Dsa) -> dict[str, Leaf]:
    """What each parameter is in `transformers`.

    Of the indexer it rotates channel i with channel i + P/2, we rotate neighbours: even channels come first.
    """
    rotated, index = c.qk_rope_head_dim, list(range(c.index_head_dim))
    order = (*index[:rotated:2], *index[1:rotated:2], *index[rotated:])
    return {f"latent.{path}": leaf for path, leaf in mla.hf_leaves(c).items()} | {
        "indexer.query": ordered(matrix("indexer.wq_b.weight", outs=(c.index_num_heads, -1)), order, 2),
        "indexer.key": ordered(matrix("indexer.wk.weight"), order, 1),
        "indexer.gain": ordered(same("indexer.k_norm.weight"), order, 0),
        "indexer.shift": ordered(same("indexer.k_norm.bias"), order, 0),
        "indexer.weight": matrix("indexer.weights_proj.weight"),
    }
