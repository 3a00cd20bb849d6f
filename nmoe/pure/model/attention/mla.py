"""Multi-head latent attention: keys and values from one low-rank latent, position in channels of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, ones, residual
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.rope import Rope, document_positions, magnitude, rotate


@record
class QueryUp:
    """Query from its own low-rank latent."""

    norm: Tensor = param("Q", Role.GAIN, ones)
    up: Tensor = param("Q H C", Role.MATRIX, normal("Q"))


@record
class Mla:
    """Attention of one block.

    `down` makes, in one product, [query part | latent of keys and values | rotated key]. The query part is the query's
    latent when `query` is a QueryUp, and the query itself when `query` is ().
    """

    down: Tensor = param("D A", Role.MATRIX, normal("D"))
    query: QueryUp | tuple[()]
    norm: Tensor = param("R", Role.GAIN, ones)
    up: Tensor = param("R H Z", Role.MATRIX, normal("R"))
    out: Tensor = param("H U D", Role.MATRIX, residual("H", "U"))


def specs(c: sections.Mla) -> Mla:
    """Specs of one block's attention."""
    return spec_tree(Mla, query=() if c.q_lora_rank is None else spec_tree(QueryUp))


def dims(c: sections.Mla) -> dict[str, int]:
    """Sizes of the axes that only attention has.

    H heads · C query and key channels a head · P the rotated ones of them · U value channels a head
    Q, R low ranks of the query and of keys and values · Z channels a head of keys and values · A width of `down`
    """
    query = c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    low_rank = {} if c.q_lora_rank is None else {"Q": c.q_lora_rank}
    return {
        "H": c.num_heads,
        "C": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "P": c.qk_rope_head_dim,
        "U": c.v_head_dim,
        "R": c.kv_lora_rank,
        "Z": c.qk_nope_head_dim + c.v_head_dim,
        "A": (c.q_lora_rank or query) + c.kv_lora_rank + c.qk_rope_head_dim,
        **low_rank,
    }


def scale(c: sections.Mla) -> float:
    """Factor on the attention scores; YaRN sharpens them by its magnitude squared (DeepSeek-V2, section 3.1.4)."""
    sharpen = 1.0 if c.yarn is None else magnitude(c.yarn.factor, c.yarn.mscale_all_dim) ** 2
    return sharpen * (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5


def mla(
    p: Mla,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    turn: Callable[..., tuple[Tensor, Tensor]],
    attend: Callable[..., Tensor],
    c: sections.Mla,
    start: Tensor | tuple[()] = (),
    *,
    eps: float,
) -> Tensor:
    """Causal latent attention of each sequence, or each of its documents, over itself.

    x        [B T D]   normed block input
    norm     `rms_norm` or a kernel that implements it
    turn     `rotate_mla` or a kernel that implements it; it may take over the memory of its first argument
    attend   `attend_mla` or a kernel that implements it
    start    [B T] i32 or ()   as in `attend_mla`
    returns  [B T D]
    Source:  DeepSeek-V2 (arXiv:2405.04434) eq. 9-19, without the inference-time absorption.
    """
    query_width = p.down.shape[1] - c.kv_lora_rank - c.qk_rope_head_dim
    query, latent, k_rope = (x @ p.down).split((query_width, c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    if isinstance(p.query, QueryUp):
        query = norm(query, p.query.norm, eps=eps) @ p.query.up.flatten(1)
    at = document_positions(start) if isinstance(start, Tensor) else ()
    q, k_rope = turn(query.unflatten(-1, (c.num_heads, -1)), k_rope, rope, at)
    kv = (norm(latent, p.norm, eps=eps) @ p.up.flatten(1)).unflatten(-1, (c.num_heads, -1))
    o = attend(q, kv, k_rope, start, scale=scale(c))
    return o.flatten(-2) @ p.out.flatten(0, 1)


def rotate_mla(q: Tensor, k_rope: Tensor, rope: Rope, positions: Tensor | tuple[()] = ()) -> tuple[Tensor, Tensor]:
    """Query and shared key with their position in the channels meant for it.

    q          [B T H C]   the last P channels are to be rotated
    k_rope     [B T P]
    positions  [B T]       of each token, within the table; (): 0..T-1
    returns    q [B T H C], k_rope [B T P]
    """
    nope = q.shape[-1] - k_rope.shape[-1]
    q_nope, q_rope = q.split((nope, k_rope.shape[-1]), dim=-1)
    return torch.cat((q_nope, rotate(q_rope, rope, positions)), dim=-1), rotate(k_rope, rope, positions)


def attend_mla(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """Causal softmax attention; a head's key is its own part of `kv` beside the shared `k_rope`.

    q        [B T H C]         the last P channels are rotated
    kv       [B T H Z]         C - P channels of key, then U of value
    k_rope   [B T P]           rotated key, shared by all heads
    start    [B T] i32 or ()   query i sees the keys start[i]..i; (): the keys up to i
    returns  [B T H U]
    Cost:    2·B·T²·H·(C + U) FLOPs as executed, half of them above the diagonal.
    """
    heads = q.shape[2]
    nope = q.shape[-1] - k_rope.shape[-1]
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if isinstance(start, Tensor):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(start)[:, None], scale=scale)
    else:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2)


def visible(start: Tensor) -> Tensor:
    """Which keys each query sees: [B T T] bool, queries before keys, from `start` [B T]."""
    position = torch.arange(start.shape[1], device=start.device)
    return (start[:, :, None] <= position) & (position <= position[:, None])
