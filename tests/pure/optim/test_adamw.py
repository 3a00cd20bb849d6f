"""Update rule, clip and master halves against torch's own and against bit arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.pure.core import tree
from nmoe.pure.formats.master import join, split
from nmoe.pure.optim.adamw import Moments, adamw
from nmoe.pure.optim.clip import clip_scale, global_norm


def adam_run(dtype: torch.dtype, gradients: list[Tensor], start: Tensor, *, by_torch: bool) -> Tensor:
    """The parameter after one update a gradient, under a learning rate that changes."""
    rates = [1e-2 * (1 + step % 7) / 7 for step in range(len(gradients))]
    if by_torch:
        value = torch.nn.Parameter(start.to(dtype))
        optimizer = torch.optim.AdamW([value], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            value.grad = gradient.to(dtype)
            optimizer.step()
        return value.detach()
    value = start.to(dtype)
    moments = Moments(torch.zeros_like(value), torch.zeros_like(value))
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        updates, lr = torch.tensor(step), torch.tensor(rate, dtype=torch.float64)
        value, moments = adamw(
            value, gradient.to(dtype), moments, updates=updates, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1
        )
    return value


def adam_problem() -> tuple[list[Tensor], Tensor]:
    """50 gradients of sizes from 1e-6 to 1e2, and where to start; fp32 values."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-6, 2, 4096)
    gradients = [sizes * torch.randn(4096, generator=generator) for _ in range(50)]
    return gradients, torch.randn(4096, generator=generator)


def test_adamw_is_torchs_in_fp64() -> None:
    gradients, start = adam_problem()
    ours, right = (adam_run(torch.float64, gradients, start, by_torch=each) for each in (False, True))
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)


def test_adamw_in_fp32_is_as_exact_as_torchs() -> None:
    gradients, start = adam_problem()
    truth = adam_run(torch.float64, gradients, start, by_torch=True)
    ours, right = (adam_run(torch.float32, gradients, start, by_torch=each) - truth for each in (False, True))
    assert ours.norm() <= 2 * right.norm()
    assert ours.abs().max() <= 2 * right.abs().max()


def test_moments_are_read_in_the_format_of_the_parameter() -> None:
    """bf16 moments enter exactly; what comes back is fp32, to be rounded by whoever stores it."""
    generator = torch.Generator().manual_seed(0)
    value, gradient = torch.randn(2, 64, generator=generator)
    stored = Moments(*(torch.rand(2, 64, generator=generator).bfloat16()))
    widened = Moments(stored.first.float(), stored.second.float())
    arguments: dict[str, Any] = {
        "updates": torch.tensor(9),
        "lr": torch.tensor(0.01, dtype=torch.float64),
        "eps": 1e-8,
        "decay": 0.1,
    }
    results = [adamw(value, gradient, moments, beta1=0.9, beta2=0.95, **arguments) for moments in (stored, widened)]
    for ours, right in zip(*(tree.leaves(result) for result in results), strict=True):
        assert ours[1].dtype == torch.float32
        assert torch.equal(ours[1], right[1])


@pytest.mark.parametrize("size", [1e-3, 0.2, 1.0, 5.0, 1e4])
def test_clip_is_torchs(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [size * torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (2, 2, 2))]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
    scale = clip_scale(norm, 1.0)
    assert (scale < 1) == (norm > 1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(gradient * scale, parameter.grad)  # pyright: ignore[reportArgumentType]


def test_global_norm_is_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (3,), (2, 2, 2))]
    assert global_norm(gradients).item() == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-14)


def test_global_norm_of_bf16_is_not_rounded_to_bf16() -> None:
    """The norm is 221.7; bf16 has 222 there."""
    norm = global_norm([torch.ones(3 * 2**14, dtype=torch.bfloat16), torch.ones(1)])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx((3 * 2**14 + 1) ** 0.5, rel=1e-6)


HIGH = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16


def halves_of(low: Tensor | int) -> Tensor:
    """fp32 values with every possible high half and these low bits."""
    return (HIGH | low).view(torch.float32)


def check_halves(value: Tensor) -> None:
    """`join` restores every bit but a NaN's payload; the bf16 half is a nearest one wherever the value is a number."""
    rounded, remainder = split(value)
    assert rounded.dtype == torch.bfloat16
    assert remainder.dtype == torch.int16
    restored, none = join(rounded, remainder), value.isnan()
    assert torch.equal(restored[~none].view(torch.int32), value[~none].view(torch.int32))
    assert torch.equal(rounded.isnan(), none) and torch.equal(restored.isnan(), none)

    # Torch's rounding is to nearest, ties to even: another tie is as far away, and nothing else is
    number = value.abs() <= torch.finfo(torch.bfloat16).max
    exact, ours, nearest = value[number].double(), rounded[number].double(), value[number].bfloat16().double()
    assert torch.equal((ours - exact).abs(), (nearest - exact).abs())
    infinite = value.isinf()
    assert torch.equal(rounded[infinite].float(), value[infinite])


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_halves_restore_every_bit_at_the_corners(low: int) -> None:
    """0x8000 is the tie."""
    check_halves(halves_of(low))


@given(st.integers(0, 2**32 - 1))
def test_halves_restore_every_bit(seed: int) -> None:
    low = torch.randint(2**16, HIGH.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    check_halves(halves_of(low))


def test_ties_go_away_from_zero() -> None:
    """1 + 2**-8 lies between two bf16 numbers, and the even one is 1."""
    rounded, _ = split(torch.tensor([1 + 2.0**-8, -1 - 2.0**-8]))
    assert rounded.tolist() == [1 + 2.0**-7, -1 - 2.0**-7]
