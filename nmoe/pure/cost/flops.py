"""FLOPs, counted from the specs."""

from __future__ import annotations

from typing import Any

import attrs

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import active
from nmoe.pure.core.spec import POLICY, Dims
from nmoe.pure.model.attention import KINDS, Kinds, layers
from nmoe.pure.model.model import Biases, Moe, Transformer


@attrs.frozen(kw_only=True)
class Flops:
    """Forward FLOPs a token, a multiplication and an addition counted as two."""

    projections: int  # matrix products of attention
    attention: int  # scores and weighted values
    dense: int
    router: int
    routed: int
    shared: int
    head: int  # as often as tokens are predicted
    mtp: int  # matrices that join hidden states and embeddings of multi-token prediction

    def total(self) -> int:
        """All parts."""
        return sum(attrs.astuple(self))

    def training(self) -> int:
        """Forward and backward: each product has two gradients of its own size."""
        return 3 * self.total()


def forward_flops(
    c: sections.Model, specs: Transformer, dims: Dims, *, sequence_length: int, causal: bool, kinds: Kinds = KINDS
) -> Flops:
    """Forward FLOPs a token of a sequence of this length.

    causal   count only the scores that the mask keeps, of a plain causal one on average (T + 1) / 2 a token; False:
             all that the reference computes, as `torch.utils.flop_counter.FlopCounterMode` counts it
    kinds    of attention
    """

    def products(part: Any) -> int:
        matrices = [spec for _, spec in tree.leaves(part) if POLICY[spec.role].flops]
        return sum(2 * active(spec, dims, c.moe.top_k) for spec in matrices)

    def down_biases(ffn: Moe) -> int:
        """The product of a token's weights and the biases of all experts."""
        return 2 * dims["E"] * dims["D"] if isinstance(ffn.biases, Biases) else 0

    blocks = (*specs.blocks, *(part.block for part in specs.mtp))
    mixtures = [block.ffn for block in blocks if isinstance(block.ffn, Moe)]
    return Flops(
        projections=sum(products(block.attention) for block in blocks),
        attention=sum(
            kind.flops(section, sequence_length=sequence_length, causal=causal) for kind, section in layers(c, kinds)
        ),
        dense=sum(products(block.ffn) for block in blocks if not isinstance(block.ffn, Moe)),
        router=sum(products(ffn.router) for ffn in mixtures),
        routed=sum(products((ffn.up, ffn.down)) + down_biases(ffn) for ffn in mixtures),
        shared=sum(products(ffn.shared) for ffn in mixtures),
        head=products(specs.head) * (1 + c.depth()),
        mtp=sum(products(part.project) for part in specs.mtp),
    )


def lowered_flops(c: sections.Model, specs: Transformer, dims: Dims) -> int:
    """Forward FLOPs a token in products of fewer bits where the config has them: of what POLICY lowers."""
    lowered = [spec for _, spec in tree.leaves(specs) if POLICY[spec.role].lowered]
    return sum(2 * active(spec, dims, c.moe.top_k) for spec in lowered)
