"""Nothing in the core writes, draws or depends on where it runs; blocks compile once a kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nmoe.config import load_valid, sections
from nmoe.pure.core import tree
from nmoe.pure.model import model
from nmoe.pure.model.attention.cached import new_tokens
from nmoe.pure.model.attention.mla import mla
from nmoe.pure.model.experts import swiglu
from nmoe.pure.model.model import Batch
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.model.rope import Rope
from nmoe.pure.model.route import Routing
from nmoe.pure.optim.adamw import Moments, adamw
from tests import shapes
from tests.shapes import REFERENCE

Call = tuple[tuple[Any, ...], dict[str, Any]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routing() -> Routing:
    """Six tokens, two of four experts each."""
    return Routing(torch.tensor([[0, 3], [3, 1], [0, 1], [1, 3], [3, 0], [0, 3]]), normal(6, 2).abs())


def calls() -> dict[str, Call]:
    """Arguments for every operation."""
    x, angles = normal(6, 5), Rope(normal(6, 2), normal(6, 2))
    return {
        "norm": ((x, normal(5)), {"eps": 1e-6}),
        "add_norm": ((x, normal(6, 5, seed=1), normal(5)), {"eps": 1e-6}),
        "swiglu": ((normal(6, 2, 5),), {}),
        "project": ((normal(2, 6, 5), normal(5, 37), angles), {"num_heads": 3, "latent": 9}),
        "query": ((normal(2, 6, 5), normal(5, 3, 8), normal(2, 6, 4), angles), {}),
        "attend": ((normal(2, 6, 3, 8), normal(2, 6, 3, 9), normal(2, 6, 4)), {"scale": 0.3}),
        "attend_new": attend_new(),
        "route": ((x, normal(5, 4), normal(4)), {"top_k": 2}),
        "report": (
            (normal(2, 3, 4).abs(), routing().expert.view(2, 3, 2), normal(4), routing().expert),
            {"margins": True},
        ),
        "experts": ((x, routing(), normal(4, 5, 2, 3), normal(4, 3, 5)), {}),
        "shared": ((x, normal(5, 2, 3), normal(3, 5), swiglu), {}),
        "linear_cross_entropy": (
            (x, normal(5, 9), torch.tensor([1, -1, 3, 0, 8, 2])),
            {"chunk": 4, "logit_scale": 0.5, "z_loss": 0.1},
        ),
    }


def attend_new() -> Call:
    """Two tokens behind three in a cache with room for seven, of two rows of which one begins later."""
    attention = shapes.attention(q_lora_rank=7)
    c, width = shapes.config(attention=attention), attention.kv_lora_rank + attention.qk_rope_head_dim
    p, env = shapes.parameters(c, dtype=torch.float32), shapes.env(c)
    new = new_tokens(torch.tensor(3), (2, 2), torch.tensor([0, 2], dtype=torch.int32), 7)
    cached = (p.blocks[0].attention, normal(2, 2, c.hidden_size), normal(2, 7, width, seed=1), new, env.tables)
    return (*cached, env.ops.norm, env.ops.attention, attention), {"eps": 1e-6}


def model_calls() -> dict[str, tuple[Callable[..., Any], Call]]:
    """Arguments for the functions of the model, `block` for a mixture, and for the update rule."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    p, bias = shapes.parameters(c, dtype=torch.float32), shapes.router_bias(c, dtype=torch.float32)
    batch, env = shapes.batch(c), shapes.env(c)
    x = normal(2, 11, c.hidden_size)
    share = {"num_targets": torch.tensor(18), "num_sequences": 2, "chunk": 8, "z_loss": 1e-3}
    ops = env.ops
    attention = (p.blocks[0].attention, x, env.tables, ops.norm, ops.attention, c.attention)
    moments = Moments(normal(7), normal(7).abs())
    rates = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
    numbers = {"updates": torch.tensor(3), "lr": torch.tensor(0.1, dtype=torch.float64), **rates}
    return {
        "adamw": (adamw, ((normal(7), normal(7, seed=1), moments), numbers)),
        "mla": (mla, (attention, {"eps": 1e-6})),
        "block": (model.block, ((p.blocks[1], x, bias[0], env, c), {})),
        "forward": (model.forward, ((p, batch.tokens, bias, env, c), {})),
        "objective": (model.objective, ((p, batch, bias, env, c), share)),
    }


