"""The loss kernel in the interpreter against `pure.loss` in fp64."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.effects.kernels import loss as cross_entropy
from nmoe.effects.kernels.loss import TILE, linear_cross_entropy, logits_to_gradient_
from nmoe.pure.model import loss
from tests.kernels.truth import check, graded, normal

SMALL = attrs.evolve(TILE, block_n=64)


def targets(rows: int, vocabulary: int, kept: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(vocabulary, (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < kept, drawn, -1 - drawn)


@pytest.mark.parametrize("rows", [1, 2, 23])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 128, 331])
def test_as_near_the_truth_as_the_reference(rows: int, vocabulary: int) -> None:
    """Rows in one, two and many chunks; a vocabulary around multiples of the block."""
    inputs = (normal(rows, 24), normal(24, vocabulary, seed=1), targets(rows, vocabulary))
    pulls = [torch.tensor(1 / 7)]
    for chunk, scale, z_loss in ((1, 1.0, 0.0), (7, 0.25, 0.0), (100, 1.0, 0.1), (12, 0.3, 1e-3)):
        ours = partial(linear_cross_entropy, chunk=chunk, logit_scale=scale, z_loss=z_loss, tile=SMALL)
        plain = partial(loss.linear_cross_entropy, chunk=chunk, logit_scale=scale, z_loss=z_loss)
        truth = graded(plain, inputs, pulls, torch.float64)
        check(graded(ours, inputs, pulls), graded(plain, inputs, pulls), truth, factor=2.0, steps=4.0)


def test_huge_logits_stay_finite() -> None:
    """Beyond what exp takes, with the target far below the top: nll in the tens of thousands, no gradient lost."""
    inputs = (100 * normal(9, 16), 100 * normal(16, 200, seed=1), targets(9, 200))
    fn = partial(linear_cross_entropy, chunk=4, z_loss=1e-9, tile=SMALL)
    plain = partial(loss.linear_cross_entropy, chunk=4, z_loss=1e-9)
    ours, truth = graded(fn, inputs, [torch.ones(())]), graded(plain, inputs, [torch.ones(())], torch.float64)
    assert truth[1] > 1e5
    check(ours, graded(plain, inputs, [torch.ones(())]), truth, factor=2.0, steps=4.0)


def test_a_row_without_a_target_is_not_read() -> None:
    """Its logits may hold anything; loss and gradient are zero."""
    logits = torch.full((3, 150), float("nan"))
    logits[1] = normal(150)
    losses = torch.full((2, 3), 7.0)
    logits_to_gradient_(
        logits,
        torch.tensor([-1, 5, -100]),
        losses,
        logit_scale=1.0,
        z_loss=0.0,
        wants_gradient=True,
        tile=SMALL,
    )
    right = -torch.log_softmax(normal(150), 0)[5]
    assert torch.equal(losses[:, ::2], torch.zeros(2, 2))
    torch.testing.assert_close(losses[:, 1], right.expand(2))
    assert torch.equal(logits[::2], torch.zeros(2, 150))
    assert logits[1].sum().abs() < 1e-5


def test_an_ignored_row_that_is_not_finite_leaves_the_gradients_alone() -> None:
    x, head, target = normal(9, 16), normal(16, 70, seed=1), targets(9, 70)
    bad = torch.where(target[:, None] >= 0, x, torch.nan)
    fn = partial(linear_cross_entropy, chunk=4, tile=SMALL)
    zero = torch.where(target[:, None] >= 0, x, 0)
    ours, right = (graded(fn, (each, head, target), [torch.ones(())]) for each in (bad, zero))
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_all_targets_ignored() -> None:
    inputs = (normal(5, 8), normal(8, 70, seed=1), torch.full((5,), -1))
    for each in graded(partial(linear_cross_entropy, chunk=2, z_loss=0.1, tile=SMALL), inputs, [torch.ones(())]):
        assert torch.equal(each, torch.zeros_like(each))


@pytest.mark.parametrize("place", [0, 63, 64, 149])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad: float, place: int) -> None:
    logits = normal(1, 150)
    logits[0, place] = bad
    losses = torch.zeros(2, 1)
    logits_to_gradient_(logits, torch.tensor([5]), losses, logit_scale=1.0, z_loss=0.0, wants_gradient=True, tile=SMALL)
    assert not losses.isfinite().any()


def test_logits_in_half_precision() -> None:
    """Read and written as they are, summed in fp32: the gradient is the rounded truth."""
    logits = (3 * normal(6, 333)).half()
    wanted = torch.tensor([0, 332, 64, -1, 5, 6])
    leaf = logits.double().requires_grad_()
    counted = wanted >= 0
    nll = torch.nn.functional.cross_entropy(0.5 * leaf, wanted, ignore_index=-1, reduction="none")
    square = (0.5 * leaf).logsumexp(-1).square()
    total = nll + 0.01 * torch.where(counted, square, 0)
    total.sum().backward()
    losses = torch.zeros(2, 6)
    logits_to_gradient_(logits, wanted, losses, logit_scale=0.5, z_loss=0.01, wants_gradient=True, tile=SMALL)
    assert leaf.grad is not None
    torch.testing.assert_close(losses.double(), torch.stack([total, nll]).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, leaf.grad.half(), rtol=2 * torch.finfo(torch.float16).eps, atol=1e-7)


def test_without_gradient_the_logits_are_left_alone() -> None:
    logits, losses = normal(4, 100), torch.zeros(2, 4)
    kept = logits.clone()
    logits_to_gradient_(logits, targets(4, 100), losses, logit_scale=1.0, z_loss=0.1, wants_gradient=False, tile=SMALL)
    assert torch.equal(logits, kept)
    with torch.no_grad():
        total, nll = linear_cross_entropy(normal(4, 8), normal(8, 100), targets(4, 100), chunk=3, tile=SMALL)
    assert not total.requires_grad
    assert torch.equal(total, nll)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_that_is_wanted(frozen: int) -> None:
    inputs = [normal(9, 8).requires_grad_(), normal(8, 70, seed=1).requires_grad_()]
    wanted = targets(9, 70)
    whole = torch.autograd.grad(linear_cross_entropy(inputs[0], inputs[1], wanted, chunk=4, tile=SMALL)[0], inputs)
    inputs[frozen] = inputs[frozen].detach()
    left = 1 - frozen
    (alone,) = torch.autograd.grad(
        linear_cross_entropy(inputs[0], inputs[1], wanted, chunk=4, tile=SMALL)[0], inputs[left]
    )
    assert torch.equal(alone, whole[left])


def test_a_second_backward_pass_gives_the_same() -> None:
    inputs = [normal(9, 8).requires_grad_(), normal(8, 70, seed=1).requires_grad_()]
    total, nll = linear_cross_entropy(inputs[0], inputs[1], targets(9, 70), chunk=4, tile=SMALL)
    assert not nll.requires_grad
    one, two = (torch.autograd.grad(total, inputs, torch.tensor(0.3), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_row_does_not_depend_on_its_place() -> None:
    logits, wanted = normal(8, 150), targets(8, 150, kept=1.0)

    def run(order: Tensor) -> tuple[Tensor, Tensor]:
        moved, losses = logits[order].contiguous(), torch.zeros(2, 8)
        logits_to_gradient_(moved, wanted[order], losses, logit_scale=1.0, z_loss=0.1, wants_gradient=True, tile=SMALL)
        return moved, losses

    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    straight, losses = run(torch.arange(8))
    shuffled, shuffled_losses = run(order)
    assert torch.equal(straight[order], shuffled)
    assert torch.equal(losses[:, order], shuffled_losses)


def test_offsets_beyond_32_bits() -> None:
    """Row 3 of rows 2^30 apart: 2^31 does not fit. The storage is one that nobody touches between the rows."""
    size = 2**30
    storage = torch.empty(3 * size + 64, dtype=torch.float16)
    logits = storage.as_strided((4, 64), (size, 1))
    drawn = normal(4, 64).half()
    logits.copy_(drawn)
    near, losses, near_losses = drawn.clone(), torch.zeros(2, 4), torch.zeros(2, 4)
    wanted = torch.tensor([1, 2, 3, 4])
    run = partial(logits_to_gradient_, logit_scale=1.0, z_loss=0.0, wants_gradient=True, tile=SMALL)
    run(logits, wanted, losses)
    run(near, wanted, near_losses)
    assert torch.equal(logits, near)
    assert torch.equal(losses, near_losses)


def test_the_kernel_is_the_one_that_ships() -> None:
    """A row longer than a block at its real size, once."""
    inputs = (normal(2, 4), normal(4, TILE.block_n + 17, seed=1), torch.tensor([TILE.block_n + 16, 3]))
    plain = partial(loss.linear_cross_entropy, chunk=1)
    truth = graded(plain, inputs, [torch.ones(())], torch.float64)
    ours = graded(partial(cross_entropy.linear_cross_entropy, chunk=1), inputs, [torch.ones(())])
    check(ours, graded(plain, inputs, [torch.ones(())]), truth, factor=2.0, steps=4.0)
