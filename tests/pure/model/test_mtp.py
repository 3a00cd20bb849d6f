"""Multi-token prediction against modules of torch and `transformers` that read a published layout, in fp64."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.model import hf
from nmoe.pure.model.model import Batch, Transformer, forward, objective, targets_ahead
from tests import shapes
from tests.pure.model.test_parity import their_table, theirs

WEIGHT = 0.3
CONFIGS = {
    "one": shapes.config(mtp=sections.Mtp(depth=1)),
    "three, query latent, scaled embedding": shapes.config(
        attention=shapes.attention(q_lora_rank=7), embedding_scale=10.0, mtp=sections.Mtp(depth=3)
    ),
}


class Ahead(nn.Module):
    """One layer of multi-token prediction by the names of a published checkpoint."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.enorm, self.hnorm = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        block = DeepseekV3DecoderLayer(config, layer)
        for norm in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(block.self_attn, norm, None) is not None:
                getattr(block.self_attn, norm).variance_epsilon = eps  # theirs is 1e-6 whatever the config says
        self.block = block
        self.shared_head = nn.ModuleDict(
            {"norm": nn.RMSNorm(width, eps=eps), "head": nn.Linear(width, config.vocab_size, bias=False)}
        )

    def forward(self, tokens: Tensor, hidden: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """Logits and hidden state of rows that are cut where there is no further token."""
        y = self.eh_proj(torch.cat((self.enorm(self.embed_tokens(tokens)), self.hnorm(hidden)), dim=-1))
        length = y.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        y = self.block(y, attention_mask=mask, position_embeddings=tuple(each[:, :length] for each in tables))
        y = y[0] if isinstance(y, tuple) else y
        return self.shared_head["head"](self.shared_head["norm"](y)), y


def independent(c: sections.Model, p: Transformer, bias: Tensor) -> tuple[Any, list[Ahead], dict[str, Tensor]]:
    """Their main model, the layers after it, and the tensors of ours that they hold, by their names."""
    tensors = dict(hf.tensors(p, bias, c))
    network = theirs(c, p, bias)
    layers: list[Ahead] = []
    for layer in range(c.num_layers, c.num_layers + c.depth()):
        ahead = Ahead(network.config, layer).double()
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        experts = range(c.moe.num_experts)
        up = [
            torch.cat([own.pop(f"mlp.experts.{expert}.{kind}_proj.weight") for kind in ("gate", "up")])
            for expert in experts
        ]
        own["mlp.experts.gate_up_proj"] = torch.stack(up)
        own["mlp.experts.down_proj"] = torch.stack([own.pop(f"mlp.experts.{e}.down_proj.weight") for e in experts])
        beside = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")
        named = {(name if name.startswith(beside) else f"block.{name}"): value for name, value in own.items()}
        ahead.load_state_dict(named, strict=True)
        layers.append(ahead)
    return network, layers, tensors


def losses(network: Any, layers: list[Ahead], row: Tensor) -> list[Tensor]:
    """Summed loss of each depth over one text [T + 1] as the paper has it: rows get shorter, nothing is masked."""
    hidden = network.model(row[None, :-1]).last_hidden_state
    tables = network.model.rotary_emb(hidden, torch.arange(len(row))[None])
    sums: list[Tensor] = []
    for depth, layer in enumerate(layers, 1):
        if len(row) <= depth + 1:
            sums.append(hidden.new_zeros(()))
            continue
        logits, hidden = layer(row[None, depth:-1], hidden[:, : len(row) - depth - 1], tables)
        sums.append(F.cross_entropy(logits[0], row[depth + 1 :], reduction="sum"))
    return sums


def ours(c: sections.Model, p: Transformer, batch: Batch, bias: Tensor, env: Any, weight: float = WEIGHT) -> Any:
    c = attrs.evolve(c, moe=attrs.evolve(c.moe, sequence_balance=0.0))
    numbers: dict[str, Any] = {"num_targets": torch.tensor(20), "num_sequences": 2, "chunk": 7, "mtp_weight": weight}
    return objective(p, batch, bias, env, c, **numbers)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient(name: str) -> None:
    c = CONFIGS[name]
    p, bias = shapes.parameters(c), shapes.router_bias(c)
    texts = torch.randint(c.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    network, layers, _ = independent(c, p, bias)
    env = attrs.evolve(shapes.env(c), tables=their_table(network, 12))
    with torch.no_grad():
        each = torch.stack([torch.stack(losses(network, layers, row)) for row in texts]).sum(0)

    batch = Batch(texts[:, :-1], texts[:, 1:], ())
    loss, nll, report = ours(c, p, batch, bias, env)
    torch.testing.assert_close(torch.stack(report.ahead), each, rtol=1e-11, atol=0)
    torch.testing.assert_close(loss, nll / 20 + WEIGHT * each.mean() / 20, rtol=1e-12, atol=0)

    # Their weights as functions of ours: the copies of embedding and head give their gradients to one tensor.
    expected = reference_gradients(c, p, bias, network, layers, texts)
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in tree.leaves(p)])
    for (path, _), mine, right in zip(tree.leaves(p), gradients, expected, strict=True):
        assert right.abs().max() > 1e-6, path
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9, msg=lambda text, path=path: f"{path}: {text}")


