"""Tiny models for the tests."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import Role
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS
from nmoe.pure.model.ops import Env, Ops, environment, reference

REFERENCE: Ops = reference(KINDS[sections.Mla])


def attention(**changes: Any) -> sections.Mla:
    """Three heads, all sizes different."""
    c = sections.Mla(num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    return attrs.evolve(c, **changes)


def nsa(**changes: Any) -> sections.Nsa:
    """Four query heads in two groups; blocks of four tokens."""
    c = sections.Nsa(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        v_head_dim=6,
        compressed_block=4,
        compressed_stride=2,
        selected_block=4,
        num_selected=3,
        window=5,
    )
    return attrs.evolve(c, **changes)


def dsa(**changes: Any) -> sections.Dsa:
    """Three heads and two of the indexer, all sizes different; a query reads four keys."""
    c = sections.Dsa(
        num_heads=3,
        q_lora_rank=7,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        index_num_heads=2,
        index_head_dim=6,
        index_top_k=4,
    )
    return attrs.evolve(c, **changes)


def mixture(**changes: Any) -> sections.Moe:
    """Eight experts, three a token."""
    c = sections.Moe(num_experts=8, top_k=3, num_shared_experts=1, intermediate_size=9, route_scale=2.5)
    return attrs.evolve(c, **changes)


def config(**changes: Any) -> sections.Model:
    """One dense layer and two mixtures."""
    c = sections.Model(
        vocab_size=37,
        hidden_size=16,
        num_layers=3,
        num_dense_layers=1,
        intermediate_size=20,
        max_positions=64,
        attention=attention(),
        moe=mixture(),
    )
    return attrs.evolve(c, **changes)


# Of four frequencies the fastest is kept, the slowest divided, and two lie on the ramp between
YARN = sections.Yarn(factor=8.0, original_positions=64, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
DEEPSEEK = MappingProxyType(
    {
        "plain": config(),
        "query latent, no dense layer": config(num_dense_layers=0, attention=attention(q_lora_rank=7)),
        "groups, two dense layers": config(
            num_layers=4, num_dense_layers=2, moe=mixture(num_groups=4, top_k_groups=2, top_k=4)
        ),
        "yarn": config(
            max_positions=512, attention=attention(yarn=YARN, v_head_dim=8, qk_rope_head_dim=8, rope_theta=100.0)
        ),
        "one expert a token": config(moe=mixture(top_k=1, normalize=False, route_scale=1.7)),
        "no shared expert": config(moe=mixture(num_shared_experts=0)),
    }
)
"""Models that nmoe and transformers' DeepSeek-V3 both have, a feature each."""

SOFTMAX = MappingProxyType(
    {
        "softmax": config(
            hidden_size=18, moe=mixture(score="softmax", normalize=False, num_shared_experts=2, route_scale=1.0)
        ),
        "softmax, groups, query latent": config(
            hidden_size=18,
            attention=attention(q_lora_rank=7),
            moe=mixture(score="softmax", normalize=False, num_groups=4, top_k_groups=2, route_scale=16.0),
        ),
        "softmax, yarn": config(
            hidden_size=18,
            max_positions=512,
            attention=attention(yarn=attrs.evolve(YARN, mscale=0.707, mscale_all_dim=0.707), rope_theta=100.0),
            moe=mixture(score="softmax", normalize=False),
        ),
    }
)
"""Models that nmoe and transformers' DeepSeek-V2 both have; heads divide its width, and the first is like V2-Lite."""

CLAMPED = config(
    num_layers=4,
    num_dense_layers=0,
    intermediate_size=9,
    attention=sections.Gqa(num_heads=4, num_kv_heads=2, head_dim=6, window=5, global_every=2, sinks=True, biases=True),
    moe=mixture(
        **{"num_shared_experts": 0, "route_scale": 1.0, "score": "softmax"},
        # lower than the published 7: a tenth of the gates and values of these models lies beyond
        **{"biases": True, "swiglu_limit": 0.6, "swiglu_alpha": 1.702},
    ),
)
GPT_OSS = MappingProxyType(
    {
        "gpt-oss": CLAMPED,
        "gpt-oss, yarn, no window, no biases of attention": attrs.evolve(
            CLAMPED,
            max_positions=512,
            attention=attrs.evolve(
                CLAMPED.attention,
                **{"window": None, "global_every": None, "biases": False},
                yarn=attrs.evolve(YARN, mscale=1.0, mscale_all_dim=1.0, truncate=False),
            ),
        ),
        "gpt-oss, a window in every layer": attrs.evolve(
            CLAMPED, attention=attrs.evolve(CLAMPED.attention, global_every=None, num_kv_heads=1)
        ),
    }
)
"""Models that nmoe and transformers' gpt-oss both have."""


def parameters(c: sections.Model, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> model.Transformer:
    """Leaves that require gradients; gains are uneven, so that a forgotten or misplaced one shows."""
    specs, dims = model.specs(c), model.dims(c)
    values = init(Key(seed).fold("init"), specs, dims)

    def leaf(path: str, value: Tensor, spec: Any) -> Tensor:
        if spec.role in (Role.GAIN, Role.BIAS):
            noise = torch.randn(value.shape, generator=Key(seed).fold("gain", path).generator())
            value = value + 0.3 * noise
        return value.to(dtype).requires_grad_()

    return tree.map(leaf, values, specs)


def router_bias(c: sections.Model, *, seed: int = 0, scale: float = 0.2, dtype: torch.dtype = torch.float64) -> Tensor:
    """[L E], one row a mixture layer, those of multi-token prediction last; zeros for a softmax, as DeepSeek-V2's."""
    shape = (len(c.mixtures()), c.moe.num_experts)
    if c.moe.score == "softmax":
        return torch.zeros(shape, dtype=dtype)
    return (scale * torch.randn(shape, generator=Key(seed).fold("bias").generator())).to(dtype)


def batch(c: sections.Model, *, sequences: int = 2, positions: int = 11, seed: int = 0) -> model.Batch:
    """Random tokens, each target the next token, the first two of each sequence not counted."""
    tokens = torch.randint(c.vocab_size, (sequences, positions + 1), generator=Key(seed).fold("tokens").generator())
    targets = tokens[:, 1:].clone()
    targets[:, :2] = -1
    return model.Batch(tokens[:, :-1], targets, ())


def env(c: sections.Model) -> Env:
    """Reference operations and the model's table."""
    return environment(c, c.max_positions)
