"""The norm kernels in the interpreter against `pure.norm` in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels.norm import TILE, NormTile, add_rms_norm, rms_norm
from nmoe.pure.model import norm
from tests.kernels.truth import check, graded, normal

EPS = 1e-5
SHAPES = [(1, 2048), (2, 3), (13, 48), (3, 5, 100), (40, 17)]
TILES = [TILE, attrs.evolve(TILE, block_m=4, programs=3)]


@pytest.mark.parametrize("tile", TILES, ids=["shipped", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_the_truth_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype, tile: NormTile) -> None:
    x, y = normal(*shape, dtype=dtype), 2 * normal(*shape, seed=1, dtype=dtype)
    gain = 1 + normal(shape[-1], seed=2) / 4
    pulls = [normal(*shape, seed=3, dtype=dtype), normal(*shape, seed=4, dtype=dtype)]
    for ours, plain, inputs in (
        (partial(rms_norm, eps=EPS, tile=tile), partial(norm.rms_norm, eps=EPS), (x, gain)),
        (partial(add_rms_norm, eps=EPS, tile=tile), partial(norm.add_rms_norm, eps=EPS), (x, y, gain)),
    ):
        pulled = pulls[: len(inputs) - 1]
        truth = graded(plain, inputs, pulled, torch.float64)
        check(graded(ours, inputs, pulled), graded(plain, inputs, pulled), truth)


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("adds", [True, False])
def test_gradients_of_readers_are_added(readers: int, adds: bool) -> None:
    """Each of its own, with that of the stream; nothing added to the stream, too."""
    x, y, gain = normal(5, 7, 24), normal(5, 7, 24, seed=1), 1 + normal(24, seed=2) / 4
    pulls = [normal(5, 7, 24, seed=3 + place) for place in range(1 + readers)]

    def by(which: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        if adds:
            return graded(partial(which, eps=EPS, readers=readers), (x, y, gain), pulls, dtype)
        return graded(lambda x, gain: which(x, (), gain, eps=EPS, readers=readers), (x, gain), pulls, dtype)

    truth = by(norm.add_rms_norm, torch.float64)
    assert len(truth) == 1 + readers + (3 if adds else 2)
    check(by(add_rms_norm), by(norm.add_rms_norm), truth)
    if not adds:
        assert torch.equal(by(add_rms_norm)[0], x)


def test_a_single_column() -> None:
    """The norm is the sign, whose gradient is zero: all that is left of it is rounding."""
    inputs, pulls = (normal(7, 1), normal(1, seed=1)), [normal(7, 1, seed=2)]
    ours, truth = graded(partial(rms_norm, eps=0.0), inputs, pulls), inputs[0].sign() * inputs[1]
    torch.testing.assert_close(ours[0], truth, rtol=3e-7, atol=0)
    assert (ours[1] * inputs[0]).abs().max() < 1e-6
    torch.testing.assert_close(ours[2], (pulls[0] * inputs[0].sign()).sum(0), rtol=1e-6, atol=1e-6)


def test_the_sum_is_rounded_before_it_is_normed() -> None:
    """As the reference does it: 2048 + 1 is 2048 in fp16, and so the norm sees it."""
    x, y = torch.full((1, 4), 2048.0).half(), torch.ones(1, 4).half()
    y[0, 0] = 2048
    ours, right = (fn(x, y, torch.ones(4), eps=EPS) for fn in (add_rms_norm, norm.add_rms_norm))
    assert torch.equal(ours[0], right[0])
    torch.testing.assert_close(ours[1], right[1], rtol=1e-3, atol=0)
    assert ours[0].tolist() == [[4096, 2048, 2048, 2048]]


def test_the_norm_of_the_sum_can_be_made_again_from_the_sum() -> None:
    """Bit for bit, by the other kernel: what recomputation in the backward pass relies on."""
    x, y, gain = normal(9, 100).half(), normal(9, 100, seed=1).half(), normal(100, seed=2)
    total, normed = add_rms_norm(x, y, gain, eps=EPS)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, rms_norm(total, gain, eps=EPS))


def test_only_one_result_is_used() -> None:
    """The other pulls with zeros."""
    leaves = [normal(5, 12).requires_grad_(), normal(5, 12, seed=1).requires_grad_(), normal(12).requires_grad_()]
    for place in (0, 1):
        ours, right = (
            torch.autograd.grad(fn(*leaves, eps=EPS)[place].square().sum(), leaves, allow_unused=True)
            for fn in (add_rms_norm, norm.add_rms_norm)
        )
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-5, atol=1e-5)


def test_a_slice_is_read_where_it_lies() -> None:
    """As the latent of attention lies beside the rotated key: neighbours are neither read nor written."""
    wide = normal(2, 7, 40)
    inside = wide[..., 3:27]
    around = wide.clone()
    gain = normal(24, seed=1)
    truth = graded(partial(norm.rms_norm, eps=EPS), (inside, gain), [normal(2, 7, 24, seed=2)])
    copied = graded(partial(rms_norm, eps=EPS), (inside, gain), [normal(2, 7, 24, seed=2)])
    torch.testing.assert_close(copied, truth, rtol=1e-5, atol=1e-5)
    leaf = wide.requires_grad_()
    y = rms_norm(leaf[..., 3:27], gain, eps=EPS)
    assert y.grad_fn is not None
    assert y.grad_fn.saved_tensors[0].data_ptr() == leaf[..., 3:].data_ptr()  # pyright: ignore[reportAttributeAccessIssue]
    (gradient,) = torch.autograd.grad(y, leaf, normal(2, 7, 24, seed=2))
    torch.testing.assert_close(gradient[..., 3:27], truth[1], rtol=1e-5, atol=1e-5)
    assert gradient[..., :3].abs().max() == gradient[..., 27:].abs().max() == 0
    assert torch.equal(leaf, around)


def test_last_axis_apart_and_pulls_expanded() -> None:
    """Layouts that autograd may hand over: a transposed input, a gradient that is one number."""
    x, gain = normal(6, 9), normal(6, seed=1)
    for fn in (partial(rms_norm, eps=EPS), lambda x, gain: add_rms_norm(x, x, gain, eps=EPS)[1]):
        plain = (
            norm.rms_norm if isinstance(fn, partial) else lambda x, gain, eps: norm.add_rms_norm(x, x, gain, eps=eps)[1]
        )
        leaves = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
        ours = torch.autograd.grad(fn(leaves[0].T, leaves[1]).sum(), leaves)
        right = torch.autograd.grad(plain(leaves[0].T, leaves[1], eps=EPS).sum(), leaves)
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


def test_pulls_that_are_slices_of_wider_rows() -> None:
    """What the backward pass of `cat` hands over."""
    leaves = [normal(6, 9).requires_grad_(), normal(6, 9, seed=1).requires_grad_(), normal(9, seed=2).requires_grad_()]
    grad_output = normal(6, 18, seed=3)
    for ours, plain in ((rms_norm, norm.rms_norm), (add_rms_norm, norm.add_rms_norm)):
        found, right = (
            torch.autograd.grad(torch.cat(results(fn, leaves), -1), leaves, grad_output, allow_unused=True)
            for fn in (ours, plain)
        )
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def results(fn: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Two results of a norm: the sum and its norm, or the same norm of two inputs."""
    x, y, gain = leaves
    if fn in (add_rms_norm, norm.add_rms_norm):
        return list(fn(x, y, gain, eps=EPS))
    return [fn(x, gain, eps=EPS), fn(y, gain, eps=EPS)]


def test_small_and_large_rows() -> None:
    """Where eps rules, and where a sum of squares in fp16 would be infinite."""
    x = torch.stack([torch.zeros(64), 1e-6 * normal(64), 2e4 * normal(64)]).half()
    inputs, pulls = (x, normal(64, seed=1)), [normal(3, 64, seed=2)]
    plain = partial(norm.rms_norm, eps=EPS)
    ours = graded(partial(rms_norm, eps=EPS), inputs, pulls)
    assert all(each.isfinite().all() for each in ours)
    check(ours, graded(plain, inputs, pulls), graded(plain, inputs, pulls, torch.float64))


def test_a_row_does_not_depend_on_its_place_nor_the_gain_on_the_run() -> None:
    x, gain, grad_output = normal(11, 50), normal(50, seed=1), normal(11, 50, seed=2)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    fn = partial(rms_norm, eps=EPS, tile=TILES[1])
    one, two = (graded(fn, (x, gain), [grad_output]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    moved = graded(fn, (x[order], gain), [grad_output[order]])
    assert torch.equal(one[0][order], moved[0])
    assert torch.equal(one[1][order], moved[1])
