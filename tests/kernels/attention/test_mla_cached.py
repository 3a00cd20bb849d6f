"""Latent attention of one token over a cache against the reference in fp64."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Mla
from nmoe.effects.kernels.attention import mla_cached
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model.attention import mla
from nmoe.pure.model.attention.cached import New, new_tokens
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.rope import Rope
from tests.kernels.truth import check, normal

ROWS, WIDTH = 3, 40
SHAPES = {"one program": (40, 3, 40), "several parts": (200, 3, 200), "room that is not filled": (200, 17, 70)}
"""Places of the cache, heads, tokens seen, the new one included."""


def section(heads: int, low: int | None = None) -> Mla:
    return Mla(
        num_heads=heads, q_lora_rank=low, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12
    )


def parameters(c: Mla) -> mla.Mla:
    drawn = init(Key(0).fold("init"), mla.specs(c), mla.dims(c) | {"D": WIDTH, "L": 1})
    return tree.map(lambda path, leaf: leaf * 3 + 0.3 * normal(*leaf.shape, seed=len(path)), drawn)


def where(seen: int) -> New:
    """Rows that begin at the first token, at the tenth, and with the new one."""
    padding = torch.tensor([0, 9, seen - 1], dtype=torch.int32)
    return new_tokens(torch.tensor(seen - 1), (ROWS, 1), padding, seen)


def attended(p: mla.Mla, c: Mla, x: Tensor, cache: Tensor, new: New, rope: Rope) -> tuple[Tensor, Tensor]:
    return mla_cached.attend_new(p, x, cache, new, rope, eps=1e-5, scale=mla.scale(c))


def plain(p: mla.Mla, c: Mla, x: Tensor, cache: Tensor, new: New, rope: Rope) -> tuple[Tensor, Tensor]:
    return mla.attend_new(p, x, cache, new, rope, rms_norm, mla.REFERENCE, c, eps=1e-5)


@pytest.mark.parametrize("low", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_the_reference(shape: str, dtype: torch.dtype, low: int | None) -> None:
    """Where no token of its row is, a cache has what may not be read."""
    places, heads, seen = SHAPES[shape]
    c, new = section(heads, low), where(seen)
    p, x, cache = parameters(c), normal(ROWS, 1, WIDTH, seed=3), normal(ROWS, places, 30, seed=4)
    p, x, cache = tree.map(lambda _, leaf: leaf.to(dtype), (p, x, cache))
    held = cache.clone()
    held[:, seen:] = torch.inf
    held[1, :9] = torch.nan

    def run(attend: Any, to: torch.dtype, held: Tensor) -> list[Tensor]:
        weights, row, before = tree.map(lambda _, leaf: leaf.to(to), (p, x, held))
        y, after = attend(weights, c, row, before, new, mla.tables(c, places))
        return [y, after[:, seen - 1]]

    check(
        run(attended, dtype, held),
        run(plain, dtype, cache),
        run(plain, torch.float64, cache),
        steps=2,
    )


@torch.no_grad()
def test_a_text_depends_on_no_other_row() -> None:
    c, new, rope = section(3), where(150), mla.tables(section(3), 200)
    p, x, cache = parameters(c), normal(ROWS, 1, WIDTH, seed=3), normal(ROWS, 200, 30, seed=4)
    together, _ = attended(p, c, x, cache, new, rope)
    for row in range(ROWS):
        at = slice(row, row + 1)
        documents = attrs.evolve(new.documents, start=new.documents.start[at], position=new.documents.position[at])
        own = attrs.evolve(new, documents=documents, visible=new.visible[at])
        alone, _ = attended(p, c, x[at], cache[at], own, rope)
        torch.testing.assert_close(alone, together[at], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_text_does_not_depend_on_the_room() -> None:
    c, new, rope = section(3), where(70), mla.tables(section(3), 4000)
    p, x, cache = parameters(c), normal(ROWS, 1, WIDTH, seed=3), normal(ROWS, 4000, 30, seed=4)
    few, _ = attended(p, c, x, cache[:, :70].contiguous(), new, rope)
    many, _ = attended(p, c, x, cache, new, rope)
    assert torch.equal(few, many)
