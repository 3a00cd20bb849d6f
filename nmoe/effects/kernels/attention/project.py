"""Projections of latent attention that rotate in the memory of their own product.

T positions of B sequences · D width · A width of the product · H heads · C channels of a query · P the rotated ones
R latent · Q low rank of the query

A product is fresh, so nothing but the op can see that it is written; the arguments stay as they are.
"""

from __future__ import annotations

from torch import Tensor

from nmoe.effects.kernels.attention.rope import rotate_mla_
from nmoe.pure.model.rope import Rope


def project(
    x: Tensor, down: Tensor, rope: Rope, positions: Tensor | tuple[()] = (), *, num_heads: int, latent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`pure.model.attention.mla.project`: q [B T H C] and latent [B T R] are views of one product, k_rope is not."""
    rotated = 2 * rope.cos.shape[-1]
    widths = (down.shape[1] - latent - rotated, latent, rotated)
    product, low, key = (x @ down).split(widths, dim=-1)
    q, k_rope = rotate_mla_(product.unflatten(-1, (num_heads, -1)), key, rope, positions)
    return q, low, k_rope


def query(x: Tensor, up: Tensor, key: Tensor, rope: Rope, positions: Tensor | tuple[()] = ()) -> tuple[Tensor, Tensor]:
    """`pure.model.attention.mla.query`: q [B T H C], k_rope [B T P]."""
    return rotate_mla_((x @ up.flatten(1)).unflatten(-1, up.shape[1:]), key, rope, positions)
