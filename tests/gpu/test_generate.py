"""Generation on a GPU: a recorded token is the eager one, and the text that of no cache at all."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config import sections
from nmoe.effects.checkpoint import weights
from nmoe.effects.device import graph, ops
from nmoe.effects.train import generate
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.model import decode, model
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.ops import environment
from tests import shapes
from tests.kernels.truth import check
from tests.pure.model.test_decode import MODELS, parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2], [7, 1, 8, 2]]
TOKENS = 20
NEVER = 10**9
DRAWN = Sampling(temperature=1.5)

MOE = sections.Moe(num_experts=8, top_k=2, num_shared_experts=1, intermediate_size=128)
MLA = sections.Mla(
    num_heads=4, q_lora_rank=256, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
BF16: dict[str, Any] = {
    "mla": MLA,
    "mla, whole queries": attrs.evolve(MLA, q_lora_rank=None),
    "gqa": sections.Gqa(num_heads=8, num_kv_heads=2, head_dim=64, window=128, global_every=2, sinks=True),
    "kda": sections.Kda(num_heads=2, head_dim=128),
    "kda, mla": sections.Mixed(pattern="ab", a=sections.Kda(num_heads=2, head_dim=128), b=MLA),
}


def placed(c: sections.Model, params: Any, device: str, kernels: bool) -> generate.Network:
    """The network there; in bf16 by the kernels."""
    where = torch.device(device)
    env = environment(c, c.max_positions, ops.build(where, c) if kernels else None)
    params, bias, env = tree.map(
        lambda _, leaf: leaf.to(where) if isinstance(leaf, Tensor) else leaf,
        (params, shapes.router_bias(c, dtype=torch.float32), env),
    )
    return generate.Network(
        params=params,
        router_bias=bias,
        env=env,
        config=c,
        vocab_size=c.vocab_size,
        single_=ops.single_(where, c) if kernels else None,
        greedy=ops.greedy(where) if kernels else None,
    )


def ids(network: generate.Network, prompts: Any = PROMPTS, *, cached: bool = True, sampling: Sampling = DRAWN) -> Any:
    keys = [Key(0).fold(place) for place in range(len(prompts))]
    return list(generate.steps(network, prompts, num_tokens=TOKENS, sampling=sampling, keys=keys, cached=cached))


@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_token_changes_no_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: replayed, launched one by one, without caches, and on a CPU; prompts of three lengths."""
    c = MODELS[name]
    params = tree.map(lambda _, leaf: leaf.float(), parameters(c))
    network = placed(c, params, "cuda", kernels=False)
    recorded = ids(network)
    assert ids(network, cached=False) == recorded
    monkeypatch.setattr(graph, "EAGER_STEPS", NEVER)
    assert ids(network) == recorded
    assert ids(placed(c, params, "cpu", kernels=False)) == recorded


def in_bf16(name: str, moe: sections.Moe = MOE) -> tuple[sections.Model, Any]:
    """A model and random weights, large enough for texts that do not repeat one token."""
    c = sections.Model(
        vocab_size=512,
        hidden_size=256,
        num_layers=3,
        num_dense_layers=1,
        intermediate_size=512,
        max_positions=64,
        attention=BF16[name],
        moe=moe,
    )
    generator = torch.Generator().manual_seed(0)
    params = {
        path: torch.randn(shape, generator=generator).to(torch.bfloat16 if kind == "BF16" else torch.float32) / 8
        for path, (kind, shape) in weights.formats_of(model.specs(c), model.dims(c), torch.bfloat16).items()
    }
    return c, tree.map(lambda path, _: params[path], model.specs(c))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three rows", "one row"])
@pytest.mark.parametrize("name", BF16)
def test_kernels_give_the_same_text_recorded(name: str, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, bit for bit: greedy text of random weights."""
    c, params = in_bf16(name)
    network = placed(c, params, "cuda", kernels=True)
    recorded = ids(network, prompts, sampling=Sampling())
    assert len({tuple(column) for column in recorded}) > 1
    assert ids(network, prompts, sampling=Sampling()) == recorded
    monkeypatch.setattr(graph, "EAGER_STEPS", NEVER)
    assert ids(network, prompts, sampling=Sampling()) == recorded


@pytest.mark.parametrize("name", ["mla", "mla, whole queries"])
@torch.inference_mode()
def test_a_single_row_is_what_several_are(name: str) -> None:
    """Hidden states and caches of ten tokens, as near to fp64 as by the kernels for several rows; every expert is
    chosen, so that no rounding chooses another."""
    c, params = in_bf16(name, attrs.evolve(MOE, top_k=MOE.num_experts))
    params = tree.map(lambda _, leaf: leaf / 2, params)
    prompt = torch.tensor([PROMPTS[0]])

    def run(network: generate.Network, single: bool) -> list[Tensor]:
        given = (network.router_bias, network.env, network.config)
        where = network.router_bias.device
        padding = torch.zeros(1, dtype=torch.int32, device=where)
        state = decode.begin(network.params, padding, 40, network.env, c)
        _, state = decode.extend(network.params, prompt.to(where), state, *given, store=stored_)
        found = list[Tensor]()
        for at in range(10):
            token = torch.full((1, 1), 7 * at, device=where)
            if single:
                assert network.single_ is not None
                hidden, state = network.single_(network.params, token, state, *given)
            else:
                hidden, state = decode.extend(network.params, token, state, *given, store=stored_)
            found.append(hidden)
        return [torch.cat(found).cpu(), *(cache.cpu() for cache in state.caches)]

    network = placed(c, params, "cuda", kernels=True)
    right = run(placed(c, tree.map(lambda _, leaf: leaf.double(), params), "cpu", kernels=False), False)
    check(run(network, True), run(network, False), right, factor=1.5, steps=1)


def stored_(cache: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    return cache.index_copy_(1, place, rows)


def test_no_token_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token is begun before the last one is read."""
    c = MODELS["mla"]
    network = placed(c, tree.map(lambda _, leaf: leaf.float(), parameters(c)), "cuda", kernels=False)
    begun: list[int] = []
    replay = graph.replay

    def counted(*arguments: Any) -> Any:
        begun.append(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return replay(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graph, "replay", counted)
    keys = [Key(0)] * len(PROMPTS)
    columns = generate.steps(network, PROMPTS, num_tokens=TOKENS, sampling=Sampling(), keys=keys, cached=True)
    for count, _ in enumerate(columns, 1):
        assert len(begun) == max(0, min(count, TOKENS - 1) - graph.EAGER_STEPS)
