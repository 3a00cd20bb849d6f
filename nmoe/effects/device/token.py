"""One token of one row: `decode.extend` by kernels made for a single row, each begun while the one before it runs."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from nmoe.config import sections
from nmoe.effects.kernels import row
from nmoe.effects.kernels.attention import mla_single
from nmoe.effects.kernels.moe import single
from nmoe.pure.model.attention.mla import scale
from nmoe.pure.model.decode import Decoding
from nmoe.pure.model.model import Dense, Moe, Shared, Transformer
from nmoe.pure.model.ops import Env


def fits(c: sections.Model) -> bool:
    """Whether these kernels know the model: latent attention, experts without biases, groups or a clamp."""
    return isinstance(c.attention, sections.Mla) and c.moe.plain() and c.moe.num_groups == 1


def extend_(
    p: Transformer, tokens: Tensor, state: Decoding, bias: Tensor, env: Env, c: sections.Model
) -> tuple[Tensor, Decoding]:
    """`decode.extend` of one token of one row, which writes into the caches of `state`.

    tokens   [1 1] i64; one below 0 is read as 0
    Writes:  the caches of `state`.
    Raises:  ValueError for more tokens than there is room for.
    """
    if state.length >= state.room:
        raise ValueError(
            f"decode: expected at most the {state.room} tokens there is room for, got {state.length + 1}; end before"
        )
    attention: Any = c.attention
    choice = single.Choice(
        top_k=c.moe.top_k, scale=c.moe.route_scale, normalize=c.moe.normalize, softmax=c.moe.score == "softmax"
    )
    x, added = row.embedding(tokens.flatten(), p.embed, c.embedding_scale), None
    for layer, (block, cache) in enumerate(zip(p.blocks, state.caches, strict=True)):
        ffn = block.ffn
        plain = ffn.shared if isinstance(ffn, Moe) else ffn
        later = (plain.up, plain.down) if isinstance(plain, Shared | Dense) else None
        x, o = mla_single.attend_(
            *(block.attention, x, added, block.attention_norm, cache, state.place, state.padding, env.tables),
            None if later is None else later[0],
            eps=c.norm_eps,
            scale=scale(attention),
        )
        if isinstance(ffn, Moe):
            x, y, logits = row.route(x, o, block.ffn_norm, ffn.router)
            own = bias[layer - c.num_dense_layers]
            added = single.experts(y, logits, own, (ffn.up, ffn.down), later, choice, c.norm_eps)
        else:
            x, y = row.scale(x, o, block.ffn_norm)
            added = single.mlp(y, ffn.up, ffn.down, c.norm_eps)
    hidden = row.norm(x, added, p.norm, c.norm_eps)
    after = attrs.evolve(state, place=state.place + 1, length=state.length + 1)
    return hidden[None, None], after
