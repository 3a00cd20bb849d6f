"""The update kernel in the interpreter against `pure.optim`, and the norm against the truth."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmoe.effects.device import cpu
from nmoe.effects.kernels.optim.adamw import NORM_TILE, TILE, adamw_, global_norm
from nmoe.pure.formats import master
from nmoe.pure.optim import adamw as optim
from tests.kernels.truth import normal

SMALL = attrs.evolve(TILE, block=32, repeats=3)
NUMBERS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}


def arena(
    size: int, *, moments: torch.dtype = torch.float32, gradient: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """An fp32 value, moments of which the second is not negative, and a gradient with a few zeros."""
    drawn = normal(size, seed=seed + 3)
    return {
        "value": normal(size, seed=seed),
        "first": (normal(size, seed=seed + 1) / 8).to(moments),
        "second": (normal(size, seed=seed + 2).square() / 64).to(moments),
        "gradient": torch.where(drawn.abs() < 0.1, 0, drawn).to(gradient),
    }


def scalars(*, updates: int = 1, lr: float = 3e-4, allowed: bool = True, shrink: float = 0.5) -> dict[str, Tensor]:
    return {
        "allowed": torch.tensor(allowed),
        "shrink": torch.tensor(shrink),
        "updates": torch.tensor(updates),
        "lr": torch.tensor(lr, dtype=torch.float64),
    }


def reference(held: dict[str, Tensor], told: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Tensor]:
    """The update out of place."""
    value, after = optim.adamw(
        held["value"],
        held["gradient"].float() * told["shrink"],
        optim.Moments(held["first"], held["second"]),
        updates=told["updates"],
        lr=told["lr"],
        **numbers,
    )
    return {
        "value": value,
        "first": after.first.to(held["first"].dtype),
        "second": after.second.to(held["second"].dtype),
    }


def updated(
    held: dict[str, Tensor], told: dict[str, Tensor], numbers: dict[str, Any], *, halves: bool, **more: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The update in place, on copies; with a remainder when `halves`."""
    mine = {name: each.clone() for name, each in held.items()}
    if halves:
        high, low = master.split(mine["value"])
        change = adamw_(high, low, mine["first"], mine["second"], mine["gradient"], **told, **numbers, **more)
        mine["value"] = master.join(high, low)
    else:
        change = adamw_(mine["value"], None, mine["first"], mine["second"], mine["gradient"], **told, **numbers, **more)
    return mine, change


