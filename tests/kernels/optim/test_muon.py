"""Muon's kernels in the interpreter: products against fp64, the update against `pure.optim`."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmoe.effects.device import cpu, ops
from nmoe.effects.kernels.optim import muon
from nmoe.effects.kernels.optim.muon import MatrixTile
from nmoe.effects.kernels.optim.newton_schulz import Products, apply_, orthogonalize, padded, symmetric_
from nmoe.effects.kernels.tables import GemmTile
from nmoe.pure.core.init import ones
from nmoe.pure.core.layout import Slot
from nmoe.pure.core.spec import Role, Spec
from nmoe.pure.formats import master
from nmoe.pure.optim import muon as optim
from nmoe.pure.optim.update import joint_settings, matrix_settings, rule
from tests.kernels.truth import normal

CUBE = GemmTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=1)
LARGE = GemmTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1)
SMALL: dict[str, Any] = {
    "tile": MatrixTile(block_m=8, block_n=16, num_warps=4, num_stages=1),
    "products": Products(
        gram=LARGE, square=LARGE, apply=GemmTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=1)
    ),
}

MUON = partial(ops.arena_ops(torch.device("cuda")).update_("muon"), **SMALL)
"""As a step calls it."""

EXPERTS = (Spec(("E", "D", "2", "F"), Role.EXPERT, ones), (2, 20, 2, 12), {}, False)
DOWN = (Spec(("E", "F", "D"), Role.EXPERT, ones), (2, 9, 37), {}, False)
FUSED = (Spec(("D", "A+B"), Role.MATRIX, ones), (6, 8), {"A": 5, "B": 3}, False)
HEADS = (Spec(("D", "H+K+K", "C"), Role.MATRIX, ones, ("H+K+K", "C")), (7, 3, 3), {"H": 1, "K": 1, "C": 3}, True)
COLUMN = (Spec(("D", "F"), Role.MATRIX, ones), (19, 1), {}, False)
PARAMETERS = {"experts": EXPERTS, "down": DOWN, "fused": FUSED, "heads": HEADS, "column": COLUMN}


def held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with rows as descriptors need them; what lies between rows is NaN."""
    count, rows, columns = x.shape
    mine = padded(count, rows, columns, x, dtype)
    whole = mine.as_strided((count, rows, mine.stride(1)), mine.stride())
    whole.fill_(math.nan)
    mine.copy_(x)
    return mine


def blank(count: int, rows: int, columns: int) -> Tensor:
    return held(torch.full((count, rows, columns), math.nan), torch.float32)


def mirrored(x: Tensor) -> bool:
    """Whether tiles above the diagonal are those under it, bit for bit."""
    under = torch.ones(x.shape[1:]).tril(-16).bool()
    return torch.equal(x[:, under], x.mT[:, under])


def symmetric(count: int, side: int, seed: int) -> Tensor:
    x = normal(count, side, side, seed=seed, dtype=torch.float64)
    return (x + x.mT) / 2


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 16), (3, 16, 33), (2, 33, 50), (1, 64, 64), (1, 49, 3)], ids=str)
def test_gram_matrices(shape: tuple[int, int, int], tall: bool) -> None:
    """Of each matrix that of its rows, or of its columns where tall."""
    x = normal(*shape, seed=1)
    given = held(x.mT if tall else x, torch.float32)
    scale = 1 + torch.arange(len(x)).float()
    out = blank(shape[0], shape[1], shape[1])
    symmetric_(out, given, given, CUBE, scale=scale, tall=tall)
    truth = scale[:, None, None].double() * (x.double() @ x.double().mT)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert mirrored(out)


@pytest.mark.parametrize("side", [1, 15, 16, 17, 48, 70])
def test_products_of_symmetric_matrices(side: int) -> None:
    """A polynomial of one, and the product of two that commute; the tiles above the diagonal are mirrors."""
    x = symmetric(2, side, seed=2) / side**0.5
    eye = torch.eye(side, dtype=torch.float64)
    given, out = held(x, torch.float32), blank(2, side, side)
    symmetric_(out, given, given, CUBE, product=2.0, added=-4.75, diagonal=3.5)
    y = 3.5 * eye - 4.75 * x + 2 * x @ x
    torch.testing.assert_close(out.double(), y, rtol=1e-5, atol=1e-5)
    other, scale = held(y, torch.float32), torch.tensor([0.5, 3.0])
    symmetric_(out, other, given, CUBE, scale=scale)
    torch.testing.assert_close(out.double(), scale[:, None, None].double() * (y @ x), rtol=1e-5, atol=1e-5)
    assert mirrored(out)


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 9, 1), (2, 16, 32), (3, 33, 17), (1, 40, 40), (2, 20, 70)], ids=str)
def test_applied_products(shape: tuple[int, int, int]) -> None:
    x, side = normal(*shape, seed=3), min(shape[1:])
    q, out = symmetric(shape[0], side, seed=4), blank(*shape)
    apply_(out, held(q, torch.float32), held(x, torch.float32), SMALL["products"].apply)
    truth = x.double() @ q if shape[1] > shape[2] else q @ x.double()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = 1 / torch.linalg.vector_norm(x, dim=(1, 2)).clamp(min=optim.SMALLEST_NORM)
    return orthogonalize(held(x, dtype), scale.float(), SMALL["products"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 20), (2, 20, 1), (2, 32, 32), (1, 17, 35), (1, 65, 33)], ids=str)
