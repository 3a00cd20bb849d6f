"""Kinds of attention by layer: Kimi Linear against `transformers`, and what every room makes of a mixed model."""

from __future__ import annotations

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.cost.flops import forward_flops
from nmoe.pure.cost.plan import activation_bytes
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, layers
from nmoe.pure.model.ops import environment
from nmoe.pure.optim.muon import by_matrix
from tests import shapes
from tests.conftest import Doubled
from tests.kimi_linear import hf_settings, hf_tensors

DELTA = sections.Kda(num_heads=2, head_dim=8)
LATENT = shapes.attention(position="none")
GROUPED = sections.Gqa(num_heads=4, num_kv_heads=2, head_dim=4, window=3)


def mixed(pattern: str = "ab", last: str = "", **changes: object) -> sections.Model:
    """Three layers of delta and latent attention."""
    attention = sections.Mixed(pattern=pattern, last=last, a=DELTA, b=LATENT)
    return shapes.config(attention=attrs.evolve(attention, **changes))


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs in fp64, also where it says `.float()`; see `tests.conftest.doubled`."""
    monkeypatch.setattr(modeling_kimi_linear, "torch", Doubled())
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def theirs(c: sections.Model, p: model.Transformer, bias: Tensor) -> KimiLinearForCausalLM:
    """Their model with our parameters, every name matched."""
    config = KimiLinearConfig(**hf_settings(c))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    network = KimiLinearForCausalLM(config)
    for name, module in network.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            vars(module)["variance_epsilon"] = c.norm_eps  # theirs is 1e-6 whatever the config says
    network.to(dtype=p.embed.dtype)  # pyright: ignore[reportCallIssue]
    network.load_state_dict(hf_tensors(p, bias, c), strict=True)
    return network


MODELS = {
    "in turn": mixed("ab"),
    "the last one latent": mixed("a", "b"),
    "query latent": mixed("ba", b=attrs.evolve(LATENT, q_lora_rank=7)),
}


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("positions", [24, 70])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient_are_those_of_kimi_linear(name: str, positions: int) -> None:
    c = MODELS[name]
    c = attrs.evolve(c, max_positions=128, moe=attrs.evolve(c.moe, sequence_balance=0.0))
    p, bias, batch = shapes.parameters(c), shapes.router_bias(c), shapes.batch(c, positions=positions)
    network = theirs(c, p, bias)
    logits = network(batch.tokens).logits
    env = shapes.env(c)
    hidden, _ = model.forward(p, batch.tokens, bias, env, c)
    torch.testing.assert_close(hidden @ p.head, logits, rtol=1e-9, atol=1e-9)

    their_loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    counted = (batch.targets >= 0).sum()
    loss, _, _ = model.objective(p, batch, bias, env, c, num_targets=counted, num_sequences=2, chunk=7)
    torch.testing.assert_close(loss, their_loss, rtol=1e-12, atol=1e-12)

    names = dict(network.named_parameters())
    right = dict(zip(names, torch.autograd.grad(their_loss, list(names.values())), strict=True))
    mapped = {key: tensor for key, tensor in hf_tensors(p, bias, c).items() if key in names}
    assert mapped.keys() == names.keys()
    paths, leaves = zip(*tree.leaves(p), strict=True)
    ours = torch.autograd.grad(loss, leaves)
    pulled = torch.autograd.grad(list(mapped.values()), leaves, [right[key] for key in mapped])
    for path, mine, expected in zip(paths, ours, pulled, strict=True):
        assert mine.abs().max() > 1e-7, path
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9, msg=lambda text, path=path: f"{path}: {text}")


def test_letters_repeat_and_the_last_layers_have_their_own() -> None:
    """Kimi Linear's 27 layers: every fourth is latent, and the last."""
    c = sections.Mixed(pattern="aaab", last="b", a=DELTA, b=LATENT)
    assert [at for at, letter in enumerate(c.letters(27), 1) if letter == "b"] == [4, 8, 12, 16, 20, 24, 27]
    assert attrs.evolve(c, last="").letters(6) == "aaabaa"


