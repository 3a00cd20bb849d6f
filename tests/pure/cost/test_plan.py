"""Counts against independent counters: FLOPs against torch's, memory against what autograd keeps."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nmoe.config import sections as s
from nmoe.effects.device import ops
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import count
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.core.layout import ALIGNMENT, layout
from nmoe.pure.core.spec import POLICY
from nmoe.pure.cost import flops
from nmoe.pure.cost.plan import activation_bytes, plan
from nmoe.pure.model import model
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.experts import moe_experts
from nmoe.pure.model.ops import environment
from tests import shapes
from tests.effects.train.tiny import tiny
from tests.kernels.exchange.nvshmem import experts_by_segment


@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("dense", "depth"), [(0, 0), (2, 0), (1, 2), (3, 1)])
def test_flops_are_those_of_torchs_counter(q_lora_rank: int | None, shared: int, dense: int, depth: int) -> None:
    config = tiny(q_lora_rank=q_lora_rank, sequence_length=24)
    c = attrs.evolve(
        config.model,
        num_dense_layers=dense,
        moe=attrs.evolve(config.model.moe, num_shared_experts=shared),
        mtp=s.Mtp(depth=depth) if depth else None,
    )
    specs, dims = model.specs(c), model.dims(c)
    params = tree.map(lambda _, leaf: leaf.requires_grad_(), init(Key(0), specs, dims))
    # rows run through their own experts only, attention as two plain products
    env = environment(c, 24)
    by_segment = partial(moe_experts, experts=experts_by_segment)
    env = attrs.evolve(env, ops=attrs.evolve(env.ops, experts=by_segment))
    tokens = torch.randint(c.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(len(c.mixtures()), c.moe.num_experts)
    batch = model.Batch(tokens, tokens, ())
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        x, _ = model.forward(params, tokens, bias, env, c)
        x @ params.head
        if depth:
            model.ahead(params, x, batch, bias[c.num_layers - dense :], env, c, chunk=16, z_loss=0.0)
    planned = flops.forward_flops(c, specs, dims, sequence_length=24, causal=False)
    assert forward.get_total_flops() == tokens.numel() * planned.total()
    with FlopCounterMode(display=False) as training:
        model.objective(
            params,
            batch,
            bias,
            env,
            c,
            num_targets=torch.tensor(72),
            num_sequences=3,
            chunk=16,
            mtp_weight=0.3,
        )[0].backward()
    assert training.get_total_flops() == tokens.numel() * planned.training()


def test_flops_of_gpt_oss_are_those_of_torchs_counter() -> None:
    """Rows through their own experts only; the biases of the second products are a product of their own."""
    c = shapes.CLAMPED
    p, tokens = shapes.parameters(c, dtype=torch.float32), shapes.batch(c, positions=24).tokens
    env = shapes.env(c)
    by_segment = partial(moe_experts, experts=experts_by_segment)
    env = attrs.evolve(env, ops=attrs.evolve(env.ops, experts=by_segment))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        x, _ = model.forward(p, tokens, shapes.router_bias(c, dtype=torch.float32), env, c)
        x @ p.head
    planned = flops.forward_flops(c, model.specs(c), model.dims(c), sequence_length=24, causal=False)
    assert counted.get_total_flops() == tokens.numel() * planned.total()


def test_causal_flops_count_the_kept_half() -> None:
    c = tiny().model
    specs, dims = model.specs(c), model.dims(c)
    whole = flops.forward_flops(c, specs, dims, sequence_length=7, causal=False)
    causal = flops.forward_flops(c, specs, dims, sequence_length=7, causal=True)
    kept = int(torch.ones(7, 7).tril().sum())
    assert causal.attention * 7 * 49 == whole.attention * 7 * kept
    assert attrs.evolve(causal, attention=0) == attrs.evolve(whole, attention=0)


def test_parameters_are_those_of_the_tree() -> None:
    c = tiny().model
    specs, dims = model.specs(c), model.dims(c)
    counted = count(specs, dims, top_k=c.moe.top_k)
    values = dict(tree.leaves(init(Key(0), specs, dims)))
    assert counted.total == sum(value.numel() for value in values.values())
    routed = sum(
        value.numel()
        for path, value in values.items()
        if path.endswith(("ffn.up", "ffn.down")) and value.ndim > 2 and value.shape[0] == 8
    )
    assert counted.routed == routed
    assert counted.active == counted.total - routed * 6 // 8


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_parameter_has_its_own_place(compute: str, world: int) -> None:
    c, rules = tiny().model, tiny().optim.optimizers()
    specs, dims = model.specs(c), model.dims(c)
    formats: Any = {"compute": compute, "moments": "fp32"}
    arenas = layout(specs, dims, optimizers=rules, microbatches=1, world=world, **formats)
    seen: dict[str, int] = {}
    for arena in arenas:
        end = 0
        for slot in arena.slots:
            assert slot.offset >= end and slot.offset % ALIGNMENT == 0
            end = slot.offset + slot.size()
            seen[slot.path] = slot.size() * (world if arena.policy.shard else 1)
            policy = POLICY[slot.spec.role]
            assert (policy.group, policy.decay, policy.shard) == (
                arena.policy.group,
                arena.policy.decay,
                arena.policy.shard,
            )
            wanted = torch.bfloat16 if compute == "bf16" and policy.storage == "compute" else torch.float32
            assert arena.storage is wanted
        assert end <= arena.size < end + ALIGNMENT * arena.parts
    assert seen == {path: spec.size(dims) for path, spec in tree.leaves(specs)}


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("shape", ["small", "wide", "clamped"])
def test_activation_estimate_is_near_what_autograd_keeps(shape: str, depth: int) -> None:
    config = tiny(vocab_size=61, sequence_length=48, q_lora_rank=24)
    c = (
        config.model
        if shape == "small"
        else attrs.evolve(
            config.model, hidden_size=96, moe=attrs.evolve(config.model.moe, intermediate_size=64, top_k=4)
        )
    )
    if shape == "clamped":
        c = attrs.evolve(c, moe=attrs.evolve(c.moe, biases=True, swiglu_limit=0.5, intermediate_size=128))
    c = attrs.evolve(c, mtp=s.Mtp(depth=depth) if depth else None)
    specs, dims = model.specs(c), model.dims(c)
    params = tree.map(lambda _, leaf: leaf.requires_grad_(), init(Key(0), specs, dims))
    env = environment(c, 48, ops.build(torch.device("cpu"), c))
    tokens = torch.randint(c.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    parameters = {leaf.untyped_storage().data_ptr() for _, leaf in tree.leaves(params)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bias = torch.zeros(2 + depth, c.moe.num_experts)
        x, report = model.forward(params, tokens, bias, env, c)
        if depth:
            batch = model.Batch(tokens, tokens, ())
            x = model.ahead(params, x, batch, bias[2:], env, c, chunk=16, z_loss=0.0)
    estimate = activation_bytes(c, dims, tokens=tokens.numel(), sequence_length=48, element=4, square=False)
    # of the head, each loss keeps a gradient, which the plan counts with the logits
    assert estimate == pytest.approx(sum(kept.values()) - depth * 4 * params.head.numel(), rel=0.15)
    del x, report


def test_memory_follows_formats_and_ranks() -> None:
    config = tiny(compute="bf16", batch_size=8, microbatch_size=1)
    one, four = (plan(config, make_blueprint(config, ranks, ranks), mfu=0.4) for ranks in (1, 4))
    assert one.microbatches == 8 and four.microbatches == 2 and four.expert_ranks == 4
    c = config.model
    specs, dims = model.specs(c), model.dims(c)
    wide = sum(spec.size(dims) for _, spec in tree.leaves(specs) if POLICY[spec.role].storage == "fp32")
    total = one.parameters.total
    padding = 2048
    assert one.memory.parameters == pytest.approx(2 * total + 2 * wide, abs=4 * padding)
    assert one.memory.remainders == pytest.approx(2 * (total - wide), abs=2 * padding)
    assert one.memory.gradients == pytest.approx(4 * total, abs=4 * padding)
    assert one.memory.moments == pytest.approx(8 * total, abs=8 * padding)
    assert four.memory.moments == pytest.approx(one.memory.moments / 4, abs=8 * padding)
    muon = attrs.evolve(config.optim.expert, optimizer="muon")
    config = attrs.evolve(config, optim=attrs.evolve(config.optim, expert=muon))
    saved = 4 * one.parameters.routed
    memory = plan(config, make_blueprint(config), mfu=0.4).memory
    assert memory.moments == pytest.approx(one.memory.moments - saved, abs=4 * padding)
    # of experts up: 8 x 32 x 2 x 16; beside activations only as far as it is more than they were
    assert (one.memory.update, memory.update) == (0, 8192 * 32)
    kept = memory.parameters + memory.remainders + memory.gradients + memory.moments
    assert memory.total() == kept + max(memory.activations + memory.logits, memory.update)
    on_four = plan(config, make_blueprint(config, 4, 4), mfu=0.4).memory
    assert on_four.update == memory.update // 4
    # by kernels all matrices of a size at once: of two layers 32 of 32 x 16, twice in bf16, and four of 16 x 16
    on_gpu = attrs.evolve(config, run=attrs.evolve(config.run, device="cuda"))
    assert plan(on_gpu, make_blueprint(on_gpu), mfu=0.4).memory.update == 2 * 32 * (2 * 32 * 16 + 4 * 16 * 16)
    assert plan(config, make_blueprint(config), mfu=0.2).seconds() == pytest.approx(2 * one.seconds())
    assert s.Config is type(config)
