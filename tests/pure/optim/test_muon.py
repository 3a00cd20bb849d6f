"""Muon against torch's own, matrix by matrix, and against singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.layers import load_model
from nmoe.config.sections import Group, Optim
from nmoe.effects.device.cpu import update_
from nmoe.pure.core import tree
from nmoe.pure.core.init import ones
from nmoe.pure.core.spec import POLICY, Role, Spec, policy
from nmoe.pure.formats.master import split
from nmoe.pure.model import model
from nmoe.pure.optim.muon import (
    Matrices,
    by_matrix,
    by_parameter,
    kernel_bytes,
    muon,
    orthogonalize,
    temporary_bytes,
    turns,
)
from nmoe.pure.optim.muon import matrices as described
from nmoe.pure.optim.update import matrix_settings, rule, tree_state, tree_update
from tests import shapes
from tests.memory import Peak

PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))

MUON, ADAMW = Group(lr=2e-2, optimizer="muon", momentum=0.9), Group(lr=1e-2)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrices(
    tensor: Tensor, spec: Spec, shape: tuple[int, ...], dims: Mapping[str, int], *, apart: bool = False
) -> list[Tensor]:
    """What is orthogonalised; put back as it is, it is the parameter."""
    found: list[Tensor] = []

    def noted(part: Tensor) -> Tensor:
        found.append(part)
        return part

    assert torch.equal(by_matrix(noted, tensor, spec=spec, shape=shape, dims=dims, heads_apart=apart), tensor)
    return found


def unrounded(tensor: Tensor) -> Tensor:
    """In the place of `Tensor.bfloat16`: torch's Muon then iterates in the format of the gradient."""
    return tensor.clone()


@pytest.mark.parametrize("shape", [(5, 5), (3, 11), (12, 4), (1, 6)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_matrices_are_updated_as_torch_updates_them(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, rtol: float
) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", unrounded)
    theirs = torch.nn.Parameter(normal(*shape, seed=0, dtype=dtype))
    optimizer = torch.optim.Muon(
        [theirs], lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    ours, moments = theirs.detach().clone(), (torch.zeros(shape, dtype=dtype),)
    for step in range(4):
        gradient = normal(*shape, seed=step + 1, dtype=dtype)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours, moments = muon(
            ours,
            gradient,
            moments,
            updates=torch.tensor(step + 1),
            lr=torch.tensor(0.03, dtype=torch.float64),
            momentum=0.9,
            decay=0.2,
            by_matrix=lambda apply, tensor: apply(tensor),
            bf16=False,
        )
        torch.testing.assert_close(ours, theirs.detach(), rtol=rtol, atol=rtol)
        torch.testing.assert_close(moments[0], optimizer.state[theirs]["momentum_buffer"], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3)])
def test_singular_values_go_through_the_published_quintic_five_times(shape: tuple[int, int]) -> None:
    x = normal(*shape, seed=7)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(x, bf16=False), u @ torch.diag(s) @ v, rtol=1e-10, atol=1e-11)


def test_products_in_bf16_stay_near() -> None:
    x = normal(4, 24, 40, seed=8, dtype=torch.float32)
    near = orthogonalize(x, bf16=True)
    assert near.dtype is torch.bfloat16
    assert (near.float() - orthogonalize(x, bf16=False)).norm() < 0.03 * near.float().norm()


def test_zeros_stay_zeros_and_a_batch_is_its_matrices() -> None:
    x = normal(2, 3, 5, 8, seed=9)
    x[1, 2] = 0
    found = orthogonalize(x, bf16=False)
    assert not found[1, 2].any()
    for index in range(6):
        alone = orthogonalize(x.flatten(0, 1)[index], bf16=False)
        torch.testing.assert_close(found.flatten(0, 1)[index], alone, rtol=1e-12, atol=1e-14)


