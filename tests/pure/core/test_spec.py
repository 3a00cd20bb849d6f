"""Specs, roles and what follows from them."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Nsa
from nmoe.pure.core import tree
from nmoe.pure.core.init import normal, ones, residual
from nmoe.pure.core.spec import POLICY, Policy, Role, Spec, spec_tree
from nmoe.pure.core.tree import param, record
from nmoe.pure.model import model
from tests import shapes

NORMAL = normal("D")


@record
class Part:
    """A parameter, and a part without a spec of its own."""

    rest: Part | tuple[()]
    up: Tensor = param("E D 2 F", Role.EXPERT, NORMAL)


def test_every_role_has_a_row_and_nothing_else_has() -> None:
    assert set(POLICY) == set(Role)
    assert all(type(row) is Policy for row in POLICY.values())
    with pytest.raises(TypeError):
        POLICY[Role.GAIN] = POLICY[Role.HEAD]  # pyright: ignore[reportIndexIssue]


def test_every_role_is_used_and_every_letter_is_known() -> None:
    sparse = Nsa(num_heads=2, num_kv_heads=1, head_dim=4, v_head_dim=3)
    used: set[Role] = set()
    configs = [shapes.config(attention=attention) for attention in (shapes.attention(q_lora_rank=7), sparse)]
    for c in (*configs, shapes.CLAMPED):
        for path, spec in tree.leaves(model.specs(c)):
            used.add(spec.role)
            assert all(size > 0 for size in spec.shape(model.dims(c))), path
    assert used == set(Role)


def test_what_decays_is_a_matrix_of_a_block() -> None:
    """Never gains, embedding, head or router: decay there would change what the scales mean."""
    assert {role for role, row in POLICY.items() if row.decay} == {Role.MATRIX, Role.SHARED, Role.EXPERT, Role.POOL}


def test_only_experts_are_sharded_and_by_their_first_axis() -> None:
    leaves = tree.leaves(model.specs(shapes.config()))
    sharded = {path: spec.axes[0] for path, spec in leaves if POLICY[spec.role].shard}
    assert set(sharded) == {f"blocks.{layer}.ffn.{name}" for layer in (1, 2) for name in ("up", "down")}
    assert set(sharded.values()) == {"E"}


def test_shape_and_size_from_letters_and_numbers() -> None:
    spec = Spec(("E", "D", "2", "F"), Role.EXPERT, ones)
    dims = {"E": 3, "D": 5, "F": 7}
    assert spec.shape(dims) == (3, 5, 2, 7)
    assert spec.size(dims) == 210
    with pytest.raises(ValueError, match=r"dims: expected a size for axis 'Q', got sizes for D, E, F; add it"):
        attrs.evolve(spec, axes=("Q",)).shape(dims)


def test_initial_values_name_the_letter_they_miss() -> None:
    with pytest.raises(ValueError, match="expected a size for axis 'L'"):
        residual("D")(torch.Generator(), (2,), {"D": 5})


def test_spec_tree_holds_specs_where_parameters_will_be() -> None:
    part = spec_tree(Part, rest=spec_tree(Part, rest=()))
    assert [path for path, _ in tree.leaves(part)] == ["rest.up", "up"]
    assert part.up == Spec(("E", "D", "2", "F"), Role.EXPERT, NORMAL)


def test_spec_tree_names_the_field_it_has_no_value_for() -> None:
    with pytest.raises(ValueError, match=r"^spec_tree\(Part\): expected .* got no value for 'rest'; pass rest="):
        spec_tree(Part)


@pytest.mark.parametrize(("latent", "names"), [(None, set()), (7, {"query.norm", "query.up"})])
@pytest.mark.parametrize("shared", [0, 2])
def test_optional_parts_come_and_go(latent: int | None, names: set[str], shared: int) -> None:
    c = shapes.config(attention=shapes.attention(q_lora_rank=latent), moe=shapes.mixture(num_shared_experts=shared))
    paths = {path for path, _ in tree.leaves(model.specs(c))}
    assert {path for path in paths if ".query" in path} == {
        f"blocks.{layer}.attention.{name}" for layer in range(3) for name in names
    }
    assert ("blocks.1.ffn.shared.up" in paths) == bool(shared)
    assert "blocks.0.ffn.shared.up" not in paths


def test_shapes_agree_with_the_functions() -> None:
    """Every parameter of every optional part takes part in a loss."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    p, batch = shapes.parameters(c, dtype=torch.float32), shapes.batch(c)
    loss, _, _ = model.objective(
        p,
        batch,
        shapes.router_bias(c, dtype=torch.float32),
        shapes.env(c),
        c,
        num_targets=torch.tensor(18),
        num_sequences=2,
        chunk=8,
    )
    loss.backward()
    assert [path for path, leaf in tree.leaves(p) if leaf.grad is None or leaf.grad.abs().max() == 0] == []
