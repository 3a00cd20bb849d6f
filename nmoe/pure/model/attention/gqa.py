"""Grouped-query attention: several query heads share one head of keys and values; optional window and sinks.

B sequences · T tokens · D width · H query heads · K heads of keys and values · G = H / K query heads a group
J = H + 2 K heads of the fused projection · C channels a head · W window
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.init import normal, residual, zeros
from nmoe.pure.core.shape import expect_shape
from nmoe.pure.core.spec import Role, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model.attention import hf_rotation
from nmoe.pure.model.attention.cached import New, visible_last
from nmoe.pure.model.hf_leaf import Leaf, beside, matrix, ordered, same, shaped
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.rope import Documents, Rope, magnitude, rotate, table

QUERIES = 128
"""Queries whose scores exist at once; of those scores, a window of 128 lets half through."""


@record
class Gqa:
    """Attention of one block.

    `qkv` makes, in one product, [queries | keys | values]. `sinks` has a logit a query head, or is () without sinks;
    the biases of both products are () without them.
    """

    qkv: Tensor = param("D (H+K+K C)", Role.MATRIX, normal("D"))
    sinks: Tensor | tuple[()] = param("H", Role.GAIN, zeros)
    out: Tensor = param("(H C) D", Role.MATRIX, residual("H", "C"))
    qkv_bias: Tensor | tuple[()] = param("H+K+K C", Role.BIAS, zeros)
    out_bias: Tensor | tuple[()] = param("D", Role.BIAS, zeros)

    def result(self, o: Tensor) -> Tensor:
        """What the heads' outputs [B T H C] add to the residual stream."""
        y = o.flatten(-2) @ self.out.flatten(0, 1)
        return y + self.out_bias if isinstance(self.out_bias, Tensor) else y


def specs(c: sections.Gqa) -> Gqa:
    """Specs of one block's attention."""
    absent = (*(() if c.sinks else ("sinks",)), *(() if c.biases else ("qkv_bias", "out_bias")))
    return spec_tree(Gqa, **dict.fromkeys(absent, ()))


def dims(c: sections.Gqa) -> dict[str, int]:
    """Sizes of the axes that only attention has: H, K and C."""
    return {"H": c.num_heads, "K": c.num_kv_heads, "C": c.head_dim}


def at_layer(c: sections.Gqa, layer: int) -> sections.Gqa:
    """The section of one layer, counted from 0: every `global_every`-th has no window."""
    if c.global_every is None or (layer + 1) % c.global_every:
        return c
    return attrs.evolve(c, window=None)


def scale(c: sections.Gqa) -> float:
    """Factor on the attention scores; YaRN sharpens them by its magnitude squared, as in `mla.scale`."""
    sharpen = 1.0 if c.yarn is None else magnitude(c.yarn.factor, c.yarn.mscale_all_dim) ** 2
    return sharpen * c.head_dim**-0.5