def test_a_nan_with_all_payload_bits_stays_one() -> None:
    """NVIDIA's hardware makes this NaN; rounded up to bf16 by its bits it would be -0."""
    held = arena(3)
    held["gradient"] = torch.full((3,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    high, low = master.split(held["value"])
    adamw_(high, low, held["first"], held["second"], held["gradient"], **scalars(), **NUMBERS, tile=SMALL)
    assert high.isnan().all()


def check(
    ours: dict[str, Tensor],
    right: dict[str, Tensor],
    held: dict[str, Tensor],
    told: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Equal up to the roundings of products that one contracts with the sum after them and the other does not.

    What these can change is a step of the format at the size of the terms, not of the result: the terms of a moment
    may cancel.
    """
    terms = held["first"].double().abs() + (held["gradient"].double() * told["shrink"]).abs()
    count = int(told["updates"])
    root = (right["second"].double() / (1 - numbers["beta2"] ** count)).sqrt() + numbers["eps"]
    largest = told["lr"] / (1 - numbers["beta1"] ** count) * terms / root
    sizes = {"first": terms, "second": right["second"].double(), "value": held["value"].double().abs() + largest}
    for name, b in right.items():
        a = ours[name]
        off = (a.double() - b.double()).abs() / torch.finfo(a.dtype).eps / sizes[name].clamp(min=1e-30)
        assert off.max() <= 2, f"{name}: off by {off.max():.2f} steps at {off.argmax()}"


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
@pytest.mark.parametrize("size", [1, 31, 32, 95, 96, 97, 1000])
@pytest.mark.parametrize("updates", [1, 2, 1000, 10**9])
def test_equal_to_the_reference(updates: int, size: int, halves: bool) -> None:
    held, told = arena(size), scalars(updates=updates)
    ours, change = updated(held, told, NUMBERS, halves=halves, tile=SMALL)
    right = reference(held, told, NUMBERS)
    check(ours, right, held, told, NUMBERS)
    assert torch.equal(ours["gradient"], torch.zeros(size))
    torch.testing.assert_close(change, (ours["value"] - held["value"]).norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_a_gradient_that_is_stored_anew_stays(halves: bool, allowed: bool) -> None:
    held, told = arena(97), {**scalars(), "allowed": torch.tensor(allowed)}
    kept, change = updated(held, told, NUMBERS, halves=halves, tile=SMALL, clear=False)
    cleared, right = updated(held, told, NUMBERS, halves=halves, tile=SMALL)
    assert torch.equal(kept.pop("gradient"), held["gradient"]) and not cleared.pop("gradient").any()
    assert torch.equal(change, right) and all(torch.equal(kept[name], cleared[name]) for name in cleared)


@given(
    lr=st.floats(1e-8, 1.0),
    shrink=st.floats(1e-3, 1.0),
    updates=st.integers(1, 2**40),
    beta1=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    beta2=st.sampled_from([0.5, 0.95, 0.999, 0.99999]),
    eps=st.sampled_from([1e-15, 1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
)
@settings(max_examples=40)
def test_equal_to_the_reference_at_any_numbers(
    lr: float, shrink: float, updates: int, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    held, told = arena(64), scalars(updates=updates, lr=lr, shrink=shrink)
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    ours, _ = updated(held, told, numbers, halves=True, tile=SMALL)
    check(ours, reference(held, told, numbers), held, told, numbers)


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_narrow_moments_and_gradient(halves: bool) -> None:
    held, told = arena(200, moments=torch.float16, gradient=torch.float16), scalars(updates=7)
    ours, _ = updated(held, told, NUMBERS, halves=halves, tile=SMALL)
    check(ours, reference(held, told, NUMBERS), held, told, NUMBERS)
    assert ours["gradient"].dtype is torch.float16
    assert not ours["gradient"].any()


def test_many_steps_stay_with_the_reference() -> None:
    """What differs by a rounding does not grow: 20 steps, against fp64."""
    size, held = 96, arena(96)
    ours = plain = held
    truth = {name: each.double() for name, each in held.items()}
    for step in range(1, 21):
        gradient = normal(size, seed=100 + step)
        told = scalars(updates=step, lr=1e-2)
        ours = {**updated({**ours, "gradient": gradient}, told, NUMBERS, halves=True, tile=SMALL)[0]}
        plain = reference({**plain, "gradient": gradient}, told, NUMBERS)
        value, after = optim.adamw(
            truth["value"],
            gradient.double() * 0.5,
            optim.Moments(truth["first"], truth["second"]),
            updates=told["updates"],
            lr=told["lr"],
            **NUMBERS,
        )
        truth = {"value": value, "first": after.first, "second": after.second}
    for name, right in truth.items():
        error, plain_error = ((each[name].double() - right).norm() for each in (ours, plain))
        assert error <= 1.5 * plain_error, name


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_where_it_is_not_allowed_only_the_gradient_goes(halves: bool) -> None:
    held, told = arena(100), scalars(allowed=False)
    held["gradient"][[0, 40, 99]] = torch.tensor([math.nan, math.inf, -math.inf])
    ours, change = updated(held, told, NUMBERS, halves=halves, tile=SMALL)
    assert all(torch.equal(ours[name], held[name]) for name in ("value", "first", "second"))
    assert torch.equal(ours["gradient"], torch.zeros(100))
    assert change == 0


def test_it_is_the_op_it_replaces() -> None:
    """Argument by argument, on an arena of both kinds."""
    for halves in (True, False):
        held, told = arena(500), scalars(updates=4, shrink=1.0)
        ours, change = updated(held, told, NUMBERS, halves=halves)
        theirs = {name: each.clone() for name, each in held.items()}
        high, low = master.split(theirs["value"])
        where = (high, low) if halves else (theirs["value"], None)
        right = cpu.adamw_(*where, theirs["first"], theirs["second"], theirs["gradient"], **told, **NUMBERS)
        if halves:
            theirs["value"] = master.join(high, low)
        for name, each in theirs.items():
            torch.testing.assert_close(ours[name], each, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(change, right, rtol=1e-5, atol=0)


def test_neighbours_of_a_stretch_are_left_alone() -> None:
    held = arena(100)
    before = {name: each.clone() for name, each in held.items()}
    part = slice(10, 75)
    views = {name: each[part] for name, each in held.items()}
    adamw_(views["value"], None, views["first"], views["second"], views["gradient"], **scalars(), **NUMBERS, tile=SMALL)
    for name, each in held.items():
        assert torch.equal(each[:10], before[name][:10]), name
        assert torch.equal(each[75:], before[name][75:]), name
        assert not torch.equal(each[part], before[name][part]), name


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_norm(size: int) -> None:
    tile = attrs.evolve(NORM_TILE, block=16, repeats=4)
    gradients = [1e3 * normal(size), normal(3, seed=1).half(), torch.zeros(5)]
    truth = torch.cat([each.double() for each in gradients]).norm()
    found = global_norm(gradients, tile=tile)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=5e-7, atol=0)
    assert torch.equal(found, global_norm(gradients, tile=tile))


@pytest.mark.parametrize("place", [0, 63, 64, 99])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_of_what_is_not_finite(bad: float, place: int) -> None:
    gradients = [normal(100), normal(7, seed=1)]
    gradients[0][place] = bad
    assert not global_norm(gradients, tile=attrs.evolve(NORM_TILE, block=16, repeats=4)).isfinite()
