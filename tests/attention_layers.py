"""One layer of each kind of attention at sizes of published models, forward and backward, on any device.

Of heads there are fewer where that many tokens of a whole layer fit no GPU: what a token takes is in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmoe.config.sections import Dsa, Gqa, Kda, Mla, Nsa
from nmoe.effects.device import ops
from nmoe.effects.kernels import norm
from nmoe.pure.core import tree
from nmoe.pure.core.spec import POLICY, Spec
from nmoe.pure.model.attention import KINDS

WIDTH = 256
LENGTHS = tuple(4096 << step for step in range(6))
"""From 4 k to 128 k tokens."""

LATENT: Mapping[str, Any] = {
    "num_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SPARSE = partial(Dsa, **LATENT, index_num_heads=16, index_head_dim=128)

LAYERS: Mapping[str, Any] = {
    "mla": Mla(**LATENT),
    "gqa": Gqa(num_heads=64, num_kv_heads=8, head_dim=64, sinks=True),
    "gqa in a window": Gqa(num_heads=64, num_kv_heads=8, head_dim=64, window=128, sinks=True),
    "kda": Kda(num_heads=32, head_dim=128),
    "nsa": Nsa(num_heads=32, num_kv_heads=2, head_dim=192, v_head_dim=128),
    "dsa": SPARSE(index_top_k=2048),
    "dsa, dense stage": SPARSE(index_warmup_tokens=1),
}

SLOPES: Mapping[str, int] = {
    "mla": 44_616,
    "gqa": 38_400,
    "gqa in a window": 38_400,
    "kda": 224_064,
    "nsa": 86_000,
    "dsa": 111_930,
    "dsa, dense stage": 49_520,
}
"""Bytes a token that a layer holds at most at once, forward and backward, as docs/attention.md states them."""

WORKSPACE = 64 * 2**20
"""Bytes beside that, whatever the length: chunks of queries, gradients of parameters."""


def both_ways(c: Any, length: int, device: torch.device) -> Callable[[], list[Tensor]]:
    """Forward and backward pass of one layer over one row, as a call that returns the gradients.

    What is there before the call is not made by it: input, parameters, the rotation table.
    """
    kind = KINDS[type(c)]
    chosen = ops._gpu_attention(torch.device("cuda", 0), kind, c, True, False)
    sizes = {"D": WIDTH, "L": 1, **kind.dims(c)}
    generator = torch.Generator(device).manual_seed(0) if device.type == "cuda" else None

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)

    def leaf(path: str, spec: Spec) -> Tensor:
        value = drawn(*spec.shape(sizes)) * 0.05
        return (value if POLICY[spec.role].storage == "compute" else value.float()).requires_grad_()

    p, x = tree.map(leaf, kind.specs(c)), drawn(1, length, WIDTH).requires_grad_()
    rope = tree.map(lambda _, table: table.to(device), kind.tables(c, length))
    leaves = [x, *(leaf for _, leaf in tree.leaves(p))]

    def run() -> list[Tensor]:
        result = kind.apply(p, x, rope, norm.rms_norm, chosen, c, eps=1e-6)
        o, loss = result if isinstance(result, tuple) else (result, None)
        results = [o] if loss is None else [o, loss]
        return list(torch.autograd.grad(results, leaves, [torch.ones_like(tensor) for tensor in results]))

    return run
