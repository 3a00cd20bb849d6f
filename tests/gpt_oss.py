"""Grouped-query attention in the words of `transformers`' gpt_oss, for tests that compare with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.model.attention import gqa
from nmoe.pure.model.rope import magnitude


def hf_settings(c: sections.Gqa) -> dict[str, Any]:
    """Keyword arguments of `transformers.GptOssConfig` that describe this attention, `layer_types` apart."""
    return {
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "sliding_window": c.window,
        "attention_bias": c.biases,
        "attention_dropout": 0.0,
        "rope_parameters": hf_rotation(c),
    }


def hf_rotation(c: sections.Gqa) -> dict[str, Any]:
    """`rope_parameters` of `transformers`; its factor on cosine and sine is squared by the scores, as `scale` is."""
    if c.yarn is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": c.rope_theta,
        "factor": c.yarn.factor,
        "original_max_position_embeddings": c.yarn.original_positions,
        "beta_fast": c.yarn.beta_fast,
        "beta_slow": c.yarn.beta_slow,
        "truncate": c.yarn.truncate,
        "attention_factor": magnitude(c.yarn.factor, c.yarn.mscale),
    }


def hf_tensors(p: gqa.Gqa, c: sections.Gqa) -> dict[str, Tensor]:
    """Names and tensors of `transformers`.

    It rotates channel i with channel i + C/2, we rotate neighbours: queries and keys get their even channels first.
    Without sinks its are -inf, which add nothing to the denominator.
    """
    q, k, v = p.qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
    halves = (torch.cat((heads[..., ::2], heads[..., 1::2]), dim=-1) for heads in (q, k))
    sinks = p.sinks if isinstance(p.sinks, Tensor) else p.qkv.new_full((c.num_heads,), -torch.inf)
    named = dict(zip(("q_proj", "k_proj", "v_proj"), (*halves, v), strict=True))
    biases: dict[str, Tensor] = {}
    if isinstance(p.qkv_bias, Tensor) and isinstance(p.out_bias, Tensor):
        q, k, v = p.qkv_bias.split((c.num_heads, c.num_kv_heads, c.num_kv_heads))
        halves = (torch.cat((heads[..., ::2], heads[..., 1::2]), dim=-1) for heads in (q, k))
        own = zip(("q_proj", "k_proj", "v_proj"), (*halves, v), strict=True)
        biases = {f"{name}.bias": heads.flatten() for name, heads in own} | {"o_proj.bias": p.out_bias}
    return {
        **biases,
        **{f"{name}.weight": heads.flatten(1).T for name, heads in named.items()},
        "sinks": sinks,
        "o_proj.weight": p.out.flatten(0, 1).T,
    }
