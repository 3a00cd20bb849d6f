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
from nmoe.pure.model import model
from tests import shapes

MODELS = {
    **shapes.DEEPSEEK,
    **shapes.SOFTMAX,
    "scales": shapes.config(
        embedding_scale=10.667, logit_scale=0.3, moe=shapes.mixture(num_shared_experts=2, route_scale=1.7)
    ),
    "dense": shapes.config(num_layers=2, num_dense_layers=2),
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
    moe = attrs.evolve(c.moe, bias_update_rate=0.001, sequence_balance=0.0001)
    return attrs.evolve(c, embedding_scale=1.0, logit_scale=1.0, moe=moe)
