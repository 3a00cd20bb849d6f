"""The activation kernel in the interpreter against `pure.experts.swiglu` in fp64."""

from __future__ import annotations

import attrs
import pytest
import torch

from nmoe.effects.kernels.moe.swiglu import TILE, SwigluTile, swiglu
from nmoe.pure.model import experts
from tests.kernels.truth import check, graded, normal

SMALL = attrs.evolve(TILE, block_m=4, block_n=16)


@pytest.mark.parametrize("tile", [TILE, SMALL], ids=["shipped", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 8), (5, 2, 15), (6, 2, 16), (2, 3, 2, 17), (3, 2, 1025)], ids=str)
def test_as_near_the_truth_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype, tile: SwigluTile) -> None:
    x, grad_output = 3 * normal(*shape, dtype=dtype), normal(*shape[:-2], shape[-1], seed=1, dtype=dtype)
    truth = graded(experts.swiglu, [x], [grad_output], torch.float64)
    check(graded(lambda x: swiglu(x, tile=tile), [x], [grad_output]), graded(experts.swiglu, [x], [grad_output]), truth)


def test_gates_beyond_the_range_of_exp() -> None:
    x = torch.stack([torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]), torch.full((7,), 3.0)])
    value, gradient = graded(swiglu, [x], [torch.ones(7)])
    torch.testing.assert_close(value, torch.tensor([0.0, 0, 0, 0, 270, 600, 3e4]), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(gradient[0], torch.tensor([0.0, 0, 0, 1.5, 3, 3, 3]), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, 0, 0, 0, 90, 200, 1e4]), rtol=1e-6, atol=1e-30)


def test_inputs_with_holes_and_an_expanded_pull() -> None:
    whole = normal(3, 2, 40)
    leaf = whole.clone().requires_grad_()
    grad_output = torch.tensor(0.5).expand(3, 16)
    ours, right = (torch.autograd.grad(fn(leaf[..., 4:20]), leaf, grad_output)[0] for fn in (swiglu, experts.swiglu))
    torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)


def test_only_the_input_is_kept() -> None:
    leaf = normal(3, 2, 16).requires_grad_()
    y = swiglu(leaf)
    assert y.grad_fn is not None
    kept = y.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    assert [each.data_ptr() for each in kept] == [leaf.data_ptr()]


def test_a_row_does_not_depend_on_its_place() -> None:
    x, grad_output = normal(9, 2, 20), normal(9, 20, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    straight = graded(lambda x: swiglu(x, tile=SMALL), [x], [grad_output])
    moved = graded(lambda x: swiglu(x, tile=SMALL), [x[order]], [grad_output[order]])
    assert all(torch.equal(a[order], b) for a, b in zip(straight, moved, strict=True))
