"""What is made again in the backward pass is what was there: bitwise the same training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

from nmoe.effects.device import process
from nmoe.effects.train.build import fresh
from nmoe.effects.train.step import make_step
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Batch
from tests.effects.train.tiny import ATTENTIONS, tiny, with_attention

COUNTED = {"norm": "norm", "add_norm": "norm", "swiglu": "activation"}
"""Ops, and as what their calls are counted."""

RT = process.Runtime(device=torch.device("cpu"), rank=0, world=1, peak_flops=1.0)


def trained(
    policy: Any, *, compute: str, steps: int = 3, attention: str = ""
) -> tuple[list[torch.Tensor], Counter[str]]:
    """Arenas after some steps, and how often norms and activations were computed."""
    config = tiny(compute=compute, q_lora_rank=12)
    config = with_attention(config, attention) if attention else config
    config = attrs.evolve(config, train=attrs.evolve(config.train, recompute=policy))
    blueprint = make_blueprint(config)
    state, env = fresh(config, blueprint, RT)
    calls: Counter[str] = Counter()

    def counting(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return op(*arguments, **options)

        return run

    by_name = {name: counting(kind, getattr(env.ops, name)) for name, kind in COUNTED.items()}
    counted = attrs.evolve(env, ops=attrs.evolve(env.ops, **by_name))
    step = make_step(config, blueprint, counted, RT, mark=lambda name: None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(61, (1, 2, 17), generator=generator)
        state, _ = step(state, Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), ()))
    return [arena.value.clone() for arena in state.arenas], calls


@pytest.mark.parametrize("policy", ["cheap", "full"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_recomputing_changes_no_bit(policy: str, compute: str) -> None:
    plain, few = trained("none", compute=compute)
    again, more = trained(policy, compute=compute)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # in each of three steps once more: three norms or more of each of three blocks, and the activation of its MLP
    assert more["norm"] - few["norm"] >= 3 * 3 * 3
    assert (few["activation"], more["activation"]) == (3 * 3, 2 * 3 * 3)


@pytest.mark.parametrize("policy", ["cheap", "full"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_recomputing_changes_no_bit_of_any_kind_of_attention(policy: str, attention: str) -> None:
    plain, few = trained("none", compute="fp32", attention=attention)
    again, more = trained(policy, compute="fp32", attention=attention)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert more["norm"] >= few["norm"] + 3 * 3  # one a block and step at least