def functions(ops: Any) -> dict[str, Callable[..., Any]]:
    """Every function of a record of ops and of the records in it."""
    found: dict[str, Callable[..., Any]] = {}
    for field in attrs.fields(type(ops)):
        op = getattr(ops, field.name)
        found |= functions(op) if attrs.has(type(op)) else {field.name: op}
    return found


def test_every_operation_is_here() -> None:
    assert list(calls()) == list(functions(REFERENCE))


@pytest.mark.parametrize("name", [*calls(), *model_calls()])
def test_inputs_and_random_state_are_left_alone(name: str) -> None:
    """Forward and backward."""
    if name in calls():
        fn, (args, kwargs) = functions(REFERENCE)[name], calls()[name]
    else:
        fn, (args, kwargs) = model_calls()[name]
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for leaf in inputs:
        leaf.requires_grad_(leaf.is_floating_point() and name != "adamw")
    versions = [leaf._version for leaf in inputs]
    contents = [leaf.detach().clone() for leaf in inputs]
    state = torch.get_rng_state()

    result = fn(*args, **kwargs)
    outputs = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor) and each.requires_grad]
    if outputs:
        wanted = [leaf for leaf in inputs if leaf.requires_grad]
        torch.autograd.grad([each.sum() for each in outputs], wanted, allow_unused=True)

    assert [leaf._version for leaf in inputs] == versions
    assert all(torch.equal(leaf, content) for leaf, content in zip(inputs, contents, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def graded(run: Callable[..., Any], c: sections.Model, env: Env, seed: int) -> list[Tensor]:
    """Loss, what is reported, and every gradient."""
    p, bias = shapes.parameters(c, seed=seed, dtype=torch.float32), shapes.router_bias(c, dtype=torch.float32)
    loss, nll, report = model.objective(
        p,
        shapes.batch(c, seed=seed),
        bias,
        env,
        c,
        num_targets=torch.tensor(18),
        num_sequences=2,
        chunk=8,
        run=run,
    )
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in tree.leaves(p)])
    return [loss, nll, *pytree.tree_leaves(report), *gradients]


# dynamo looks whether a hidden state has a gradient, and torch warns it of that
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("latent", [None, 7])
def test_blocks_compile_once_a_kind_and_agree_with_eager(latent: int | None) -> None:
    """Two dense layers and three mixtures: two graphs, and no more on a second step."""
    c = shapes.config(num_layers=5, num_dense_layers=2, attention=shapes.attention(q_lora_rank=latent))
    env = shapes.env(c)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.block, fullgraph=True, backend=counter)
    for seed in (0, 1):
        ours, right = (graded(run, c, env, seed) for run in (compiled, model.block))
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == 2


PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_shipped_models_trace_without_memory(path: Path) -> None:
    """Forward and backward of one short sequence at full size."""
    c = load_valid(path, {}, ()).config.model
    dims = model.dims(c)
    p = tree.map(lambda path, spec: torch.empty(spec.shape(dims), device="meta").requires_grad_(), model.specs(c))
    tokens = torch.empty(1, 32, dtype=torch.long, device="meta")
    env = environment(c, 32)
    env = attrs.evolve(env, tables=tree.map(lambda _, values: values.to("meta"), env.tables))
    mixtures = c.num_layers - c.num_dense_layers
    loss, nll, report = model.objective(
        p,
        Batch(tokens, tokens, ()),
        torch.empty(mixtures, c.moe.num_experts, device="meta"),
        env,
        c,
        num_targets=torch.empty((), device="meta"),
        num_sequences=1,
        chunk=16,
    )
    loss.backward()
    assert loss.shape == nll.shape == ()
    assert report.load.shape == (mixtures, c.moe.num_experts)
    assert all(leaf.grad is not None for _, leaf in tree.leaves(p))


def test_deepseek_v3_has_as_many_parameters_as_deepseek_v3() -> None:
    """As published, with its vocabulary: 671,026,419,200 less the 58 x 256 router biases, which are state here."""
    c = attrs.evolve(load_valid(PRESETS[0].with_name("dsv3.toml"), {}, ()).config.model, vocab_size=129280)
    sizes = (spec.size(model.dims(c)) for _, spec in tree.leaves(model.specs(c)))
    assert sum(sizes) == 671_026_419_200 - 58 * 256
