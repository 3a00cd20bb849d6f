"""Multi-head latent attention: keys and values from one low-rank latent, position in channels of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, ones, residual
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.attention import hf_rotation
from nmoe.pure.model.attention.cached import New
from nmoe.pure.model.hf_leaf import Leaf, columns, matrix, same
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.rope import Documents, Rope, magnitude, rotate, table


@record
class QueryUp:
    """Query from its own low-rank latent."""

    norm: Tensor = param("Q", Role.GAIN, ones)
    up: Tensor = param("Q (H C)", Role.MATRIX, normal("Q"))


@record
class Mla:
    """Attention of one block.

    `down` makes, in one product, [query part | latent of keys and values | rotated key]. The query part is the query's
    latent when `query` is a QueryUp, and the query itself when `query` is ().
    """

    down: Tensor = param("D A+R+P", Role.MATRIX, normal("D"))
    query: QueryUp | tuple[()]
    norm: Tensor = param("R", Role.GAIN, ones)
    up: Tensor = param("R (H Z)", Role.MATRIX, normal("R"))
    out: Tensor = param("(H U) D", Role.MATRIX, residual("H", "U"))


def specs(c: sections.Mla) -> Mla:
    """Specs of one block's attention; without a latent of its own the query part of `down` is one of each head."""
    if c.q_lora_rank is not None:
        return spec_tree(Mla, query=spec_tree(QueryUp))
    whole = spec_tree(Mla, query=())
    return attrs.evolve(whole, down=attrs.evolve(cast("Any", whole.down), axes=("D", "H*C+R+P")))


def dims(c: sections.Mla) -> dict[str, int]:
    """Sizes of the axes that only attention has.

    H heads · C query and key channels a head · P the rotated ones of them · U value channels a head
    Q, R low ranks of the query and of keys and values · Z channels a head of keys and values · A the query part's width
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
        "A": c.q_lora_rank or query,
        **low_rank,
    }


def scale(c: sections.Mla) -> float:
    """Factor on the attention scores; YaRN sharpens them by its magnitude squared (DeepSeek-V2, section 3.1.4)."""
    sharpen = 1.0 if c.yarn is None else magnitude(c.yarn.factor, c.yarn.mscale_all_dim) ** 2
    return sharpen * (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5


@record
class MlaOps:
    """What a device implements of latent attention; a field has the signature of its reference."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    query: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    attend_new: Callable[..., tuple[Tensor, Tensor]]


