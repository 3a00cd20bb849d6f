"""The model against `transformers`' DeepSeek-V3, DeepSeek-V2 and gpt-oss."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.model import hf
from nmoe.pure.model.model import Batch, Transformer, forward, objective
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.model.rope import Rope
from tests import shapes

# torch says so of the shared experts' matrices where there are none
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")


def theirs(c: sections.Model, p: Transformer, bias: Tensor) -> Any:
    """Their model with our parameters, every name matched."""
    model_class = getattr(transformers, hf.family_of(c)[1].architecture)
    config = model_class.config_class(**hf.settings(c))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    network = model_class(config)
    for layer in network.model.layers:
        # theirs is 1e-6 whatever the config says
        for norm in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(layer.self_attn, norm, None) is not None:
                getattr(layer.self_attn, norm).variance_epsilon = c.norm_eps
    network.to(dtype=p.embed.dtype)
    network.load_state_dict(hf.state_dict(p, bias, c), strict=True)
    return network


def their_table(network: Any, positions: int) -> Rope:
    """Their rotation table, in the format of their parameters; V3 keeps every column twice, V2 complex numbers.

    That of gpt-oss has YaRN's whole factor on queries and keys, of which ours leaves all to the scores.
    """
    table = network.model.rotary_emb(network.lm_head.weight, torch.arange(positions)[None])
    if isinstance(table, Tensor):
        return Rope(table[0].real, table[0].imag)
    cos, sin = table
    if network.config.model_type == "gpt_oss":
        factor = network.model.rotary_emb.attention_scaling
        return Rope(cos[0] / factor, sin[0] / factor)
    return Rope(*(each[0].chunk(2, dim=-1)[0] for each in (cos, sin)))


CONFIGS = {
    **shapes.DEEPSEEK,
    **shapes.SOFTMAX,
    **shapes.GPT_OSS,
    "everything": shapes.config(
        max_positions=512,
        norm_eps=1e-3,
        embedding_scale=10.0,
        logit_scale=0.3,
        attention=shapes.attention(
            q_lora_rank=12, yarn=attrs.evolve(shapes.YARN, mscale=1.0), v_head_dim=2, rope_theta=500.0
        ),
        moe=shapes.mixture(num_groups=2, top_k_groups=1, top_k=2, num_shared_experts=2, route_scale=1.7),
    ),
}


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_every_gradient(name: str) -> None:
    c = CONFIGS[name]
    p, bias, batch = shapes.parameters(c), shapes.router_bias(c), shapes.batch(c, positions=24)
    network = theirs(c, p, bias)
    env = attrs.evolve(shapes.env(c), tables=their_table(network, 24))

    logits = network(batch.tokens).logits
    hidden, _ = forward(p, batch.tokens, bias, env, c)
    torch.testing.assert_close(hidden @ p.head * c.logit_scale, logits, rtol=1e-9, atol=1e-9)

    their_loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
    loss, gradients = our_gradients(p, batch, bias, env, c)
    torch.testing.assert_close(loss, their_loss, rtol=1e-12, atol=1e-12)

    names = dict(network.named_parameters())
    their_gradients = dict(zip(names, torch.autograd.grad(their_loss, list(names.values())), strict=True))
    # Folded scales make the mapping more than a renaming: pull their gradients back through it
    mapped = {key: tensor for key, tensor in hf.state_dict(p, bias, c).items() if key in names}
    assert mapped.keys() == names.keys()
    paths, leaves = zip(*tree.leaves(p), strict=True)
    pulled = torch.autograd.grad(list(mapped.values()), leaves, [their_gradients[key] for key in mapped])
    for path, ours, expected in zip(paths, gradients, pulled, strict=True):
        assert ours.abs().max() > 1e-6, path
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda text, path=path: f"{path}: {text}")


def our_gradients(
    p: Transformer, batch: Batch, bias: Tensor, env: Env, c: sections.Model
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss without the balance term and the gradient of every leaf."""
    c = attrs.evolve(c, moe=attrs.evolve(c.moe, sequence_balance=0.0))
    counted = (batch.targets >= 0).sum()
    loss, _, _ = objective(p, batch, bias, env, c, num_targets=counted, num_sequences=2, chunk=7)
    return loss.detach(), torch.autograd.grad(loss, [leaf for _, leaf in tree.leaves(p)])


@pytest.mark.parametrize("name", CONFIGS)
def test_single_precision(name: str) -> None:
    """Theirs untouched, in fp32, with our own table."""
    c = CONFIGS[name]
    p, bias = shapes.parameters(c, dtype=torch.float32), shapes.router_bias(c, dtype=torch.float32)
    tokens = shapes.batch(c, positions=24).tokens
    with torch.no_grad():
        hidden, _ = forward(p, tokens, bias, shapes.env(c), c)
        logits = theirs(c, p, bias)(tokens).logits
    torch.testing.assert_close(hidden @ p.head * c.logit_scale, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", CONFIGS)
def test_our_table_is_theirs_rounded_once(name: str) -> None:
    """Half an ulp of fp32 for values up to the table's scale."""
    c = CONFIGS[name]
    ours = environment(c, 64).tables
    expected = their_table(theirs(c, shapes.parameters(c), shapes.router_bias(c)), 64)
    for mine, right in ((ours.cos, expected.cos), (ours.sin, expected.sin)):
        assert mine.dtype == torch.float32
        assert right.dtype == torch.float64
        assert (mine - right).abs().max() <= 2.0**-24 * max(1.0, right.abs().max().item())