def test_what_a_fused_parameter_consists_of() -> None:
    """Experts, gate and value one by one; in attention the query, the latent and the rotated key; heads together."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    dims, specs = model.dims(c), dict(tree.leaves(model.specs(c)))
    found = {
        path: [tuple(part.shape) for part in matrices(torch.rand(spec.size(dims)), spec, spec.shape(dims), dims)]
        for path, spec in specs.items()
        if POLICY[spec.role].optimizer != "adamw"
    }
    d, f, e, h = dims["D"], dims["F"], dims["E"], dims["H"]
    assert found["blocks.0.ffn.up"] == [(2, d, dims["I"])] and found["blocks.0.ffn.down"] == [(dims["I"], d)]
    assert found["blocks.1.ffn.up"] == [(e, 2, d, f)] and found["blocks.1.ffn.down"] == [(e, f, d)]
    assert found["blocks.1.attention.down"] == [(d, 7), (d, dims["R"]), (d, dims["P"])]
    assert found["blocks.1.attention.query.up"] == [(7, h * dims["C"])]
    assert found["blocks.1.attention.up"] == [(dims["R"], h * dims["Z"])]
    assert found["blocks.1.attention.out"] == [(h * dims["U"], d)]
    assert {"embed", "head", "norm", "blocks.1.ffn.router"}.isdisjoint(found)


def test_views_are_of_the_elements_that_belong_together() -> None:
    value = torch.arange(2 * 3 * 2 * 4)
    (found,) = matrices(value, Spec(("E", "D", "2", "F"), Role.EXPERT, ones), (2, 3, 2, 4), {})
    assert torch.equal(found[1, 0], value.view(2, 3, 2, 4)[1, :, 0, :])
    left, right = matrices(value, Spec(("D", "A+B"), Role.MATRIX, ones), (6, 8), {"A": 5, "B": 3})
    assert torch.equal(left, value.view(6, 8)[:, :5]) and torch.equal(right, value.view(6, 8)[:, 5:])
    (found,) = matrices(value, Spec(("H", "U", "D"), Role.MATRIX, ones, ("H", "U")), (2, 3, 8), {})
    assert torch.equal(found, value.view(6, 8)) and found.data_ptr() == value.data_ptr()


def test_queries_keys_and_values_of_several_heads_are_three_matrices() -> None:
    value = torch.arange(2 * 5 * 3)
    spec = Spec(("D", "H+K+K", "C"), Role.MATRIX, ones, ("H+K+K", "C"))
    q, k, v = matrices(value, spec, (2, 5, 3), {"H": 3, "K": 1, "C": 3})
    assert torch.equal(q, value.view(2, 15)[:, :9])
    assert torch.equal(k, value.view(2, 15)[:, 9:12]) and torch.equal(v, value.view(2, 15)[:, 12:])


def test_each_head_is_a_matrix_where_heads_are_apart() -> None:
    """Of MLA with and without a latent of the query, of grouped queries; latents and rotated key stay whole."""
    for rank in (None, 7):
        c = shapes.config(attention=shapes.attention(q_lora_rank=rank))
        dims, specs = model.dims(c), dict(tree.leaves(model.specs(c)))
        d, h = dims["D"], dims["H"]

        def found(path: str, specs: Mapping[str, Spec] = specs, dims: Mapping[str, int] = dims) -> list[Tensor]:
            spec = specs[path]
            return matrices(torch.arange(spec.size(dims)), spec, spec.shape(dims), dims, apart=True)

        up, out = found("blocks.1.attention.up")[0], found("blocks.1.attention.out")[0]
        assert up.shape == (h, dims["R"], dims["Z"]) and out.shape == (h, dims["U"], d)
        whole = torch.arange(dims["R"] * h * dims["Z"]).view(dims["R"], h, dims["Z"])
        assert torch.equal(up[2], whole[:, 2])
        down = [tuple(part.shape) for part in found("blocks.1.attention.down")]
        first = (h, d, dims["C"]) if rank is None else (d, rank)
        assert down == [first, (d, dims["R"]), (d, dims["P"])]
        if rank is None:
            whole = torch.arange(d * (h * dims["C"] + dims["R"] + dims["P"])).view(d, -1)
            assert torch.equal(found("blocks.1.attention.down")[0][1], whole[:, dims["C"] : 2 * dims["C"]])
        assert found("blocks.1.ffn.up")[0].shape == (dims["E"], 2, d, dims["F"]), "an expert has none"
    value = torch.arange(2 * 5 * 3)
    spec = Spec(("D", "H+K+K", "C"), Role.MATRIX, ones, ("H+K+K", "C"))
    (heads,) = matrices(value, spec, (2, 5, 3), {"H": 3, "K": 1, "C": 3}, apart=True)
    assert heads.shape == (5, 2, 3) and torch.equal(heads[4], value.view(2, 15)[:, 12:])
    spec = Spec(("N", "C", "U"), Role.POOL, ones, ("N", "C"))
    (pooled,) = matrices(torch.arange(24), spec, (2, 3, 4), {}, apart=True)
    assert pooled.shape == (6, 4), "positions of a block are no heads"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_every_hidden_matrix_of_the_presets_is_one(preset: Path, apart: bool) -> None:
    """Of each kind of attention that ships: Muon is a choice of the config, and must not fail at the first step."""
    c, _ = load_model(preset)
    dims = model.dims(c)
    for _, spec in tree.leaves(model.specs(c)):
        if POLICY[spec.role].optimizer != "adamw":
            shape = spec.shape(dims)
            empty = torch.empty(shape, device="meta")
            by_matrix(lambda part: part, empty, spec=spec, shape=shape, dims=dims, heads_apart=apart)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("preset", ["quickstart", "quickstart-gqa", "quickstart-kda"])
def test_matrices_are_described_where_they_lie(preset: str, apart: bool) -> None:
    """Element by element what `by_matrix` hands out, in turns that leave none out."""
    c, _ = load_model(next(path for path in PRESETS if path.stem == preset))
    dims = model.dims(c)
    for path, spec in tree.leaves(model.specs(c)):
        if POLICY[spec.role].optimizer == "adamw":
            continue
        shape = spec.shape(dims)
        numbers = torch.arange(math.prod(shape))
        cut = partial(by_matrix, spec=spec, shape=shape, dims=dims, heads_apart=apart)
        found = [
            numbers[each.offset :].as_strided((*each.counts, each.rows, each.columns), strides)
            for each in described(cut, len(numbers))
            for strides in [(*each.steps, each.row_step, each.column_step)]
        ]
        wanted = matrices(numbers, spec, shape, dims, apart=apart)
        assert len(found) == len(wanted), path
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours.reshape(theirs.shape), theirs), path
        for each in described(cut, len(numbers)):
            runs = [*turns([each], 5 * each.rows * each.columns)]
            assert all(len(run) == 1 and run[0][0] == each for run in runs)
            met = [at for ((_, first, count),) in runs for at in range(first, first + count)]
            assert met == [*range(each.number())] and max(count for ((_, _, count),) in runs) <= 5


def block(number: int, rows: int, columns: int, offset: int) -> Matrices:
    size = rows * columns
    counts, steps = (1, number), (0, size)
    return Matrices(
        offset=offset, counts=counts, steps=steps, rows=rows, columns=columns, row_step=columns, column_step=1
    )


def test_matrices_of_one_size_are_orthogonalised_in_equal_turns_over_parameters() -> None:
    """And each once, whatever lies between; a square apart from those of its transposed size."""
    parts = [block(3, 4, 6, 0), block(1, 6, 4, 100), block(4, 4, 6, 200), block(1, 5, 5, 300), block(2, 4, 6, 400)]
    found = [*turns(parts, 4 * 24)]
    assert [[(part.offset, first, count) for part, first, count in turn] for turn in found] == [
        [(0, 0, 3)],
        [(200, 0, 3)],
        [(200, 3, 1), (400, 0, 2)],
        [(100, 0, 1)],
        [(300, 0, 1)],
    ]
    assert [sum(count for _, _, count in turn) for turn in turns(parts, 1)] == [1] * 11, "one at least"
    # in bf16 rows of 6 take 16 bytes, as rows of 4 do: nine matrices of 4 x 6 twice, and four of 4 x 4
    assert kernel_bytes(parts, 2) == kernel_bytes([*parts[3:], *parts[:3]], 2) == 9 * (2 * 4 + 4 * 4) * 16


def test_parameters_side_by_side_are_cut_as_each_alone() -> None:
    """With something between them, which becomes zero."""
    up, down = Spec(("E", "D", "2", "F"), Role.EXPERT, ones), Spec(("D", "A+B"), Role.MATRIX, ones)
    cuts = [
        partial(by_matrix, spec=up, shape=(2, 3, 2, 4), dims={}),
        partial(by_matrix, spec=down, shape=(6, 8), dims={"A": 5, "B": 3}),
    ]
    value = torch.arange(110.0) + 1
    both = partial(by_parameter, parameters=[(0, 48, cuts[0]), (55, 48, cuts[1])])
    found = both(torch.neg, value)
    expected = -value
    expected[48:55] = expected[103:] = 0
    assert torch.equal(found, expected)
    alone = [described(cuts[0], 48), described(cuts[1], 48)]
    moved = tuple(attrs.evolve(part, offset=part.offset + 55) for part in alone[1])
    assert described(both, 110) == (*alone[0], *moved)


def test_more_than_two_counted_axes_are_taken_apart() -> None:
    value = torch.arange(2 * 3 * 4 * 5 * 6)
    spec = Spec(("2", "E", "D", "4", "F"), Role.EXPERT, ones)
    cut = partial(by_matrix, spec=spec, shape=(2, 3, 5, 4, 6), dims={})
    parts = described(cut, len(value))
    assert [each.counts for each in parts] == [(3, 4), (3, 4)]
    assert [each.offset for each in parts] == [0, 3 * 5 * 4 * 6]
    assert (parts[0].steps, parts[0].row_step, parts[0].rows) == ((5 * 4 * 6, 6), 4 * 6, 5)


@pytest.mark.parametrize("axes", [("D",), ("H", "U", "D")])
def test_what_is_no_matrix_is_refused(axes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"Muon: expected a matrix, got axes {' '.join(axes)}; "):
        matrices(torch.zeros(2 ** len(axes)), Spec(axes, Role.MATRIX, ones), (2,) * len(axes), {})


def test_a_vector_in_a_tree_is_refused_and_so_is_a_group_without_a_rule() -> None:
    optim = Optim(dense=MUON, expert=MUON, router=ADAMW)
    specs, params = (Spec(("D",), Role.MATRIX, ones),), (torch.ones(3),)
    with pytest.raises(ValueError, match="Muon: expected a matrix, got axes D; put the axes .* or train its group by"):
        tree_update(params, params, tree_state(params, specs, optim), specs, optim, dims={"D": 3})
    with pytest.raises(ValueError, match=r"optim.dense.optimizer: expected an update rule, got none; name one"):
        policy(Role.MATRIX, {"expert": "muon"})
    assert policy(Role.GAIN, {}).optimizer == "adamw"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (16, 256), (256, 16), (8, 24, 48)])
def test_the_plan_counts_the_temporaries_of_an_update(shape: tuple[int, ...], bf16: bool) -> None:
    spec = Spec(("E", "D", "F")[-len(shape) :], Role.EXPERT if len(shape) == 3 else Role.MATRIX, ones)
    size = math.prod(shape)
    value = torch.randn(size)
    stored, remainder = split(value) if bf16 else (value, None)
    moment, gradient = torch.zeros(size), torch.randn(size)
    with Peak() as peak:
        update_(
            rule("muon"),
            stored,
            remainder,
            moment,
            gradient,
            allowed=torch.tensor(True),
            shrink=torch.tensor(1.0),
            updates=torch.tensor(1),
            lr=torch.tensor(0.1, dtype=torch.float64),
            momentum=0.9,
            decay=0.1,
            **matrix_settings("muon", spec, shape, {}, bf16=bf16),
        )
    # but for a few numbers a matrix
    assert 0.8 * temporary_bytes(size, bf16=bf16) < peak.bytes < 1.02 * temporary_bytes(size, bf16=bf16) + 1000


def test_a_tree_is_updated_by_muon_where_its_groups_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden matrices as torch.optim.Muon updates each alone, all others bit for bit as without Muon."""
    monkeypatch.setattr(Tensor, "bfloat16", unrounded)
    c = shapes.config()
    specs, dims = model.specs(c), model.dims(c)
    params = tree.map(lambda _, leaf: leaf.double(), shapes.parameters(c))
    grads = tree.map(lambda _, leaf: normal(*leaf.shape, seed=leaf.numel()), params)
    both = Optim(dense=MUON, expert=MUON, router=ADAMW, weight_decay=0.2, clip_norm=1e9)
    plain = attrs.evolve(both, **{name: attrs.evolve(MUON, optimizer="adamw") for name in ("dense", "expert")})
    assert policy(Role.MATRIX, both.optimizers()).optimizer == "muon"
    state = tree_state(params, specs, both)
    ours, after = tree_update(params, grads, state, specs, both, share=0.5, dims=dims)
    others, _ = tree_update(params, grads, tree_state(params, specs, plain), specs, plain, share=0.5)
    again = dict(tree.leaves(others))
    moments = dict(tree.leaves(after.moments))
    for (path, leaf), (_, spec), (_, old), (_, gradient) in zip(
        *(tree.leaves(each) for each in (ours, specs, params, grads)), strict=True
    ):
        if spec.role not in (Role.MATRIX, Role.SHARED, Role.EXPERT):
            assert torch.equal(leaf, again[path]), path
            continue
        assert f"{path}.0" in moments and f"{path}.1" not in moments
        parts = partial(matrices, spec=spec, shape=tuple(leaf.shape), dims=dims)
        for new, before, change in zip(parts(leaf), parts(old.contiguous()), parts(gradient), strict=True):
            for one, value, slope in zip(
                *(each.flatten(0, -3) if each.ndim > 2 else each[None] for each in (new, before, change)), strict=True
            ):
                theirs = torch.nn.Parameter(value.clone())
                theirs.grad = slope.clone()
                torch.optim.Muon(
                    [theirs], lr=1e-2, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
                ).step()
                torch.testing.assert_close(one, theirs.detach(), rtol=1e-9, atol=1e-11)


def test_updates_are_as_large_as_those_of_adamw() -> None:
    """0.2 in the root mean square, times the learning rate."""
    shape = (48, 96)
    new, _ = muon(
        torch.zeros(shape, dtype=torch.float64),
        normal(*shape, seed=3),
        (torch.zeros(shape, dtype=torch.float64),),
        updates=torch.tensor(1),
        lr=torch.tensor(1.0, dtype=torch.float64),
        momentum=0.95,
        decay=0.0,
        by_matrix=lambda apply, tensor: apply(tensor),
        bf16=False,
    )
    assert math.isclose(float(new.square().mean().sqrt()), 0.2, rel_tol=0.2)