def reference_gradients(
    c: sections.Model, p: Transformer, bias: Tensor, network: Any, layers: list[Ahead], texts: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of their loss, pulled back through the names to ours."""
    logits = network(texts[:, :-1]).logits
    total = F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten(), reduction="sum")
    total = total + WEIGHT * torch.stack([torch.stack(losses(network, layers, row)).mean() for row in texts]).sum()
    modules = {"": network, **{f"model.layers.{c.num_layers + at}.": layer for at, layer in enumerate(layers)}}
    names = [(prefix, name, weight) for prefix, module in modules.items() for name, weight in module.named_parameters()]
    theirs = torch.autograd.grad(total / 20, [weight for *_, weight in names])
    tensors = {**dict(hf.tensors(p, bias, c)), **hf.state_dict(p, bias, c)}
    roots: list[Tensor] = []
    pulled: list[Tensor] = []
    for (prefix, name, _), gradient in zip(names, theirs, strict=True):
        name = prefix + name.removeprefix("block.")
        if name in tensors:
            roots.append(tensors[name])
            pulled.append(gradient)
            continue
        stem, kind = name.rsplit(".", 1)
        assert kind in ("gate_up_proj", "down_proj"), name
        for expert, part in enumerate(gradient):
            parts = zip(("gate", "up"), part.chunk(2), strict=True) if kind == "gate_up_proj" else [("down", part)]
            for which, value in parts:
                roots.append(tensors[f"{stem}.{expert}.{which}_proj.weight"])
                pulled.append(value)
    return torch.autograd.grad(roots, [leaf for _, leaf in tree.leaves(p)], pulled)


@pytest.mark.usefixtures("doubled")
def test_documents_are_texts_of_their_own() -> None:
    """A row of three documents, one of them too short, against each of them alone: no target is in another one."""
    c = CONFIGS["three, query latent, scaled embedding"]
    p, bias = shapes.parameters(c), shapes.router_bias(c)
    lengths = (6, 2, 9)
    texts = [torch.randint(c.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    network, layers, _ = independent(c, p, bias)
    env = attrs.evolve(shapes.env(c), tables=their_table(network, 17))
    with torch.no_grad():
        each = torch.stack([torch.stack(losses(network, layers, text)) for text in texts]).sum(0)
    row = torch.cat(texts)[None]
    start = torch.tensor([[0] * 6 + [6] * 2 + [8] * 9], dtype=torch.int32)
    batch = Batch(row, torch.cat((row[:, 1:], row[:, :1]), dim=1), start)
    _, _, report = ours(c, p, batch, bias, env)
    torch.testing.assert_close(torch.stack(report.ahead), each, rtol=1e-11, atol=0)
    counted = [int((targets_ahead(batch, depth) >= 0).sum()) for depth in (1, 2, 3)]
    assert counted == [4 + 0 + 7, 3 + 0 + 6, 2 + 0 + 5]


def test_masked_targets_do_not_count_at_any_depth() -> None:
    batch = Batch(torch.arange(6)[None], torch.tensor([[1, -1, 3, 4, -1, 6]]), ())
    assert targets_ahead(batch, 1).tolist() == [[-1, 3, 4, -1, 6, -1]]
    assert targets_ahead(batch, 2).tolist() == [[3, 4, -1, 6, -1, -1]]


def test_the_main_model_does_not_know_of_it() -> None:
    """Hidden states, loss that is read, and gradients at weight 0 are those of the model without."""
    c = CONFIGS["one"]
    plain = attrs.evolve(c, mtp=None)
    p, bias = shapes.parameters(c), shapes.router_bias(c)
    main = attrs.evolve(p, mtp=())
    batch, env = shapes.batch(c), shapes.env(c)
    hidden, report = forward(p, batch.tokens, bias, env, c)
    alone, its_report = forward(main, batch.tokens, bias[:2], env, plain)
    assert torch.equal(hidden, alone) and torch.equal(report.load, its_report.load)
    loss, nll, report = ours(c, p, batch, bias, env, weight=0.0)
    expected, its_nll, its_report = ours(plain, main, batch, bias[:2], env)
    assert torch.equal(nll, its_nll) and torch.equal(loss, expected)
    assert report.load.shape == (3, 8) and torch.equal(report.load[:2], its_report.load)
    assert (report.load.sum(1) == 2 * 11 * 3).all()
    wanted = torch.autograd.grad(expected, [leaf for _, leaf in tree.leaves(main)])
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in tree.leaves(main)])
    assert all(torch.equal(mine, right) for mine, right in zip(gradients, wanted, strict=True))


def test_recorded_choices_are_replayed_at_every_depth() -> None:
    c = CONFIGS["three, query latent, scaled embedding"]
    p, bias, batch, env = shapes.parameters(c), shapes.router_bias(c), shapes.batch(c), shapes.env(c)
    loss, _, report = ours(c, p, batch, bias, env)
    assert len(report.routing) == 2 + 3
    numbers: dict[str, Any] = {"num_targets": torch.tensor(20), "num_sequences": 2, "chunk": 7, "mtp_weight": WEIGHT}
    c = attrs.evolve(c, moe=attrs.evolve(c.moe, sequence_balance=0.0))
    again, _, _ = objective(p, batch, -bias, env, c, **numbers, routing=report.routing)
    other, _, _ = objective(p, batch, -bias, env, c, **numbers)
    assert torch.equal(again, loss) and not torch.equal(other, loss)


def test_a_dense_model_predicts_ahead_with_dense_blocks() -> None:
    c = shapes.config(num_layers=2, num_dense_layers=2, mtp=sections.Mtp(depth=2))
    p = shapes.parameters(c)
    loss, _, report = ours(c, p, shapes.batch(c), shapes.router_bias(c), shapes.env(c))
    assert len(report.ahead) == 2 and report.load.shape == (0, 8)
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in tree.leaves(p)])
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)
