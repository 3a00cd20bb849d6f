"""The model in the words of Hugging Face `transformers`: settings and parameter names of its `deepseek_v3`.

Values only: `transformers` is not imported here, and nothing is read or written. Their matrices are [out, in], ours
[in, out].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nmoe.config import sections
from nmoe.pure.model.attention import Hf, kind_of
from nmoe.pure.model.model import Block, Moe, Shared, Transformer


def settings(c: sections.Model) -> dict[str, Any]:
    """Keyword arguments of `transformers.DeepseekV3Config` for this model.

    The ids of special tokens are the tokenizer's business and None here.
    """
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "first_k_dense_replace": c.num_dense_layers,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **_attention(c).settings(c.attention),
        "n_routed_experts": c.moe.num_experts,
        "num_experts_per_tok": c.moe.top_k,
        "n_shared_experts": c.moe.num_shared_experts,
        "moe_intermediate_size": c.moe.intermediate_size,
        "n_group": c.moe.num_groups,
        "topk_group": c.moe.top_k_groups,
        "norm_topk_prob": c.moe.normalize,
        "routed_scaling_factor": c.moe.route_scale,
        "num_nextn_predict_layers": 0,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def state_dict(p: Transformer, bias: Tensor, c: sections.Model) -> dict[str, Tensor]:
    """Every parameter, and the router bias, under the names of `DeepseekV3ForCausalLM` in memory (transformers 5).

    What they have no setting for is folded into the weights: the scale of the embedding and of the logits, and an
    epsilon of the latents' norms other than theirs. Inference is the same; training from there is not.

    bias     [L E] f32   router bias, one row a mixture layer
    returns  tensors in the formats of `p`, many of them views of it
    """
    named = {
        "model.embed_tokens.weight": p.embed * c.embedding_scale,
        "model.norm.weight": p.norm,
        "lm_head.weight": (p.head * c.logit_scale).T,
    }
    for layer, block in enumerate(p.blocks):
        for name, tensor in block_tensors(block, c).items():
            named[f"model.layers.{layer}.{name}"] = tensor
    for row, layer in enumerate(range(c.num_dense_layers, c.num_layers)):
        named[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = bias[row]
    return named


def block_tensors(p: Block, c: sections.Model) -> dict[str, Tensor]:
    """One layer."""
    ffn = moe_tensors(p.ffn) if isinstance(p.ffn, Moe) else mlp_tensors(p.ffn.up, p.ffn.down)
    attention = _attention(c).tensors(p.attention, c.attention, eps=c.norm_eps)
    return {
        "input_layernorm.weight": p.attention_norm,
        **{f"self_attn.{name}": tensor for name, tensor in attention.items()},
        "post_attention_layernorm.weight": p.ffn_norm,
        **{f"mlp.{name}": tensor for name, tensor in ffn.items()},
    }


def mlp_tensors(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """A gated MLP."""
    gate, value = up.unbind(1)
    return {"gate_proj.weight": gate.T, "up_proj.weight": value.T, "down_proj.weight": down.T}


def moe_tensors(p: Moe) -> dict[str, Tensor]:
    """A mixture but for its router bias; without shared experts theirs have zero width."""
    if isinstance(p.shared, Shared):
        shared = mlp_tensors(p.shared.up, p.shared.down)
    else:
        shared = mlp_tensors(p.up[0, :, :, :0], p.down[0, :0])
    return {
        "gate.weight": p.router.T,
        "experts.gate_up_proj": p.up.flatten(2).transpose(1, 2),
        "experts.down_proj": p.down.transpose(1, 2),
        **{f"shared_experts.{name}": tensor for name, tensor in shared.items()},
    }


def _attention(c: sections.Model) -> Hf:
    """The names of this kind of attention in `transformers`."""
    names = kind_of(c.attention).hf
    if names is None or names.model != "deepseek_v3":
        raise ValueError(
            f"hf: expected an attention that transformers' deepseek_v3 has, got {type(c.attention).__name__}; export "
            "another kind"
        )
    return names
