"""Caches give what a pass over the whole text gives; how the next token is chosen."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model import decode, model
from nmoe.pure.model.attention import KINDS, Kind
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.ops import environment
from tests import shapes

GQA = sections.Gqa(num_heads=6, num_kv_heads=2, head_dim=8)
NSA, DSA = shapes.nsa(), shapes.dsa()
MODELS = {
    "mla": shapes.config(),
    "mla, scaled": shapes.config(embedding_scale=3.0),
    "mla, query latent": shapes.config(num_dense_layers=0, attention=shapes.attention(q_lora_rank=7)),
    "mla, yarn": shapes.DEEPSEEK["yarn"],
    "gqa": shapes.config(attention=GQA),
    "gqa, window and sinks": shapes.config(attention=attrs.evolve(GQA, window=4, sinks=True)),
    "gqa, window of one": shapes.config(attention=attrs.evolve(GQA, window=1)),
    "gqa, global in turn": shapes.config(attention=attrs.evolve(GQA, window=5, global_every=2, sinks=True)),
    "kda": shapes.config(attention=sections.Kda(num_heads=2, head_dim=8)),
    "kda, one tap, bounded": shapes.config(
        attention=sections.Kda(num_heads=2, head_dim=8, conv_size=1, decay_limit=5.0)
    ),
    "nsa": shapes.config(attention=NSA),
    "nsa, long blocks": shapes.config(
        attention=attrs.evolve(NSA, compressed_block=6, compressed_stride=3, selected_block=6, window=1)
    ),
    "nsa, longer than the row": shapes.config(
        attention=attrs.evolve(NSA, compressed_block=32, compressed_stride=16, selected_block=32)
    ),
    "dsa": shapes.config(attention=DSA),
    "dsa, dense stage": shapes.config(attention=attrs.evolve(DSA, index_warmup_tokens=10)),
    "kda, nsa, dsa": shapes.config(
        attention=sections.Mixed(pattern="abc", a=sections.Kda(num_heads=2, head_dim=8), b=NSA, c=DSA)
    ),
}
POSITIONS = 23


def parameters(c: sections.Model) -> model.Transformer:
    """Random, and no gain or sink at its initial value."""

    def leaf(path: str, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=Key(0).fold("noise", path).generator(), dtype=torch.float64)
        return value.double() + 0.1 * noise

    return tree.map(leaf, init(Key(0).fold("init"), model.specs(c), model.dims(c)))


def tokens_of(c: sections.Model, rows: int = 2) -> Tensor:
    return torch.randint(c.vocab_size, (rows, POSITIONS), generator=Key(1).generator())


def extended(
    c: sections.Model, tokens: Tensor, sizes: list[int], padding: Tensor, room: int = POSITIONS, **how: Any
) -> tuple[Tensor, decode.Decoding]:
    """Hidden states of tokens that come in parts of these sizes."""
    p, bias, env = parameters(c), shapes.router_bias(c), environment(c, c.max_positions)
    state, hidden = decode.begin(p, padding, room, env, c), []
    for part in tokens.split(sizes, dim=1):
        x, state = decode.extend(p, part, state, bias, env, c, **how)
        hidden.append(x)
    return torch.cat(hidden, dim=1), state


def in_place(cache: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    return cache.index_copy_(1, place, rows)


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [9, 1, 1, 5, 7]], ids=["at once", "one by one", "in parts"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_cache_changes_nothing(name: str, sizes: list[int]) -> None:
    c = MODELS[name]
    tokens = tokens_of(c)
    x, _ = model.forward(parameters(c), tokens, shapes.router_bias(c), environment(c, c.max_positions), c)
    y, _ = extended(c, tokens, sizes, torch.zeros(2, dtype=torch.int32))
    head = parameters(c).head
    torch.testing.assert_close(y @ head, x @ head, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("padding", "sizes"), [(6, [9, 1, 13]), (9, [9, 1, 13]), (5, [1] * 23), (8, [9, 1, 13])])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_changes_nothing(name: str, padding: int, sizes: list[int]) -> None:
    """A shorter prompt beside a longer one, whatever the ids in front of it; it may begin a part of its own."""
    c = MODELS[name]
    tokens = tokens_of(c)
    y, _ = extended(c, tokens, sizes, torch.tensor([0, padding], dtype=torch.int32))
    p, env = parameters(c), environment(c, c.max_positions)
    for row, first in ((0, 0), (1, padding)):
        x, _ = model.forward(p, tokens[row : row + 1, first:], shapes.router_bias(c), env, c)
        torch.testing.assert_close(y[row : row + 1, first:] @ p.head, x @ p.head, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_step_fits_all_tokens(name: str) -> None:
    """As a recorded step: shapes of the room, rows written in place, states into the memory of the ones before."""
    c = MODELS[name]
    tokens, padding = tokens_of(c), torch.tensor([0, 6], dtype=torch.int32)
    plain, _ = extended(c, tokens, [9, *[1] * 14], padding)
    p, bias, env = parameters(c), shapes.router_bias(c), environment(c, c.max_positions)
    state = decode.begin(p, padding, POSITIONS + 8, env, c)
    how: dict[str, Any] = {"store": in_place}
    _, state = decode.extend(p, tokens[:, :9], state, bias, env, c, **how)
    held = state.caches
    for place in range(9, POSITIONS):
        state = attrs.evolve(state, caches=held, length=9)  # of the host's numbers a replay knows those of its record
        x, state = decode.extend(p, tokens[:, place : place + 1], state, bias, env, c, whole=True, **how)
        for (_, old), (_, new) in zip(tree.leaves(held), tree.leaves(state.caches), strict=True):
            assert old.shape == new.shape
            old.copy_(new)
        torch.testing.assert_close(x @ p.head, plain[:, place : place + 1] @ p.head, rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_a_cache_holds() -> None:
    """Latent and rotated key alone; of a window, one token less than it; numbers a sequence and layer."""

    def held(c: sections.Model) -> list[int]:
        _, state = extended(c, tokens_of(c), [POSITIONS], torch.zeros(2, dtype=torch.int32))
        return [sum(leaf[0].numel() for _, leaf in tree.leaves(cache)) for cache in state.caches]

    attention = shapes.attention()
    assert held(MODELS["mla"]) == 3 * [POSITIONS * (attention.kv_lora_rank + attention.qk_rope_head_dim)]
    a_token = 2 * GQA.num_kv_heads * GQA.head_dim
    assert held(MODELS["gqa, global in turn"]) == [4 * a_token, POSITIONS * a_token, 4 * a_token]
    assert held(MODELS["gqa, window of one"]) == [0, 0, 0]


def test_a_kind_without_a_cache_is_refused() -> None:
    c = MODELS["mla"]
    without: Kind = attrs.evolve(KINDS[sections.Mla], cache=None)
    env = environment(c, c.max_positions, kinds={**KINDS, sections.Mla: without})
    with pytest.raises(ValueError, match="decode: expected a kind of attention with a cache, got one without"):
        decode.begin(parameters(c), torch.zeros(1, dtype=torch.int32), 5, env, c)


def test_more_tokens_than_positions_are_refused() -> None:
    c = attrs.evolve(MODELS["mla"], max_positions=POSITIONS - 1)
    padding = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="decode: expected at most the 22 positions of the model, got 23"):
        extended(c, tokens_of(c), [20, 3], padding)
    with pytest.raises(ValueError, match="decode: expected at most the 21 tokens there is room for, got 23"):
        extended(c, tokens_of(c), [20, 3], padding, room=21)


PROBABILITY = (0.05, 0.4, 0.1, 0.25, 0.2)
SETTINGS: dict[str, tuple[Sampling, tuple[float, ...]]] = {
    "greedy": (Sampling(), (0, 1, 0, 0, 0)),
    "all": (Sampling(temperature=1), PROBABILITY),
    "cold": (Sampling(temperature=0.5), tuple(x**2 / sum(y**2 for y in PROBABILITY) for x in PROBABILITY)),
    "top 2": (Sampling(temperature=1, top_k=2), (0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)),
    "more than there are": (Sampling(temperature=1, top_k=9), PROBABILITY),
    "nucleus": (Sampling(temperature=1, top_p=0.7), (0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85)),
    "nucleus of one": (Sampling(temperature=1, top_p=0.01), (0, 1, 0, 0, 0)),
    "both": (Sampling(temperature=1, top_k=3, top_p=0.6), (0, 0.4 / 0.65, 0, 0.25 / 0.65, 0)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_shares_of_the_draws(name: str) -> None:
    """Draws on an even grid give each token its probability, to a step of the grid."""
    how, expected = SETTINGS[name]
    grid = torch.arange(4000) / 4000
    chosen = decode.pick(torch.tensor(PROBABILITY).log().expand(4000, -1), grid, how)
    got = torch.bincount(chosen, minlength=5) / 4000
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1.5 / 4000)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_give_no_token(wrong: float) -> None:
    logits = torch.tensor([[0.0, wrong, 1.0], [0.0, 2.0, 1.0]])
    for how in (Sampling(), Sampling(temperature=1.0)):
        assert decode.pick(logits, torch.tensor([0.0, 0.5]), how).tolist()[0] == -1
        assert decode.pick(logits, torch.tensor([0.0, 0.5]), how).tolist()[1] >= 0


@pytest.mark.parametrize("how", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9)])
def test_no_token_of_probability_zero_is_drawn(how: Sampling) -> None:
    """At both ends of the range of draws, with certain and impossible tokens at the ends of the vocabulary."""
    logits = torch.tensor([[-200.0, 0.0, -200.0], [0.0, -200.0, -200.0], [-200.0, -200.0, 0.0]])
    for draw in (0.0, 1 - 2.0**-24):
        assert decode.pick(logits, torch.full((3,), draw), how).tolist() == [1, 0, 2]


def leaves_of(node: Any) -> list[Tensor]:
    return [leaf for _, leaf in tree.leaves(node) if isinstance(leaf, Tensor)]


@torch.no_grad()
def test_a_state_can_be_continued_twice() -> None:
    """Pure: what was made of a state leaves it as it was."""
    c = MODELS["gqa, global in turn"]
    p, bias, env, tokens = parameters(c), shapes.router_bias(c), environment(c, c.max_positions), tokens_of(c)
    begun = decode.begin(p, torch.zeros(2, dtype=torch.int32), POSITIONS, env, c)
    _, state = decode.extend(p, tokens[:, :8], begun, bias, env, c)
    before = [leaf.clone() for leaf in leaves_of(state)]
    first, _ = decode.extend(p, tokens[:, 8:9], state, bias, env, c)
    again, _ = decode.extend(p, tokens[:, 8:9], state, bias, env, c)
    assert torch.equal(first, again)
    assert all(torch.equal(*pair) for pair in zip(before, leaves_of(state), strict=True))