def test_parts_of_one_kind_keep_their_own_sizes() -> None:
    """Two tables of grouped-query attention: axis letters, initial values, FLOPs and bytes are each table's."""
    wide = attrs.evolve(GROUPED, num_heads=2, num_kv_heads=1, head_dim=16, window=None)
    c = mixed("ab", a=GROUPED, b=wide)
    specs, dims = model.specs(c), model.dims(c)
    for layer, part in enumerate((GROUPED, wide, GROUPED)):
        alone = attrs.evolve(c, attention=part)
        expected = init(Key(3), model.specs(alone), model.dims(alone)).blocks[layer].attention
        found = init(Key(3), specs, dims).blocks[layer].attention
        torch.testing.assert_close(dict(tree.leaves(found)), dict(tree.leaves(expected)), rtol=0, atol=0)
        kind, section = layers(c)[layer]
        assert (kind, section) == (KINDS[sections.Gqa], part)
    singles = [attrs.evolve(c, attention=part) for part in (GROUPED, wide)]
    each = [forward_flops(one, model.specs(one), model.dims(one), sequence_length=24, causal=True) for one in singles]
    both = forward_flops(c, specs, dims, sequence_length=24, causal=True)
    assert 3 * both.attention == 2 * each[0].attention + each[1].attention
    assert 3 * both.projections == 2 * each[0].projections + each[1].projections
    first, second, total = (
        activation_bytes(one, model.dims(one), tokens=24, sequence_length=24, element=4, square=True)
        for one in (*singles, c)
    )
    assert 3 * total == 2 * first + second


def test_muon_sees_the_matrices_that_the_kind_alone_has() -> None:
    c = mixed("ab")
    specs, dims = model.specs(c), model.dims(c)
    for layer, part in enumerate((DELTA, LATENT)):
        alone = attrs.evolve(c, attention=part)
        expected = dict(tree.leaves(model.specs(alone).blocks[layer].attention))
        for path, spec in tree.leaves(specs.blocks[layer].attention):
            if spec.role.value != "matrix":
                continue
            value = torch.arange(float(spec.size(dims)))
            both = [
                by_matrix(lambda x: x / x.square().sum((-2, -1), keepdim=True), value, spec=s, shape=s.shape(d), dims=d)
                for s, d in ((spec, dims), (expected[path], model.dims(alone)))
            ]
            torch.testing.assert_close(*both, rtol=0, atol=0)


def logits(p: model.Transformer, tokens: Tensor, c: sections.Model, start: Tensor | tuple[()] = ()) -> Tensor:
    """[B T V]"""
    return model.forward(p, tokens, shapes.router_bias(c), shapes.env(c), c, start)[0] @ p.head


def test_a_packed_document_reads_as_if_alone() -> None:
    """Documents of one token, of five, of the rest: memory, convolutions and keys begin with each."""
    c = mixed("ab")
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=12).tokens
    begins = (0, 1, 6)
    start = torch.zeros(1, 12, dtype=torch.int32)
    for begin in begins:
        start[:, begin:] = begin
    found = logits(p, tokens, c, start)
    for begin, end in zip(begins, (*begins[1:], 12), strict=True):
        alone = logits(p, tokens[:, begin:end], c)
        torch.testing.assert_close(found[:, begin:end], alone, rtol=0, atol=1e-12)
    assert (logits(p, tokens, c) - found)[:, 1:].abs().max() > 1e-3


def test_without_position_latent_attention_has_none() -> None:
    """Tokens before the last in another order give the same last logits; with position they do not."""
    c = attrs.evolve(shapes.config(), num_layers=1, num_dense_layers=1, attention=LATENT)
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=8).tokens
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), 1)
    rotated = attrs.evolve(c, attention=attrs.evolve(LATENT, position=None))
    for one, same in ((c, True), (rotated, False)):
        both = [logits(p, each, one)[:, -1] for each in (tokens, shuffled)]
        assert torch.allclose(*both, rtol=0, atol=1e-12) == same


@pytest.mark.parametrize("limit", [None, 5.0])
def test_the_mixed_model_learns(limit: float | None) -> None:
    c = mixed("ab", a=attrs.evolve(DELTA, decay_limit=limit))
    p, batch, env = shapes.parameters(c, dtype=torch.float32), shapes.batch(c, positions=24), environment(c, 24)
    optimizer = torch.optim.AdamW([leaf for _, leaf in tree.leaves(p)], lr=1e-2)
    bias, losses = shapes.router_bias(c, dtype=torch.float32), list[float]()
    for _ in range(12):
        loss, _, _ = model.objective(
            p, batch, bias, env, c, num_targets=(batch.targets >= 0).sum(), num_sequences=2, chunk=16
        )
        loss.backward()
        gradients = [leaf.grad for block in p.blocks for _, leaf in tree.leaves(block.attention)]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