def mla(
    p: Mla,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: MlaOps,
    c: sections.Mla,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> Tensor:
    """Causal latent attention of each sequence, or each of its documents, over itself.

    x          [B T D]   normed block input
    norm       `rms_norm` or a kernel that implements it
    documents  which positions each token may see; (): rows are whole
    returns    [B T D]
    Source:    DeepSeek-V2 (arXiv:2405.04434) eq. 9-19, without the inference-time absorption.
    """
    start, position = (documents.start, documents.position) if isinstance(documents, Documents) else ((), ())
    q, latent, k_rope = _inputs(p, x, rope, norm, ops, c, position, eps)
    kv = (latent @ p.up.flatten(1)).unflatten(-1, (c.num_heads, -1))
    o = ops.attend(q, kv, k_rope, start, scale=scale(c))
    return o.flatten(-2) @ p.out.flatten(0, 1)


def _inputs(
    p: Mla,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: MlaOps,
    c: sections.Mla,
    position: Tensor | tuple[()],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B T H C], normed latent of keys and values [B T R], rotated key [B T P]."""
    if isinstance(p.query, QueryUp):
        widths = (p.query.norm.shape[0], c.kv_lora_rank, c.qk_rope_head_dim)
        query, latent, key = (x @ p.down).split(widths, dim=-1)
        q, k_rope = ops.query(norm(query, p.query.norm, eps=eps), p.query.up, key, rope, position)
    else:
        q, latent, k_rope = ops.project(x, p.down, rope, position, num_heads=c.num_heads, latent=c.kv_lora_rank)
    return q, norm(latent, p.norm, eps=eps), k_rope


def empty_cache(c: sections.Mla, num_sequences: int, num_tokens: int, like: Tensor) -> Tensor:
    """The cache before the first token, in the format of `like`.

    returns  [B N R+P]: of each token its latent, normed, then its key, rotated, however many heads there are
    """
    return like.new_zeros(num_sequences, num_tokens, c.kv_lora_rank + c.qk_rope_head_dim)


def extend(
    p: Mla,
    x: Tensor,
    cache: Tensor,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: MlaOps,
    c: sections.Mla,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`mla` of new tokens that also see those in the cache.

    x        [B T D]   normed block input of the new tokens
    returns  [B T D], and the cache with the new tokens [B N R+P]
    """
    o, cache = ops.attend_new(p, x, cache, new, rope, norm, ops, c, eps=eps)
    return o.flatten(-2) @ p.out.flatten(0, 1), cache


def attend_new(
    p: Mla,
    x: Tensor,
    cache: Tensor,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: MlaOps,
    c: sections.Mla,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What new tokens attend to in the cache, themselves included.

    x        [B T D]     normed block input
    returns  [B T H U], and the cache with the new tokens [B N R+P]
    """
    q, latent, key = _inputs(p, x, rope, norm, ops, c, new.documents.position, eps)
    cache = new.store(cache, torch.cat((latent, key), dim=-1), new.place)
    return attend_latent(q, cache[:, : new.reach()], p.up, new.visible, scale=scale(c)), cache


def attend_latent(q: Tensor, cache: Tensor, up: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Softmax attention over latents: `up` is absorbed into query and output, so that no key or value is expanded.

    q        [B T H C]    the last P channels are rotated
    cache    [B S R+P]    as `empty_cache` has it
    up       [R H Z]      C - P channels of key, then U of value
    visible  [B T S]      bool, keys that each query sees
    returns  [B T H U]    in the format of `q`; softmax in fp32 at least
    Source:  DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.
    Cost:    2·B·T·S·H·(2 R + P) FLOPs, and B·T·S·H scores at once.
    """
    rotated = cache.shape[-1] - up.shape[0]
    nope = q.shape[-1] - rotated
    up_key, up_value = up.split((nope, up.shape[-1] - nope), dim=-1)
    q_nope, q_rope = q.split((nope, rotated), dim=-1)
    # products by hand: of one new token, einsum takes longer to find them than they take
    by_head = q_nope.flatten(0, 1).transpose(0, 1) @ up_key.permute(1, 2, 0)
    query = torch.cat((by_head.transpose(0, 1).unflatten(0, q.shape[:2]), q_rope), dim=-1)
    score = (query.flatten(1, 2) @ cache.mT).unflatten(1, q.shape[1:3])
    score = (upcast(score) * scale).masked_fill(~visible[:, :, None], -torch.inf)
    o = score.softmax(dim=-1).to(q.dtype).flatten(1, 2) @ cache[..., : up.shape[0]]
    by_head = o.reshape(-1, q.shape[2], up.shape[0]).transpose(0, 1) @ up_value.transpose(0, 1)
    return by_head.transpose(0, 1).unflatten(0, q.shape[:2])


def rotate_mla(q: Tensor, k_rope: Tensor, rope: Rope, positions: Tensor | tuple[()] = ()) -> tuple[Tensor, Tensor]:
    """Query and shared key with their position in the channels meant for it.

    q          [B T H C]   the last P channels are to be rotated
    k_rope     [B T P]
    positions  [B T]       of each token, within the table; (): 0..T-1
    returns    q [B T H C], k_rope [B T P]
    """
    nope = q.shape[-1] - k_rope.shape[-1]
    q_nope, q_rope = q.split((nope, k_rope.shape[-1]), dim=-1)
    turned = rotate(torch.cat((q_rope, k_rope[:, :, None]), dim=2), rope, positions)  # of one token, calls are the cost
    return torch.cat((q_nope, turned[:, :, :-1]), dim=-1), turned[:, :, -1]


def project(
    x: Tensor, down: Tensor, rope: Rope, positions: Tensor | tuple[()] = (), *, num_heads: int, latent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, latent and shared key in one product; queries and key with their position.

    The product is the op's own memory: a kernel rotates in it, and the arguments stay as they are.

    x          [B T D]
    down       [D A]     A = H·C of the query, `latent` channels, P of the shared key
    positions  [B T]     as in `rotate_mla`
    returns    q [B T H C], latent [B T R], k_rope [B T P]
    """
    rotated = 2 * rope.cos.shape[-1]
    widths = (down.shape[1] - latent - rotated, latent, rotated)
    query, low, key = (x @ down).split(widths, dim=-1)
    q, k_rope = rotate_mla(query.unflatten(-1, (num_heads, -1)), key, rope, positions)
    return q, low, k_rope


def query(x: Tensor, up: Tensor, key: Tensor, rope: Rope, positions: Tensor | tuple[()] = ()) -> tuple[Tensor, Tensor]:
    """Queries from their normed latent, and the shared key, both with their position.

    The product is the op's own memory, as in `project`.

    x          [B T Q]
    up         [Q H C]
    key        [B T P]
    positions  [B T]     as in `rotate_mla`
    returns    q [B T H C], k_rope [B T P]
    """
    return rotate_mla((x @ up.flatten(1)).unflatten(-1, up.shape[1:]), key, rope, positions)


OF_THE_QUERIES = "pass those of the tokens of the queries"


def attend_mla(q: Tensor, kv: Tensor, k_rope: Tensor, start: Tensor | tuple[()] = (), *, scale: float) -> Tensor:
    """Causal softmax attention; a head's key is its own part of `kv` beside the shared `k_rope`.

    q        [B T H C]         the last P channels are rotated
    kv       [B T H Z]         C - P channels of key, then U of value
    k_rope   [B T P]           rotated key, shared by all heads
    start    [B T] i32 or ()   query i sees the keys start[i]..i; (): the keys up to i
    returns  [B T H U]
    Raises:  ValueError for keys or values of other tokens or heads than the queries.
    Cost:    2·B·T²·H·(C + U) FLOPs as executed, half of them above the diagonal.
    """
    tokens, heads = q.shape[:2], q.shape[2]
    expect_shape("attend_mla: expected kv", kv.shape, (*q.shape[:3], kv.shape[-1]), OF_THE_QUERIES)
    expect_shape("attend_mla: expected k_rope", k_rope.shape, (*tokens, k_rope.shape[-1]), OF_THE_QUERIES)
    if isinstance(start, Tensor):
        expect_shape("attend_mla: expected start", start.shape, tokens, OF_THE_QUERIES)
    nope = q.shape[-1] - k_rope.shape[-1]
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
    q, k, v = (heads_first.transpose(1, 2) for heads_first in (q, k, v))
    if isinstance(start, Tensor):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(start)[:, None], scale=scale)
    else:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2)


def visible(start: Tensor) -> Tensor:
    """Which keys each query sees: [B T T] bool, queries before keys, from `start` [B T]."""
    position = torch.arange(start.shape[1], device=start.device)
    return (start[:, :, None] <= position) & (position <= position[:, None])


REFERENCE = MlaOps(project, query, attend_mla, attend_new)


def tables(c: sections.Mla, num_positions: int) -> Rope:
    """The rotation table of the rotated channels; without position every angle is 0."""
    if c.position == "none":
        still = torch.zeros(num_positions, c.qk_rope_head_dim // 2)
        return Rope(still + 1, still)
    return table(num_positions, c.qk_rope_head_dim, theta=c.rope_theta, yarn=c.yarn)


def flops(c: sections.Mla, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of scores and weighted values, a token of one layer: 2·(C + U) a head and visible key."""
    doubled_keys = sequence_length + 1 if causal else 2 * sequence_length
    return doubled_keys * c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)


def kept_bytes(c: sections.Mla, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities
    """
    upcast, sizes = 4, dims(c)
    low = sizes.get("Q", 0) + sizes["R"]
    return (
        hidden * element  # input of `down`
        + 2 * low * upcast  # the latents' norms: input in fp32, scaled input
        + low * element
        + sizes["H"] * (2 * sizes["C"] + sizes["U"]) * element  # q, k, v
        + sizes["H"] * sizes["U"] * element * 2  # output, and its copy for `out`
        + (sizes["H"] * sequence_length * element if square else sizes["H"] * upcast)
    )


def kernel_kept_bytes(c: sections.Mla) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16, and those of the norms that recompute makes again."""
    upcast, element, sizes = 4, 2, dims(c)
    kept = sizes["A"] + sizes["R"] + 2 * sizes["P"] + sizes["H"] * (sizes["C"] + sizes["Z"] + sizes["U"])
    return kept * element + sizes["H"] * upcast, (sizes.get("Q", 0) + sizes["R"]) * element


HF_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "num_attention_heads": "num_heads",
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_nope_head_dim",
        "qk_rope_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
    }
)
"""Key of `transformers.DeepseekV3Config` -> field of the section."""

HF_YARN: Mapping[str, str] = MappingProxyType(
    {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
)
"""Key of their `rope_scaling` -> field of Yarn."""


def hf_settings(c: sections.Mla) -> dict[str, Any]:
    """Keys of `transformers.DeepseekV3Config` that describe this attention, as DeepSeek publishes them."""
    return {
        **{theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()},
        "num_key_value_heads": c.num_heads,
        **HF_FIXED,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,
        "rope_scaling": hf_rotation.scaling(c.yarn, HF_YARN),
    }


HF_FIXED: Mapping[str, Any] = MappingProxyType({"attention_bias": False, "rope_interleave": True})
"""Keys of theirs of which there is one value here."""

HF_OTHERS = ("num_key_value_heads", "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters")
"""Keys of theirs that `hf_section` reads besides HF_KEYS and HF_FIXED; dropout is for their training."""


def hf_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The table of this section in a `config.json`, values unchecked, and what this attention cannot express."""
    problems = [f"{key}: expected a value, got nothing; write it" for key in HF_KEYS if key not in config]
    problems += [
        f"{key}: expected {json.dumps(value)}, got {json.dumps(config[key])}; nmoe has no other"
        for key, value in HF_FIXED.items()
        if config.get(key, value) is not value
    ]
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", heads) != heads:
        problems.append(
            f"num_key_value_heads: expected num_attention_heads = {json.dumps(heads)}, got "
            f"{json.dumps(config['num_key_value_heads'])}; latent attention has keys for every head"
        )
    tables = {ours: config.get(theirs) for theirs, ours in HF_KEYS.items() if config.get(theirs) is not None}
    rotation, wrong = hf_rotation.read(config, HF_YARN)
    return tables | rotation, problems + wrong


def hf_leaves(c: sections.Mla) -> dict[str, Leaf]:
    """What each parameter is in `transformers`; `down` holds the query's part and the part of keys and values."""
    channels = c.qk_nope_head_dim + c.qk_rope_head_dim
    keys = {"kv_a_proj_with_mqa.weight": c.kv_lora_rank + c.qk_rope_head_dim}
    if c.q_lora_rank is None:
        queries = {"down": columns({"q_proj.weight": c.num_heads * channels} | keys)}
    else:
        queries = {
            "down": columns({"q_a_proj.weight": c.q_lora_rank} | keys),
            "query.norm": same("q_a_layernorm.weight"),
            "query.up": matrix("q_b_proj.weight", outs=(c.num_heads, channels)),
        }
    return {
        **queries,
        "norm": same("kv_a_layernorm.weight"),
        "up": matrix("kv_b_proj.weight", outs=(c.num_heads, c.qk_nope_head_dim + c.v_head_dim)),
        "out": matrix("o_proj.weight", ins=(c.num_heads, c.v_head_dim)),
    }
