"""Random models of many shapes in folders that `nmoe export hf` and `nmoe import hf` read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import tomli_w
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.config.fields import table
from nmoe.effects.checkpoint import weights
from nmoe.pure.core import tree
from nmoe.pure.core.spec import POLICY
from nmoe.pure.model import hf, model
from tests import shapes

# with 12 heads a key whose score is zero by every head is rare: of equal ones theirs takes any
SPARSE = shapes.dsa(index_num_heads=12, index_top_k=9)
DELTA = sections.Kda(num_heads=2, head_dim=4, conv_size=3)
LATENT = shapes.attention(position="none", q_lora_rank=None)
MODELS = {
    **shapes.DEEPSEEK,
    **shapes.SOFTMAX,
    **shapes.GPT_OSS,
    "scales": shapes.config(
        embedding_scale=10.667, logit_scale=0.3, moe=shapes.mixture(num_shared_experts=2, route_scale=1.7)
    ),
    "dense": shapes.config(num_layers=2, num_dense_layers=2),
    "indexed": shapes.config(attention=SPARSE),
    "indexed, yarn, groups": shapes.config(
        num_layers=4,
        max_positions=512,
        attention=attrs.evolve(SPARSE, yarn=shapes.YARN),
        moe=shapes.mixture(num_groups=4, top_k_groups=2, top_k=4),
    ),
    "kimi linear": shapes.config(attention=sections.Mixed(pattern="aab", a=DELTA, b=LATENT)),
    "kimi linear, tables the other way round": shapes.config(
        num_layers=4,
        attention=sections.Mixed(pattern="ab", last="b", a=LATENT, b=DELTA),
        moe=shapes.mixture(num_shared_experts=0),
    ),
    "two further tokens": shapes.config(embedding_scale=10.667, mtp=sections.Mtp(depth=2)),
}


def write(folder: Path, c: sections.Model, *, compute: Any = "fp32") -> None:
    """A run folder as it is at the end: its config, and weights of the model."""
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32

    def stored(_: str, value: Tensor, spec: Any) -> Tensor:
        return value.detach().to(dtype if POLICY[spec.role].storage == "compute" else torch.float32)

    params = tree.map(stored, shapes.parameters(c, dtype=torch.float32), model.specs(c))
    folder.mkdir()
    weights.save(folder, params, shapes.router_bias(c, dtype=torch.float32))
    (folder / "config.toml").write_text(tomli_w.dumps({"model": table(c), "precision": {"compute": compute}}))


def without_scales(c: sections.Model) -> sections.Model:
    """What an import of an export of `c` says: scales are in the weights, what is for training has its default."""
    moe = attrs.evolve(c.moe, bias_update_rate=None, sequence_balance=0.0001)
    c = hf.family_of(c)[1].canonical(c)
    return attrs.evolve(c, embedding_scale=1.0, logit_scale=1.0, moe=moe)
