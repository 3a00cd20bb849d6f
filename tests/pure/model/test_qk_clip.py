"""QK-clip against scores computed one by one, and against what it is for: no head's scores pass the limit."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.model import model
from nmoe.pure.model.attention import qk_clip
from nmoe.pure.model.attention.qk_clip import factors, largest_scores
from tests import shapes


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_largest_score_of_each_head(
    block: int, documents: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several draws: the largest of all scores is often one of a key that is not seen."""
    monkeypatch.setattr(qk_clip, "BLOCK", block)
    q, kv, k_rope = (normal(2, 9, *shape, seed=3 * seed + at) for at, shape in enumerate(((3, 7), (3, 8), (2,)), 1))
    start = torch.tensor([[0] * 4 + [4] * 5, [0] * 9], dtype=torch.int32) if documents else ()
    expected = torch.full((3,), -torch.inf, dtype=torch.float64)
    for b in range(2):
        for i in range(9):
            first = int(start[b, i]) if isinstance(start, Tensor) else 0
            for j in range(first, i + 1):
                for h in range(3):
                    score = 0.3 * (q[b, i, h, :5] @ kv[b, j, h, :5] + q[b, i, h, 5:] @ k_rope[b, j])
                    expected[h] = torch.maximum(expected[h], score)
    torch.testing.assert_close(largest_scores(q, kv, k_rope, start, scale=0.3), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [None, 7])
def test_scaled_weights_reach_the_limit_and_no_more(rank: int | None) -> None:
    """Of the first layer, whose input does not depend on them; heads below the limit keep their scores."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=rank))
    assert isinstance(c.attention, sections.Mla)
    p, env, batch = shapes.parameters(c), shapes.env(c), shapes.batch(c)
    p = tree.map(lambda path, leaf: leaf.detach() * (3 if path.endswith("attention.down") else 1), p)

    def scores(params: Any) -> Tensor:
        seen: list[Tensor] = []

        def attend(*arguments: Any, **keywords: Any) -> Tensor:
            seen.append(largest_scores(*arguments, **keywords))
            return env.ops.attention.attend(*arguments, **keywords)

        ops = attrs.evolve(env.ops, attention=attrs.evolve(env.ops.attention, attend=attend))
        model.forward(params, batch.tokens, shapes.router_bias(c), attrs.evolve(env, ops=ops), c)
        return seen[0]

    before = scores(p)
    limit = float(before.sort().values[0] + 1e-9 + (before.max() - before.min()) / 3)
    assert limit > 0 and (before > limit).any() and (before < limit).any()
    first = {f"blocks.0.attention.{path}": factor for path, factor in factors(c.attention, before, limit).items()}
    clipped = tree.map(lambda path, leaf: leaf * first[path] if path in first else leaf, p)
    torch.testing.assert_close(scores(clipped), before.clamp(max=limit), rtol=1e-12, atol=0)
    keys = {path.split("attention.")[1] for path in first}
    assert keys == ({"query.up", "up"} if rank else {"down", "up"})
    # Values, latents and the shared rotated key are no head's own.
    assert (first["blocks.0.attention.up"][..., c.attention.qk_nope_head_dim :] == 1).all()
