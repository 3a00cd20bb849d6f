"""Initial values: from whom they depend and from whom not."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.pure.core import tree
from nmoe.pure.core.init import init, initial, normal, ones, residual
from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import POLICY, Role, Spec
from nmoe.pure.model import model
from tests import shapes

KEY = Key(11).fold("init")


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_same_for_any_number_of_ranks(world: int) -> None:
    c = shapes.config()
    specs, dims = model.specs(c), model.dims(c)
    whole = init(KEY, specs, dims)
    parts = [init(KEY, specs, dims, rank=rank, world=world) for rank in range(world)]

    def check(path: str, spec: Any, value: Tensor, *shares: Tensor) -> None:
        assert value.dtype == torch.float32
        assert value.shape == spec.shape(dims)
        if POLICY[spec.role].shard:
            assert all(share.shape[0] == value.shape[0] // world for share in shares), path
            assert torch.equal(torch.cat(shares), value), path
        else:
            assert all(torch.equal(share, value) for share in shares), path

    tree.map(check, specs, whole, *parts)


def test_a_layer_more_moves_no_other_parameter() -> None:
    """Only the scale of what adds to the residual stream knows the depth."""
    few, many = (shapes.config(num_layers=layers) for layers in (3, 4))
    before, after = (dict(tree.leaves(init(KEY, model.specs(c), model.dims(few)))) for c in (few, many))
    assert before.keys() < after.keys()
    assert all(torch.equal(after[path], value) for path, value in before.items())

    deeper = dict(tree.leaves(init(KEY, model.specs(many), model.dims(many))))
    scaled = {path for path, value in before.items() if not torch.equal(deeper[path], value)}
    assert {path.split(".")[-1] for path in scaled} == {"out", "down"} - {"attention.down"}
    for path in scaled:
        torch.testing.assert_close(deeper[path] * math.sqrt(4 / 3), before[path])


def test_another_width_of_one_part_moves_no_other() -> None:
    narrow, wide = (shapes.config(moe=shapes.mixture(intermediate_size=size)) for size in (9, 10))
    before, after = (dict(tree.leaves(init(KEY, model.specs(c), model.dims(c)))) for c in (narrow, wide))
    moved = {path for path in before if not torch.equal(before[path], after[path])}
    assert moved == {
        f"blocks.{layer}.ffn.{name}" for layer in (1, 2) for name in ("up", "down", "shared.up", "shared.down")
    }


def test_no_two_draws_share_a_seed() -> None:
    """A parameter, or an expert's part of one, is one draw."""
    seeds: list[int] = []

    def recorded(generator: torch.Generator, shape: tuple[int, ...], dims: Any) -> Tensor:
        seeds.append(generator.initial_seed())
        return torch.zeros(shape)

    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    specs = tree.map(lambda path, spec: attrs.evolve(spec, init=recorded), model.specs(c))
    init(KEY, specs, model.dims(c))
    leaves = tree.leaves(specs)
    sharded = sum(spec.role is Role.EXPERT for _, spec in leaves)
    assert len(seeds) == len(leaves) + sharded * (c.moe.num_experts - 1)
    assert len(set(seeds)) == len(seeds)


def test_the_number_of_the_key_matters() -> None:
    c = shapes.config()
    values = [init(Key(seed).fold("init"), model.specs(c), model.dims(c)) for seed in (0, 1)]
    same = [path for path, _ in tree.leaves(values[0]) if torch.equal(*(dict(tree.leaves(v))[path] for v in values))]
    assert all(path.endswith("norm") for path in same)


@pytest.mark.parametrize(
    ("draw", "variance"),
    [
        (normal("D"), 1 / 50),
        (normal("H", "U"), 1 / 12),
        (residual("D"), 1 / 50 / 14),
        (residual("H", "U"), 1 / 12 / 14),
    ],
)
@pytest.mark.parametrize("role", [Role.MATRIX, Role.EXPERT])
def test_mean_and_deviation(draw: Any, variance: float, role: Role) -> None:
    """Within five standard errors."""
    dims = {"E": 8, "D": 50, "H": 3, "U": 4, "L": 7, "N": 400}
    value = initial(KEY, "part.weight", Spec(("E", "D", "N"), role, draw), dims).double()
    count = value.numel()
    assert abs(value.mean()) <= 5 * math.sqrt(variance / count)
    assert abs(value.square().mean() / variance - 1) <= 5 * math.sqrt(2 / count)
    # Neither experts nor rows repeat
    rows = value.flatten(0, 1) / math.sqrt(variance * 400)
    correlation = rows @ rows.T - torch.eye(400)
    assert correlation[~torch.eye(400, dtype=torch.bool)].abs().max() <= 6 / math.sqrt(400)


def test_gains_start_at_one() -> None:
    spec = Spec(("D",), Role.GAIN, ones)
    assert initial(KEY, "norm", spec, {"D": 3}).tolist() == [1.0, 1.0, 1.0]


def test_fan_in_of_every_matrix_is_the_width_it_reads() -> None:
    """Product with a unit-variance input has unit variance, over the root of 2 L where it adds to the stream."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    dims = model.dims(c)
    inputs = {
        "embed": "D",
        "head": "D",
        "attention.down": "D",
        "attention.up": "R",
        "attention.query.up": "Q",
        "attention.out": "HU",
        "ffn.router": "D",
        "ffn.up": "D",
        "ffn.down": "F",
        "ffn.shared.up": "D",
        "ffn.shared.down": "S",
    }
    adds = {"attention.out", "ffn.down", "ffn.shared.down"}
    dims_large = {**dims, "V": 4000}
    for path, spec in tree.leaves(model.specs(c)):
        if spec.role is Role.GAIN:
            continue
        name = path.split(".", 2)[2] if path.startswith("blocks") else path
        letters = "I" if path == "blocks.0.ffn.down" else inputs[name]
        variance = 1 / math.prod(dims[letter] for letter in letters) / (2 * dims["L"] if name in adds else 1)
        value = spec.init(KEY.generator(), (200, 500), dims_large).double()
        assert value.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 1e5)), path