def test_iterations_are_those_of_the_reference(shape: tuple[int, int, int]) -> None:
    x = normal(*shape, seed=5, dtype=torch.float64)
    truth = optim.orthogonalize(x, bf16=False)
    torch.testing.assert_close(orthogonal(x, torch.float32).double(), truth, rtol=1e-4, atol=1e-5)
    error = (orthogonal(x, torch.float16).double() - truth).norm() / truth.norm()
    assert error < 0.006, f"in fp16 off by {error:.4f} of the norm"


def test_hard_matrices_stay_as_near_as_by_iterations_on_x() -> None:
    """Singular values that fall like 1/k: small negative eigenvalues of a Gram matrix must not grow over."""
    u, v = (torch.linalg.qr(normal(40, 40, seed=seed, dtype=torch.float64))[0] for seed in (6, 7))
    x = (u / torch.arange(1, 41, dtype=torch.float64) @ v.mT)[None]
    truth = optim.orthogonalize(x, bf16=False)
    plain = optim.orthogonalize(x.half(), bf16=False).double()
    ours = orthogonal(x, torch.float16).double()
    assert (ours - truth).norm() < 2 * (plain - truth).norm()


def test_zeros_stay_zeros_and_a_matrix_does_not_depend_on_its_neighbours() -> None:
    x = normal(3, 20, 33, seed=8)
    x[2] = 0
    found = orthogonal(x, torch.float32)
    assert not found[2].any()
    for index in (0, 1):
        assert torch.equal(orthogonal(x[index : index + 1], torch.float32)[0], found[index])


@pytest.mark.parametrize("programs", [1, 7, muon.PARTIALS, 2 * muon.PARTIALS + 3])
def test_the_scale_of_a_matrix_does_not_depend_on_its_neighbours(programs: int) -> None:
    partial_sums = normal(3, programs, seed=9).square()
    partial_sums[1] = 0
    partial_sums[:, programs // 2 :] *= 8

    def scales(given: Tensor) -> Tensor:
        found = torch.full((len(given),), math.nan)
        launch: Any = muon.scale_kernel[(len(given),)]
        launch(given, found, programs, 1e-7, muon.PARTIALS)
        return found

    found = scales(partial_sums)
    truth = 1 / partial_sums.double().sum(1).sqrt().clamp(min=1e-7)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)
    assert all(torch.equal(scales(partial_sums[at : at + 1].clone())[0], found[at]) for at in range(3))