@record
class GqaOps:
    """What a device implements of grouped-query attention; a field has the signature of its reference."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., Tensor]


def gqa(
    p: Gqa,
    x: Tensor,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: GqaOps,
    c: sections.Gqa,
    documents: Documents | tuple[()] = (),
    *,
    eps: float,
) -> Tensor:
    """Causal grouped-query attention of each sequence, or each of its documents, over itself.

    x          [B T D]   normed block input
    c          section of this layer, as `at_layer` has it
    documents  which positions each token may see; (): rows are whole
    returns    [B T D]
    Source:    gpt-oss (arXiv:2508.10925), section 2; sinks as in its reference implementation.
    """
    start, position = (documents.start, documents.position) if isinstance(documents, Documents) else ((), ())
    q, k, v = ops.project(x, p.qkv, rope, position, num_heads=c.num_heads, bias=p.qkv_bias)
    o = ops.attend(q, k, v, p.sinks, start, scale=scale(c), window=c.window)
    return p.result(o)


@record
class KvCache:
    """Keys and values that later tokens see: of all tokens of a row at their places, or of the last ones.

    Of the last ones the newest is the last row; where there were fewer, the first rows belong to no token.
    """

    k: Tensor  # [B N K C], rotated
    v: Tensor  # [B N K C]

    def with_rows(self, k: Tensor, v: Tensor, place: Tensor, new: New) -> KvCache:
        """With those of some tokens at their places."""
        return KvCache(new.store(self.k, k, place), new.store(self.v, v, place))

    def joined(self, k: Tensor, v: Tensor) -> KvCache:
        """With those of further tokens behind."""
        return KvCache(torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1))

    def first(self, count: int) -> KvCache:
        """The first `count` rows."""
        return KvCache(self.k[:, :count], self.v[:, :count])

    def without(self, count: int) -> KvCache:
        """All but the first `count` rows."""
        return KvCache(self.k[:, count:], self.v[:, count:])


def empty_cache(c: sections.Gqa, num_sequences: int, num_tokens: int, like: Tensor) -> KvCache:
    """The cache before the first token, in the format of `like`; of a window of W, for the last W - 1 tokens."""
    rows = num_tokens if c.window is None else min(c.window - 1, num_tokens)
    shape = (num_sequences, rows, c.num_kv_heads, c.head_dim)
    return KvCache(like.new_zeros(shape), like.new_zeros(shape))


def extend(
    p: Gqa,
    x: Tensor,
    cache: KvCache,
    new: New,
    rope: Rope,
    norm: Callable[..., Tensor],
    ops: GqaOps,
    c: sections.Gqa,
    *,
    eps: float,
) -> tuple[Tensor, KvCache]:
    """`gqa` of new tokens that also see those in the cache.

    x        [B T D]   normed block input of the new tokens
    returns  [B T D], and the cache with the new tokens, no longer than a window needs
    """
    q, k, v = ops.project(x, p.qkv, rope, new.documents.position, num_heads=c.num_heads, bias=p.qkv_bias)
    if c.window is None:
        cache = cache.with_rows(k, v, new.place, new)
        read, visible = cache.first(new.reach()), new.visible
    else:
        read = cache.joined(k, v)
        cache = read.without(x.shape[1])
        visible = visible_last(new.documents, read.k.shape[1], c.window)
    o = attend_cached(q, read.k, read.v, p.sinks, visible, scale=scale(c))
    return p.result(o), cache


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | tuple[()], visible: Tensor, *, scale: float
) -> Tensor:
    """Softmax attention of some queries over the keys that each sees, with a sink in the denominator.

    q        [B T H C]    query head h reads the keys h // G
    k, v     [B S K C]
    sinks    [H] or ()
    visible  [B T S]      bool
    returns  [B T H C]    in the format of `v`; softmax in fp32 at least
    """
    score = upcast(torch.einsum("btkgc,bskc->bktgs", (q * scale).unflatten(2, (k.shape[2], -1)), k))
    score = score.masked_fill(~visible[:, None, :, None], -torch.inf)
    return torch.einsum("bktgs,bskc->btkgc", _softmax(score, sinks).to(v.dtype), v).flatten(2, 3)


def project(
    x: Tensor,
    qkv: Tensor,
    rope: Rope,
    positions: Tensor | tuple[()] = (),
    *,
    num_heads: int,
    bias: Tensor | tuple[()] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in one product; queries and keys with their position.

    x          [B T D]
    qkv        [D J C]
    positions  [B T]     of each token, within the table; (): 0..T-1
    bias       [J C] or ()
    returns    q [B T H C], k [B T K C], v [B T K C]
    """
    groups = (qkv.shape[1] - num_heads) // 2
    heads = (x @ qkv.flatten(1)).unflatten(-1, qkv.shape[1:])
    heads = heads + bias if isinstance(bias, Tensor) else heads
    q, k, v = heads.split((num_heads, groups, groups), dim=2)
    return rotate(q, rope, positions), rotate(k, rope, positions), v


