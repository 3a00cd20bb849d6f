"""A config small enough for a test: two blocks, eight experts, two thousand steps a minute."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from nmoe.config import sections as s
from tests import shapes


def tiny(
    *,
    vocab_size: int = 61,
    batch_size: int = 2,
    microbatch_size: int = 2,
    compute: Any = "fp32",
    lr: float = 1e-3,
    clip_norm: float = 1.0,
    steps: int = 10,
    sequence_length: int = 16,
    max_nonfinite_steps: int = 3,
    q_lora_rank: int | None = None,
    source: s.Stdlib | s.Shards | None = None,
) -> s.Config:
    """A whole config with everything a test may want to change."""
    tokens = batch_size * sequence_length
    return s.Config(
        model=s.Model(
            vocab_size=vocab_size,
            hidden_size=32,
            num_layers=3,
            num_dense_layers=1,
            intermediate_size=48,
            max_positions=64,
            attention=s.Mla(
                num_heads=2,
                q_lora_rank=q_lora_rank,
                kv_lora_rank=16,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
            ),
            # written, so that the number of steps stays free to change
            moe=s.Moe(num_experts=8, top_k=2, num_shared_experts=1, intermediate_size=16, bias_update_rate=0.001),
        ),
        precision=s.Precision(compute=compute),
        data=s.Data(source=source or s.Stdlib()),
        optim=s.Optim(dense=s.Group(lr=lr), expert=s.Group(lr=2 * lr), router=s.Group(lr=lr / 2), clip_norm=clip_norm),
        schedule=s.Schedule(warmup_tokens=2 * tokens, hold_tokens=4 * tokens, decay_tokens=4 * tokens),
        train=s.Train(
            steps=steps,
            batch_size=batch_size,
            microbatch_size=microbatch_size,
            sequence_length=sequence_length,
            max_nonfinite_steps=max_nonfinite_steps,
        ),
        validation=s.Validation(every=5, tokens=512),
        run=s.Run(device="cpu"),
    )


PARTS: Mapping[str, Any] = MappingProxyType(
    {
        "gqa": s.Gqa(num_heads=4, num_kv_heads=2, head_dim=8, window=6, global_every=2, sinks=True),
        "kda": s.Kda(num_heads=2, head_dim=8),
        "nsa": shapes.nsa(window=4),
        # two steps of 32 tokens in the dense stage, then the sparse one
        "dsa": s.Dsa(
            num_heads=2,
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            index_num_heads=2,
            index_head_dim=8,
            index_top_k=5,
            index_warmup_tokens=64,
        ),
    }
)
ATTENTIONS: Mapping[str, Any] = MappingProxyType(
    {
        **PARTS,
        "kda, nsa, dsa": s.Mixed(pattern="abc", a=PARTS["kda"], b=PARTS["nsa"], c=PARTS["dsa"]),
        "gqa, kda": s.Mixed(pattern="ab", last="a", a=PARTS["gqa"], b=PARTS["kda"]),
    }
)
"""Every kind of attention but the latent one, alone and mixed by layer."""


def with_attention(config: s.Config, name: str) -> s.Config:
    """A config with one of `ATTENTIONS`."""
    return attrs.evolve(config, model=attrs.evolve(config.model, attention=ATTENTIONS[name]))