def arena(shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    size = math.prod(shape)
    return {
        "value": normal(size, seed=seed),
        "buffer": normal(size, seed=seed + 1) / 8,
        "gradient": normal(size, seed=seed + 2),
    }


def told(which: tuple[Spec, tuple[int, ...], dict[str, int], bool], *, allowed: bool = True) -> dict[str, Any]:
    spec, shape, dims, apart = which
    return {
        "allowed": torch.tensor(allowed),
        "shrink": torch.tensor(0.5),
        "updates": torch.tensor(1),
        "lr": torch.tensor(0.1, dtype=torch.float64),
        "momentum": 0.9,
        "decay": 0.1,
        **matrix_settings("muon", spec, shape, dims, bf16=False, heads_apart=apart),
    }


def updated(update: Any, given: dict[str, Tensor], how: dict[str, Any], *, halves: bool) -> tuple[Any, Tensor]:
    """The update in place on copies: value, buffer and gradient afterwards, and the norm of the change."""
    mine = {name: each.clone() for name, each in given.items()}
    value, remainder = master.split(mine["value"]) if halves else (mine["value"], None)
    change = update(value, remainder, mine["buffer"], mine["gradient"], **how)
    if remainder is not None:
        mine["value"] = master.join(value, remainder)
    return mine, change


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_it_is_the_rule_it_replaces(name: str, halves: bool) -> None:
    """Of every kind of parameter there is: experts, gate and value; parts side by side; heads apart; a vector."""
    which = PARAMETERS[name]
    given, how = arena(which[1]), told(which)
    ours, change = updated(MUON, given, how, halves=halves)
    right, norm = updated(partial(cpu.update_, rule("muon")), given, how, halves=halves)
    assert not ours["gradient"].any()
    torch.testing.assert_close(ours["buffer"], right["buffer"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours["value"], right["value"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change, norm, rtol=1e-5, atol=0)


def test_matrices_in_turns_are_the_same_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    given, how = arena(EXPERTS[1]), told(EXPERTS)
    whole, norm = updated(MUON, given, how, halves=True)
    turns = partial(optim.turns, elements=3 * 20 * 12)
    assert [turn[0][1:] for turn in turns(optim.matrices(how["by_matrix"], 960))] == [(0, 2), (2, 2)]
    monkeypatch.setattr(ops, "turns", turns)
    cut, change = updated(MUON, given, how, halves=True)
    assert all(torch.equal(cut[each], whole[each]) for each in whole)
    torch.testing.assert_close(change, norm, rtol=1e-6, atol=0)


def slot(path: str, which: tuple[Spec, tuple[int, ...], dict[str, int], bool], offset: int) -> Slot:
    return Slot(path=path, spec=which[0], shape=which[1], offset=offset)


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_parameters_together_are_the_same_parameters(halves: bool) -> None:
    """Bit for bit, in one call over a stretch of an arena; what lies between them stays."""
    slots = [slot("a", DOWN, 128), slot("b", FUSED, 896), slot("c", DOWN, 1024), slot("d", COLUMN, 1792)]
    given, first, size = arena((2000,)), 128, 1792 + 19 - 128
    both = {**told(DOWN), **joint_settings("muon", slots, {"A": 5, "B": 3}, bf16=False)}
    inside = {name: each[first : first + size] for name, each in given.items()}
    together, change = updated(MUON, inside, both, halves=halves)
    changes: list[Tensor] = []
    for at, which in zip(slots, (DOWN, FUSED, DOWN, COLUMN), strict=True):
        own = slice(at.offset - first, at.offset - first + at.size())
        alone, moved = updated(MUON, {name: each[own] for name, each in inside.items()}, told(which), halves=halves)
        changes.append(moved)
        for name, each in alone.items():
            assert torch.equal(together[name][own], each), (at.path, name)
            inside[name][own] = each
    assert all(torch.equal(together[name], each) for name, each in inside.items()), "between them"
    torch.testing.assert_close(change, torch.stack(changes).norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("halves", [True, False], ids=["bf16 and remainder", "fp32"])
def test_where_it_is_not_allowed_only_the_gradient_goes(halves: bool) -> None:
    given = arena(FUSED[1])
    given["gradient"][[0, 40]] = torch.tensor([math.nan, math.inf])
    ours, change = updated(MUON, given, told(FUSED, allowed=False), halves=halves)
    assert torch.equal(ours["value"], given["value"]) and torch.equal(ours["buffer"], given["buffer"])
    assert not ours["gradient"].any() and change == 0


def test_a_gradient_that_is_stored_anew_stays() -> None:
    given, how = arena(EXPERTS[1]), told(EXPERTS)
    kept, change = updated(MUON, given, {**how, "clear": False}, halves=True)
    cleared, right = updated(MUON, given, how, halves=True)
    assert torch.equal(kept.pop("gradient"), given["gradient"]) and not cleared.pop("gradient").any()
    assert torch.equal(change, right) and all(torch.equal(kept[name], cleared[name]) for name in cleared)


def test_a_parameter_without_a_gradient_only_decays() -> None:
    given, how = arena(DOWN[1]), told(DOWN)
    given["gradient"].zero_()
    given["buffer"].zero_()
    ours, _ = updated(MUON, given, how, halves=False)
    torch.testing.assert_close(ours["value"], given["value"] * 0.99, rtol=1e-6, atol=0)


def test_neighbours_in_the_arena_are_left_alone_and_twice_is_the_same() -> None:
    given, how = arena((708,)), told(DOWN)
    digests: set[str] = set()
    for _ in range(2):
        mine = {name: each.clone() for name, each in given.items()}
        inside = {name: each[30:696] for name, each in mine.items()}
        MUON(inside["value"], None, inside["buffer"], inside["gradient"], **how)
        for name, each in mine.items():
            assert torch.equal(each[:30], given[name][:30]) and torch.equal(each[696:], given[name][696:]), name
        digests.add(hashlib.sha256(mine["value"].numpy().tobytes()).hexdigest())
    assert len(digests) == 1
