"""Loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor

from nmoe.config.sections import Model as ModelConfig
from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks, all_reduce_sum
from nmoe.pure.core import tree
from nmoe.pure.model.model import Batch, Transformer, forward
from nmoe.pure.model.ops import Env


@attrs.frozen(kw_only=True)
class Held:
    """Loss of a model on held-out text."""

    loss: float  # nats a token
    bits_per_byte: float  # the same in bits, a byte of text: independent of the tokenizer
    tokens: int


@torch.no_grad()
def evaluate(
    p: Transformer,
    router_bias: Tensor,
    env: Env,
    c: ModelConfig,
    batches: Iterable[Batch],
    byte_lengths: Tensor,
    *,
    chunk: int,
    ranks: Ranks = SINGLE_RANK,
) -> Held:
    """Mean next-token loss over the `batches` of all ranks; negative targets do not count.

    batches       as many on every rank, because the experts of a layer compute together
    byte_lengths  [V] i64   bytes of text of each token, 0 for marks
    """
    device = router_bias.device
    nll = torch.zeros((), device=device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        batch = tree.map(lambda path, leaf: leaf.to(device), batch)
        targets = batch.targets
        x, _ = forward(p, batch.tokens, router_bias, env, c, batch.start)
        _, part = env.ops.linear_cross_entropy(
            x.flatten(0, 1), p.head, targets.flatten(), chunk=chunk, logit_scale=c.logit_scale
        )
        nll = nll + part
        counts = targets >= 0
        num_bytes = num_bytes + (byte_lengths[targets.clamp(min=0)] * counts).sum()
        tokens = tokens + counts.sum()
    nll, num_bytes, tokens = all_reduce_sum(ranks.world, (nll, num_bytes, tokens))
    total, count = nll.item(), int(tokens.item())
    return Held(loss=total / count, bits_per_byte=total / math.log(2) / max(int(num_bytes.item()), 1), tokens=count)


def even(batches: Sequence[Batch], ranks: Ranks) -> tuple[Batch, ...]:
    """The batches of this rank, and as many that do not count as it takes to have those of every other rank."""
    masked = any(isinstance(batch.start, Tensor) for batch in batches)
    width = max((batch.tokens.shape[-1] for batch in batches), default=0)
    rounds, width, masked = ranks.all_reduce_max([len(batches), width, masked])
    tokens = torch.zeros(1, width, dtype=torch.int64)
    start = torch.zeros(1, width, dtype=torch.int32) if masked else ()
    return (*batches, *[Batch(tokens, tokens - 1, start)] * (rounds - len(batches)))
