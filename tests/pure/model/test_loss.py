"""The chunked loss against the plain one on whole logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmoe.pure.model.loss import linear_cross_entropy, token_losses

TOKENS, WIDTH, VOCAB = 23, 8, 31


def problem(dtype: torch.dtype = torch.float64, *, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state, head, and targets of which a few do not count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(WIDTH, VOCAB, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(VOCAB, (tokens,), generator=generator)
    target[2], target[5:8] = -1, -100
    return x, head, target


def plain(x: Tensor, head: Tensor, target: Tensor, logit_scale: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """The definition, by autograd."""
    logits = (x @ head).to(torch.promote_types(x.dtype, torch.float32)) * logit_scale
    nll = F.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="sum")
    square = (logits.logsumexp(-1).square() * (target >= 0)).sum()
    return nll + z_loss * square, nll


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
def test_loss_and_both_gradients(chunk: int, logit_scale: float, z_loss: float) -> None:
    x, head, target = problem()
    total, nll = linear_cross_entropy(x, head, target, chunk=chunk, logit_scale=logit_scale, z_loss=z_loss)
    right, right_nll = plain(x, head, target, logit_scale, z_loss)
    torch.testing.assert_close((total, nll), (right, right_nll), rtol=1e-12, atol=1e-12)
    assert not nll.requires_grad
    # A pull other than one: the loss is divided by the number of targets afterwards
    gradients, rights = (torch.autograd.grad(each / 7, (x, head)) for each in (total, right))
    torch.testing.assert_close(gradients, rights, rtol=1e-12, atol=1e-12)
    assert gradients[0][target < 0].abs().max() == 0


@pytest.mark.parametrize("again", [False, True], ids=["forward", "recomputed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_ignored_row_may_hold_anything(bad: float, again: bool) -> None:
    """Loss and both gradients are those of a zero row in its place, by either way to the gradients."""
    x, head, target = problem()
    rows = x.detach().clone()
    rows[target < 0] = bad
    clean = torch.where(target[:, None] >= 0, rows, 0)
    results: list[tuple[Tensor, ...]] = []
    for each in (rows.requires_grad_(), clean.requires_grad_()):
        total, nll = linear_cross_entropy(each, head, target, chunk=4)
        results.append((total, nll, *torch.autograd.grad(total, (each, head), create_graph=again)))
    for ours, right in zip(*results, strict=True):
        assert torch.equal(ours, right)
    assert torch.equal(results[0][2][target < 0], torch.zeros(int((target < 0).sum()), WIDTH, dtype=torch.float64))


def test_no_z_loss_of_a_log_partition_whose_square_overflows() -> None:
    """1e20 squared is infinite in fp32, and zero times that is not a number."""
    head = torch.tensor([[1e20, 0.0]], requires_grad=True)
    total, nll = linear_cross_entropy(torch.ones(1, 1), head, torch.tensor([0]), chunk=1)
    assert (total.item(), nll.item()) == (0.0, 0.0)
    assert torch.autograd.grad(total, head)[0].tolist() == [[0.0, 0.0]]


def test_gradients_by_finite_differences() -> None:
    x, head, target = problem(tokens=9)
    assert torch.autograd.gradcheck(
        lambda x, head: linear_cross_entropy(x, head, target, chunk=4, logit_scale=0.5, z_loss=0.05)[0],
        (x, head),
        fast_mode=True,
    )


def test_z_loss_pulls_up_a_small_partition() -> None:
    """Where the log-partition is below -1 / (2 z), the gradient of the probabilities changes sign."""
    x, head, target = problem()
    x, head = (x.detach() - 3).requires_grad_(), (head.detach().abs() + 1).requires_grad_()
    gradients, rights = (
        torch.autograd.grad(total, (x, head))
        for total in (
            linear_cross_entropy(x, head, target, chunk=7, z_loss=0.5)[0],
            plain(x, head, target, 1.0, 0.5)[0],
        )
    )
    torch.testing.assert_close(gradients, rights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_that_is_wanted(frozen: int) -> None:
    x, head, target = problem()
    _, kept = torch.autograd.grad(linear_cross_entropy(x, head, target, chunk=7)[0], (x, head))[:: 1 - 2 * frozen]
    inputs = [x, head]
    inputs[frozen] = inputs[frozen].detach()
    total, _ = linear_cross_entropy(inputs[0], inputs[1], target, chunk=7)
    (gradient,) = torch.autograd.grad(total, inputs[1 - frozen])
    assert torch.equal(gradient, kept)


def test_no_gradient_is_fine_too() -> None:
    x, head, target = (each.detach() for each in problem())
    total, nll = linear_cross_entropy(x, head, target, chunk=7)
    torch.testing.assert_close(total, plain(x, head, target, 1.0, 0.0)[0])
    assert torch.equal(total, nll)


def test_all_masked() -> None:
    x, head, target = problem()
    total, nll = linear_cross_entropy(x, head, torch.full_like(target, -1), chunk=7, z_loss=0.1)
    assert (total.item(), nll.item()) == (0.0, 0.0)
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(total, (x, head)))


def test_large_logits_do_not_overflow() -> None:
    """Thousands, whose exponentials fp32 does not have."""
    x, head, target = problem(torch.float32)
    results = [
        (total.detach(), *torch.autograd.grad(total, (x, head)))
        for total, _ in (
            linear_cross_entropy(x, head, target, chunk=7, logit_scale=1e3),
            plain(x, head, target, 1e3, 0.0),
        )
    ]
    assert all(each.isfinite().all() for each in results[0])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_plain_loss_in_the_same_format(dtype: torch.dtype) -> None:
    x, head, target = problem(dtype, tokens=500)

    def results(fn: Any, *leaves: Tensor) -> list[Tensor]:
        total, _ = fn(*leaves)
        return [total.detach().double(), *(each.double() for each in torch.autograd.grad(total, leaves))]

    def chunked(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x, head, target, chunk=4, logit_scale=0.7, z_loss=1e-3)

    def whole(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x, head, target, 0.7, 1e-3)

    truth = results(whole, *(each.detach().double().requires_grad_() for each in (x, head)))
    for ours, right, exact in zip(results(chunked, x, head), results(whole, x, head), truth, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * exact.norm()  # what merely storing the result may cost
        assert (ours - exact).norm() <= 2 * max((right - exact).norm(), rounding)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("fn", ["chunked", "plain"])
def test_whole_logits_never_exist(fn: str) -> None:
    """The plain loss shows that the measuring works."""
    tokens, chunk = 400, 16
    x, head, target = problem(torch.float32, tokens=tokens)
    with Largest() as seen:
        if fn == "chunked":
            total, _ = linear_cross_entropy(x, head, target, chunk=chunk, z_loss=0.1)
        else:
            total, _ = plain(x, head, target, 1.0, 0.1)
        total.backward()
    assert (seen.elements < tokens * VOCAB) == (fn == "chunked")
    if fn == "chunked":
        assert seen.elements <= max(chunk * VOCAB, tokens * WIDTH, WIDTH * VOCAB)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
def test_losses_of_single_tokens(chunk: int) -> None:
    x, head, target = problem()
    target = target.clamp(min=0)
    losses, likeliest = token_losses(x, head, target, chunk=chunk, logit_scale=0.25)
    logits = 0.25 * x @ head
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"), rtol=1e-12, atol=1e-12)
    assert torch.equal(likeliest, logits.argmax(-1) == target)
    assert token_losses(x, head, logits.argmax(-1), chunk=chunk, logit_scale=0.25)[1].all()
