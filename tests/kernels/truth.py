"""How near a kernel is to the truth, and how near anybody could be in its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Random input."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def graded(
    fn: Callable[..., Any], inputs: Sequence[Tensor], pulls: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results of `fn` and the gradients of all floating inputs, in `dtype` throughout."""
    leaves = [
        each.detach().to(dtype or each.dtype).requires_grad_() if each.is_floating_point() else each for each in inputs
    ]
    results = fn(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    pulled = [each for each in results if each.requires_grad]
    wanted = [each for each in leaves if each.requires_grad]
    gradients = torch.autograd.grad(pulled, wanted, [p.to(r.dtype) for p, r in zip(pulls, pulled, strict=True)])
    return [each.detach() for each in (*results, *gradients)]


def check(
    ours: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    factor: float = 1.5,
    steps: float = 0.5,
    floor: float = 0.0,
) -> None:
    """Each result has at most `factor` times the error of the plain computation, or half a step of its format.

    truth    in fp64
    steps    error that is granted to a plain computation that happens to be exact, in steps of the format at the
             root mean square of the truth
    floor    norm of an error that is granted beside, where the truth is the difference of two equal sums
    """
    for place, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.dtype is b.dtype, (place, a.dtype, b.dtype)
        assert a.shape == t.shape, (place, a.shape, t.shape)
        step = steps * torch.finfo(a.dtype).eps * t.norm() + floor
        error, plain_error = ((each.double() - t).norm() for each in (a, b))
        assert error <= factor * plain_error + step, f"result {place}: error {error:.3g}, plain {plain_error:.3g}"
