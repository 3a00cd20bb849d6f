"""Generation: the network on new tokens, with caches of the earlier ones, and which token comes next.

B sequences · T new tokens · S earlier ones · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core.tree import record
from nmoe.pure.model.attention import Cache
from nmoe.pure.model.attention.cached import new_tokens, stored
from nmoe.pure.model.model import Transformer, at_layer, feed_forward, moe_output
from nmoe.pure.model.norm import upcast
from nmoe.pure.model.ops import Env


@record
class Decoding:
    """Where the generation of a batch stands."""

    caches: tuple[Any, ...]  # one a layer
    padding: Tensor  # [B] i32, tokens in front of each row that count for nothing
    place: Tensor  # 0-d i64, tokens seen, padding included
    length: int  # the same, known to the host
    room: int  # tokens that the caches have room for


def begin(p: Transformer, padding: Tensor, num_tokens: int, env: Env, c: sections.Model) -> Decoding:
    """The state before the first token.

    padding     [B] i32
    num_tokens  that there will be at most, padding included
    Raises:     ValueError for a kind of attention without a cache, or more tokens than the model has positions.
    """
    if num_tokens > c.max_positions:
        raise ValueError(
            f"decode: expected at most the {c.max_positions} positions of the model, got {num_tokens}; end before"
        )
    cache, layers = _cache(env), range(c.num_layers)
    caches = (cache.empty(at_layer(c, env, layer).attention, len(padding), num_tokens, p.embed) for layer in layers)
    place = torch.zeros((), dtype=torch.int64, device=padding.device)
    return Decoding(tuple(caches), padding, place, 0, num_tokens)


def extend(
    p: Transformer,
    tokens: Tensor,
    state: Decoding,
    bias: Tensor,
    env: Env,
    c: sections.Model,
    *,
    whole: bool = False,
    store: Callable[[Tensor, Tensor, Tensor], Tensor] = stored,
) -> tuple[Tensor, Decoding]:
    """`model.forward` of the next tokens of each row, from the caches of the earlier ones.

    tokens   [B T] i64
    bias     [L E] f32
    whole    read the caches to their end, in the place of the tokens that there are: then no shape depends on how many
             there are, and one step can be recorded for all
    store    `stored`, or what writes the rows of new tokens into the caches: `state` has no use then
    returns  the last hidden state [B T D], normed, and the state after these tokens
    Raises:  ValueError for more tokens than there is room for.
    """
    total = state.length + tokens.shape[1]
    if total > state.room:
        raise ValueError(f"decode: expected at most the {state.room} tokens there is room for, got {total}; end before")
    cache, ops = _cache(env), env.ops
    batch, size = tokens.shape
    new = new_tokens(state.place, (batch, size), state.padding, state.room if whole else total, store)
    x = F.embedding(tokens, p.embed) * c.embedding_scale
    caches, y = list[Any](), torch.zeros_like(x)
    for layer, (block, before) in enumerate(zip(p.blocks, state.caches, strict=True)):
        here, row = at_layer(c, env, layer), layer - c.num_dense_layers
        x, y = ops.add_norm(x, y, block.attention_norm, eps=c.norm_eps)
        y, after = cache.extend(
            *(block.attention, y, before, new, env.tables, ops.norm, ops.attention, here.attention),
            eps=c.norm_eps,
        )
        x, y, _ = feed_forward(block, x, y, bias[row] if row >= 0 else (), env, here, mix=moe_output)
        caches.append(after)
    after = attrs.evolve(state, caches=tuple(caches), place=state.place + size, length=total)
    return ops.add_norm(x, y, p.norm, eps=c.norm_eps)[1], after


def _cache(env: Env) -> Cache:
    if env.kind.cache is None:
        raise ValueError(
            "decode: expected a kind of attention with a cache, got one without; give its Kind a Cache, or run the "
            "whole text again for each token"
        )
    return env.kind.cache


@attrs.frozen(kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # divisor of the logits; 0: the most likely token
    top_k: int | None = None  # tokens among which is drawn, the most likely ones; None: all
    top_p: float = 1.0  # of those, the fewest most likely ones that have at least this much of the probability


def pick(logits: Tensor, draw: Tensor, how: Sampling) -> Tensor:
    """The next token of each row; -1 where a logit is not finite.

    logits   [B V]
    draw     [B] f32   in [0, 1), uniform
    returns  [B] i64
    Source:  nucleus sampling, Holtzman et al. (arXiv:1904.09751), section 3.1.
    """
    finite = (logits * 0).sum(dim=-1) == 0  # 0 unless one is infinite or NaN; two passes, `isfinite` takes five
    return torch.where(finite, _pick(upcast(logits), draw, how), -1)


def _pick(logits: Tensor, draw: Tensor, how: Sampling) -> Tensor:
    if how.temperature == 0:
        return logits.argmax(dim=-1)
    score = logits / how.temperature
    token = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    if how.top_k is not None or how.top_p < 1:
        score, token = score.topk(min(how.top_k or score.shape[-1], score.shape[-1]), dim=-1)
    probability = score.softmax(dim=-1).double()
    if how.top_p < 1:
        before = probability.cumsum(dim=-1) - probability
        probability = torch.where(before < how.top_p, probability, 0)
    # the first token whose sum lies above the draw: none of probability 0, as fp32 draws are below 1 by 2^-24
    total = probability.cumsum(dim=-1)
    place = (total <= draw[:, None] * total[:, -1:]).sum(dim=-1)
    return token.gather(-1, place[:, None])[:, 0]