def attend_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | tuple[()] = (),
    start: Tensor | tuple[()] = (),
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal softmax attention over the last `window` keys, with a sink in the denominator.

    One block of queries at a time, against the keys that any of them sees: with a window, the scores that exist and
    the probabilities that autograd keeps grow linearly with T. Keys and values are never repeated for their group.

    q        [B T H C]         query head h reads the keys h // G
    k, v     [B T K C]
    sinks    [H] or ()         logits of a key without a value; (): a plain softmax
    start    [B T] i32 or ()   query i sees no key before start[i]; (): all keys up to i
    window   keys a query sees, its own included; None: all
    returns  [B T H C]         in the format of `v`; softmax in fp32 at least
    Raises:  ValueError for keys or values of other tokens or channels than the queries.
    Cost:    4·B·H·C FLOPs a pair of query and key that `_blocks` has.
    """
    tokens, groups, remedy = q.shape[:2], k.shape[2], "pass those of the tokens of the queries"
    expect_shape("attend_gqa: expected k", k.shape, (*tokens, groups, q.shape[-1]), remedy)
    expect_shape("attend_gqa: expected v", v.shape, (*tokens, groups, v.shape[-1]), remedy)
    if isinstance(start, Tensor):
        expect_shape("attend_gqa: expected start", start.shape, tokens, remedy)
    # heads before tokens, once: every block below is then a view that a batched GEMM takes as it is
    q = (q * scale).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    blocks: list[Tensor] = []
    for first, begin, end in _blocks(q.shape[2], window):
        part = q[:, :, begin:end]
        score = upcast(part.flatten(2, 3) @ k[:, :, first:end].mT).unflatten(2, part.shape[2:4])
        score = score.masked_fill(~_visible(first, begin, end, start, window, q.device), -torch.inf)
        probability = _softmax(score, sinks).to(v.dtype).flatten(2, 3)
        blocks.append((probability @ v[:, :, first:end]).unflatten(2, part.shape[2:4]))
    return torch.cat(blocks, dim=2).transpose(1, 2).flatten(2, 3)


def _softmax(score: Tensor, sinks: Tensor | tuple[()]) -> Tensor:
    """Probabilities of the keys in `score` [B K t G s]; with sinks [H] they sum to less than one."""
    if not isinstance(sinks, Tensor):
        return score.softmax(dim=-1)
    logits = upcast(sinks).view(score.shape[1], 1, score.shape[3], 1).expand(*score.shape[:-1], 1)
    return torch.cat((score, logits), dim=-1).softmax(dim=-1)[..., :-1]


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """The first key, the first query and the end of both of each block of queries."""
    for begin in range(0, length, QUERIES):
        yield (0 if window is None else max(0, begin + 1 - window), begin, min(begin + QUERIES, length))


def _visible(
    first: int, begin: int, end: int, start: Tensor | tuple[()], window: int | None, device: torch.device
) -> Tensor:
    """Which of the keys first..end-1 the queries begin..end-1 see: bool, broadcasts with [B K t G s]."""
    query = torch.arange(begin, end, device=device)[:, None]
    key = torch.arange(first, end, device=device)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if isinstance(start, Tensor):
        visible = visible & (key >= start[:, None, begin:end, None])
    return visible.unsqueeze(-2)


REFERENCE = GqaOps(project, attend_gqa)


def tables(c: sections.Gqa, num_positions: int) -> Rope:
    """The rotation table; every channel of a query and key is rotated."""
    return table(num_positions, c.head_dim, theta=c.rope_theta, yarn=c.yarn)


def attended(length: int, window: int | None) -> int:
    """Pairs of query and key of one sequence and head that the mask lets through."""
    span = length if window is None else min(window, length)
    return span * (span + 1) // 2 + (length - span) * span


def executed(length: int, window: int | None) -> int:
    """Pairs of query and key of one sequence and head whose score `attend_gqa` computes."""
    return sum((end - begin) * (end - first) for first, begin, end in _blocks(length, window))


def flops(c: sections.Gqa, *, sequence_length: int, causal: bool) -> int:
    """FLOPs of scores and weighted values, a token of one layer: 4·C a head and key, rounded down.

    causal  count the attended pairs only; False: those that the reference computes
    """
    pairs = (attended if causal else executed)(sequence_length, c.window)
    return 4 * c.num_heads * c.head_dim * pairs // sequence_length


def kept_bytes(c: sections.Gqa, *, hidden: int, sequence_length: int, element: int, square: bool) -> int:
    """Bytes a token that autograd keeps of the reference in one layer, its norm apart.

    element  bytes of an activation
    square   whether attention keeps its probabilities
    """
    fp32 = 4
    kept = hidden + (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim  # input of `qkv`, q, k, v, input of `out`
    # the softmax keeps its result in fp32; a narrower product of probabilities and values keeps its own
    a_pair = fp32 + (element if element < fp32 else 0)
    pairs = executed(sequence_length, c.window) if square else 0
    return kept * element + c.num_heads * pairs * a_pair // sequence_length


def kernel_kept_bytes(c: sections.Gqa) -> tuple[int, int]:
    """Bytes a token that the kernels keep in one layer, bf16, and those of norms that recompute makes again: none.

    The fused projection, the output, and in fp32 the log-sum-exp of each query head.
    """
    upcast, element, sizes = 4, 2, dims(c)
    return 2 * (sizes["H"] + sizes["K"]) * sizes["C"] * element + sizes["H"] * upcast, 0


HF_KEYS: Mapping[str, str] = MappingProxyType(
    {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
)
"""Key of `transformers.GptOssConfig` -> field of the section."""

HF_YARN: Mapping[str, str] = MappingProxyType(
    {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    }
)
"""Key of their `rope_scaling` -> field of Yarn; their magnitude is that of coefficients of 1."""

HF_OTHERS = (
    *("attention_bias", "attention_dropout", "sliding_window", "layer_types", "num_hidden_layers"),
    *("rope_theta", "rope_scaling", "rope_parameters", "initial_context_length"),
)
"""Keys of theirs that `hf_section` reads besides HF_KEYS; dropout is for their training."""

HF_WINDOW = 128
"""Theirs where the key is absent."""

HF_LAYERS = ("sliding_attention", "full_attention")


def hf_settings(c: sections.Gqa) -> dict[str, Any]:
    """Keys of `transformers.GptOssConfig` that describe this attention, `layer_types` apart.

    The rotation is there twice: transformers 5 takes its default, YaRN, where `rope_parameters` is absent, and older
    readers know `rope_scaling`.
    """
    scaling = hf_rotation.scaling(c.yarn, HF_YARN) or {}
    kind = scaling.pop("type", "default")
    return {
        **{theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()},
        "attention_bias": c.biases,
        "attention_dropout": 0.0,
        "sliding_window": c.window or HF_WINDOW,  # they want one where no layer has it, too
        "rope_theta": c.rope_theta,
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": kind, **scaling},
    }


def hf_layers(c: sections.Gqa, num_layers: int) -> list[str]:
    """Their `layer_types`."""
    return [HF_LAYERS[at_layer(c, layer).window is None] for layer in range(num_layers)]


def hf_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The table of this section in a `config.json`, values unchecked, and what this attention cannot express."""
    problems = [f"{key}: expected a value, got nothing; write it" for key in HF_KEYS if key not in config]
    tables = {ours: config.get(theirs) for theirs, ours in HF_KEYS.items() if config.get(theirs) is not None}
    rotation, wrong = hf_rotation.read(config, HF_YARN)
    tables |= rotation | {"sinks": True, "biases": config.get("attention_bias", True)}
    problems += wrong
    layers: Any = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return tables, problems
    kinds: Any = config.get("layer_types") or [HF_LAYERS[layer % 2] for layer in range(layers)]
    full = [at for at, kind in enumerate(kinds, 1) if kind == HF_LAYERS[1]] if isinstance(kinds, list) else []
    every = full[0] if full else layers + 1
    if kinds != [HF_LAYERS[not at % every] for at in range(1, layers + 1)]:
        problems.append(
            f"layer_types: expected {HF_LAYERS[0]}, and {HF_LAYERS[1]} in every so many-th of {layers} layers, got "
            f"{json.dumps(kinds)}; nmoe has no other order"
        )
    elif every > 1:
        tables["window"] = config.get("sliding_window", HF_WINDOW)
        if every <= layers:
            tables["global_every"] = every
    return tables, problems


def hf_leaves(c: sections.Gqa) -> dict[str, Leaf]:
    """What each parameter is in `transformers`.

    It rotates channel i with channel i + C/2, we rotate neighbours: of queries and keys even channels come first.
    """
    channels = list(range(c.head_dim))
    order = (*channels[::2], *channels[1::2])
    heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}

    def rotated(leaf: Leaf, name: str, axis: int) -> Leaf:
        return leaf if name == "v_proj" else ordered(leaf, order, axis)

    def bias(name: str, size: int) -> Leaf:
        return shaped(same("bias"), (size * c.head_dim,), (size, c.head_dim)).under(f"{name}.")

    matrices = [rotated(matrix(f"{name}.weight", outs=(size, -1)), name, 2) for name, size in heads.items()]
    biases = [rotated(bias(name, size), name, 1) for name, size in heads.items()]
    added = {"qkv_bias": beside(biases, tuple(heads.values()), 0), "out_bias": same("o_proj.bias")}
    return {
        "qkv": beside(matrices, tuple(heads.values()), 1),
        **({"sinks": same("sinks")} if c.sinks else {}),
        "out": matrix("o_proj.weight", ins=(c.num_heads, c.head_dim)),
        **(added if c.biases else {}),
    }
