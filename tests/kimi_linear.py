"""A Kimi Linear model in the words of `transformers`' kimi_linear, for tests that compare with it."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.model import hf
from nmoe.pure.model.attention import kda
from nmoe.pure.model.model import Transformer


def hf_settings(c: sections.Model) -> dict[str, Any]:
    """Keyword arguments of `transformers.KimiLinearConfig`; table `a` is delta attention, `b` latent."""
    assert isinstance(c.attention, sections.Mixed)
    delta, latent = c.attention.a, c.attention.b
    assert isinstance(delta, sections.Kda)
    assert isinstance(latent, sections.Mla)
    layers = c.attention.letters(c.num_layers)
    mlps = ["dense"] * c.num_dense_layers + ["sparse"] * (c.num_layers - c.num_dense_layers)
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe.intermediate_size,
        "rms_norm_eps": c.norm_eps,
        "layer_types": ["linear_attention" if letter == "a" else "full_attention" for letter in layers],
        "mlp_layer_types": mlps,
        "linear_num_heads": delta.num_heads,
        "linear_head_dim": delta.head_dim,
        "linear_conv_kernel_dim": delta.conv_size,
        "num_attention_heads": latent.num_heads,
        "num_key_value_heads": latent.num_heads,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "num_experts": c.moe.num_experts,
        "num_experts_per_token": c.moe.top_k,
        "num_shared_experts": c.moe.num_shared_experts,
        "num_expert_group": c.moe.num_groups,
        "topk_group": c.moe.top_k_groups,
        "routed_scaling_factor": c.moe.route_scale,
        "moe_renormalize": c.moe.normalize,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def hf_tensors(p: Transformer, bias: Tensor, c: sections.Model) -> dict[str, Tensor]:
    """Names and tensors of `transformers`: those of DeepSeek-V3, and delta attention where a layer has it."""
    assert isinstance(c.attention, sections.Mixed)
    latent = next(block.attention for block in p.blocks if not isinstance(block.attention, kda.Kda))
    blocks = tuple(
        attrs.evolve(block, attention=latent if isinstance(block.attention, kda.Kda) else block.attention)
        for block in p.blocks
    )
    named = hf.state_dict(
        attrs.evolve(p, blocks=blocks), bias, attrs.evolve(c, attention=attrs.evolve(c.attention.b, position=None))
    )
    for layer, block in enumerate(p.blocks):
        if isinstance(block.attention, kda.Kda):
            prefix = f"model.layers.{layer}.self_attn."
            named = {name: tensor for name, tensor in named.items() if not name.startswith(prefix)}
            named |= {prefix + name: tensor for name, tensor in _delta(block.attention).items()}
    return named


def _delta(p: kda.Kda) -> dict[str, Tensor]:
    """One layer's `KimiLinearDeltaAttention`."""
    rank = p.decay.shape[0]
    forget, gate, step = p.low.split((rank, rank, p.low.shape[1] - 2 * rank), dim=1)
    return {
        **{f"{name}_proj.weight": p.qkv[:, at].flatten(1).T for at, name in enumerate("qkv")},
        "conv1d.weight": p.taps.flatten(0, 2)[:, None],
        "forget_gate.f_a_proj.weight": forget.T,
        "forget_gate.f_b_proj.weight": p.decay.flatten(1).T,
        "forget_gate.dt_bias": p.decay_bias.flatten(),
        "forget_gate.A_log": p.log_rate.view(1, 1, -1, 1),
        "b_proj.weight": step.T,
        "g_a_proj.weight": gate.T,
        "g_b_proj.weight": p.gate.flatten(1).T,
        "o_norm.weight": p.norm,
        "o_proj.weight": p.out.flatten(0, 1).T,
    }
