"""Loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Model as ModelConfig
from nmoe.pure import tree
from nmoe.pure.model import Batch, Model, forward
from nmoe.pure.ops import Env

__all__ = ["Held", "evaluate"]


@attrs.frozen(kw_only=True)
class Held:
    """Loss of a model on held-out text."""

    loss: float  # nats a token
    bits_per_byte: float  # the same in bits, a byte of text: independent of the tokenizer
    tokens: int


@torch.no_grad()
def evaluate(
    p: Model,
    router_bias: Tensor,
    env: Env,
    c: ModelConfig,
    batches: Iterable[Batch],
    byte_lengths: Tensor,
    *,
    chunk: int,
) -> Held:
    """Mean next-token loss over `batches`.

    byte_lengths  [V] i64   bytes of text of each token, 0 for marks
    """
    device = router_bias.device
    nll = torch.zeros((), device=device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)
    tokens = 0
    for batch in batches:
        batch = tree.map(lambda path, leaf: leaf.to(device), batch)
        targets = batch.targets
        x, _ = forward(p, batch.tokens, router_bias, env, c, batch.start)
        _, part = env.ops.linear_cross_entropy(
            x.flatten(0, 1), p.head, targets.flatten(), chunk=chunk, logit_scale=c.logit_scale
        )
        nll = nll + part
        num_bytes = num_bytes + byte_lengths[targets].sum()
        tokens += targets.numel()
    total = nll.item()
    return Held(loss=total / tokens, bits_per_byte=total / math.log(2) / max(int(num_bytes.item()), 1), tokens=tokens)
