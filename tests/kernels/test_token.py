"""A token of one row by kernels for a single row, against `decode.extend` in fp64; interpreted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.effects.device import token
from nmoe.pure.core import tree
from nmoe.pure.model import decode
from nmoe.pure.model.ops import environment
from tests import shapes
from tests.kernels.truth import check
from tests.pure.model.test_decode import parameters

LOW = shapes.attention(q_lora_rank=7)
MODELS = {
    "queries whole": shapes.config(embedding_scale=3.0),
    "query latent": shapes.config(num_dense_layers=0, attention=LOW),
    "yarn": shapes.DEEPSEEK["yarn"],
    "softmax, no shared expert": shapes.config(
        moe=sections.Moe(num_experts=5, top_k=2, intermediate_size=9, score="softmax", normalize=False)
    ),
    "blocks that are not all": shapes.config(
        hidden_size=600,
        intermediate_size=150,
        attention=shapes.attention(num_heads=17, q_lora_rank=520, kv_lora_rank=140, v_head_dim=70),
        moe=sections.Moe(
            num_experts=6, top_k=3, num_shared_experts=1, intermediate_size=70, route_scale=1.5, normalize=True
        ),
    ),
}
TEXT = 9


def run(extend: Any, p: Any, c: sections.Model, dtype: torch.dtype, seen: int, padding: int) -> list[Tensor]:
    """Hidden states of the tokens after the first `seen`, one by one, and the caches at the end."""
    bias = shapes.router_bias(c, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    env = environment(c, c.max_positions)
    ids = torch.arange(3, 3 + TEXT)[None] * 7 % c.vocab_size

    def cast(path: str, leaf: Tensor) -> Tensor:
        kept = dtype is torch.float16 and path.endswith(("norm", "router"))
        return leaf.to(torch.float32 if kept else dtype)

    p = tree.map(cast, p)
    state = decode.begin(p, torch.tensor([padding], dtype=torch.int32), TEXT + 40, env, c)
    store = lambda cache, rows, place: cache.index_copy_(1, place, rows)  # noqa: E731
    _, state = decode.extend(p, ids[:, :seen], state, bias, env, c, store=store)
    hidden = list[Tensor]()
    for at in range(seen, TEXT):
        y, state = extend(p, ids[:, at : at + 1], state, bias, env, c)
        hidden.append(y)
    return [torch.cat(hidden), *state.caches]


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_token_is_that_of_extend(name: str, padding: int) -> None:
    c = MODELS[name]
    assert token.fits(c)
    p, plain = parameters(c), partial(decode.extend)
    arguments = (p, c)
    check(
        run(token.extend_, *arguments, torch.float32, 6, padding),
        run(plain, *arguments, torch.float32, 6, padding),
        run(plain, *arguments, torch.float64, 6, padding),
        factor=3,
        steps=4,
    )
