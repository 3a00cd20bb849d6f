"""Records as values and as trees."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from nmoe.pure.core import tree
from nmoe.pure.core.tree import record


@record
class Leaf:
    """Two tensors."""

    weight: Tensor
    gain: Tensor


@record
class Branch:
    """Records in a record."""

    parts: tuple[Leaf, ...]
    last: Leaf | tuple[()]
    scale: Tensor


def branch() -> Branch:
    """Leaves 0 to 4, one optional part absent."""
    a, b, c, d, e = (torch.tensor(float(number)) for number in range(5))
    return Branch((Leaf(a, b), Leaf(c, d)), (), e)


def test_frozen_and_compared_by_identity() -> None:
    value = branch()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        value.scale = torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        del value.scale  # pyright: ignore[reportAttributeAccessIssue]
    same = Branch(value.parts, value.last, value.scale)
    assert same != value
    assert len({same, value}) == 2


def test_built_by_position_and_by_name_only_with_every_field() -> None:
    one = torch.ones(())
    assert Leaf(gain=one, weight=one).gain is one
    with pytest.raises(TypeError):
        Leaf(one)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Leaf(one, one, one)  # pyright: ignore[reportCallIssue]


def test_round_trip_as_a_pytree() -> None:
    value = branch()
    leaves, spec = pytree.tree_flatten(value)
    assert [leaf.item() for leaf in leaves] == [0, 1, 2, 3, 4]
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is Branch
    assert type(back.parts[1]) is Leaf
    assert back.last == ()
    assert all(mine is yours for mine, yours in zip(pytree.tree_leaves(back), leaves, strict=True))
    doubled = pytree.tree_map(lambda leaf: 2 * leaf, value)
    assert doubled.parts[1].gain.item() == 6


def test_paths_are_read_like_attributes() -> None:
    value = branch()
    assert [(path, leaf.item()) for path, leaf in tree.leaves(value)] == [
        ("parts.0.weight", 0),
        ("parts.0.gain", 1),
        ("parts.1.weight", 2),
        ("parts.1.gain", 3),
        ("scale", 4),
    ]
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    assert keys[0] == ".parts[0].weight"


def test_map_over_several_trees() -> None:
    def described(path: str, *leaves: Tensor) -> str:
        return f"{path}={sum(leaf.item() for leaf in leaves)}"

    total = tree.map(described, branch(), branch(), branch())
    assert type(total) is Branch
    assert total.parts[1].weight == "parts.1.weight=6.0"
    assert total.last == ()


@pytest.mark.parametrize(
    "other",
    [
        Branch((Leaf(1, 2),), (), 3),  # pyright: ignore[reportArgumentType]
        Branch((Leaf(1, 2), (3, 4)), (), 5),  # pyright: ignore[reportArgumentType]
        Branch((Leaf(1, 2), 3), (), 4),  # pyright: ignore[reportArgumentType]
        Branch((Leaf(1, 2), Leaf(3, 4)), Leaf(5, 6), 7),  # pyright: ignore[reportArgumentType]
    ],
)
def test_map_refuses_trees_of_other_structure(other: Any) -> None:
    with pytest.raises(ValueError, match=r"^tree.map: expected .* at '(parts|parts.1|last)', got "):
        tree.map(lambda path, *leaves: None, branch(), other)


def test_built_and_mapped_while_compiling() -> None:
    def step(value: Branch, other: Branch) -> tuple[Branch, Leaf]:
        moved = tree.map(lambda path, leaf, more: leaf + 10 * more, value, other)
        return moved, Leaf(moved.scale * 2, moved.parts[0].gain)

    value = branch()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")(value, value)
    assert type(compiled[0]) is Branch
    assert type(compiled[1]) is Leaf
    assert pytree.tree_map(lambda leaf: leaf.item(), pytree.tree_leaves(compiled)) == [0, 11, 22, 33, 44, 88, 11]
