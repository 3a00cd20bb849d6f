"""Kimi delta attention in the interpreter: the pure form's numbers on what is awkward, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Kda
from nmoe.effects.kernels.attention import convolve, gated_norm, kda_kernels
from nmoe.effects.kernels.attention import kda as kernel
from nmoe.effects.kernels.tables import DeltaTile
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import Spec
from nmoe.pure.model.attention import KINDS
from nmoe.pure.model.attention import kda as pure
from nmoe.pure.model.attention.cached import new_tokens
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.rope import Documents, documents
from tests.kernels import truth
from tests.kernels.attention.test_mla import starts
from tests.memory import Kept

C, L = 64, 16
WHOLE = DeltaTile(values=64, num_warps=4, num_stages=1)
TILES = kernel.Tiles(**dict.fromkeys(attrs.fields_dict(kernel.Tiles), WHOLE))
PARTS = kernel.Tiles(**dict.fromkeys(attrs.fields_dict(kernel.Tiles), attrs.evolve(WHOLE, values=32)))
OPS = pure.KdaOps(convolve.convolve_heads, partial(kernel.kda_attention, tiles=TILES, chunk=L), gated_norm.gated_norm)
KERNELS = tuple(name for name in vars(kda_kernels) if name.endswith("_kernel"))


@attrs.frozen(kw_only=True)
class Sample:
    """Operands, and a gate for each result."""

    operands: tuple[Tensor, ...]  # q, k, v, x, bias, log_rate, step, memory if there is one
    gates: tuple[Tensor, Tensor]
    start: Tensor | tuple[()] = ()
    limit: float | None = None


def sample(
    positions: int,
    *,
    batch: int = 1,
    heads: int = 1,
    channels: int = C,
    strength: float = 0.3,
    memory: bool = True,
    start: Tensor | tuple[()] = (),
    limit: float | None = None,
) -> Sample:
    """strength  scale of the decays, in nats; their rate, which the bounded gate has inside"""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, state = (batch, positions, heads, channels), (batch, heads, channels, channels)
    q, k, v, x = (drawn(*tokens) for _ in range(4))
    gate = (x, drawn(heads, channels), torch.full((heads,), strength).log())
    given = (q, k, v, *gate, drawn(*tokens[:3]).sigmoid(), *((drawn(*state),) if memory else ()))
    return Sample(operands=given, gates=(drawn(*tokens), drawn(*state)), start=start, limit=limit)


def differentiate(attend: Callable[..., Any], s: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients with q, k and v in a format, the others in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if at < 4 else wide, copy=True).requires_grad_() for at, x in enumerate(s.operands)]
    results = attend(*leaves[:7], s.start, *leaves[7:], limit=s.limit)
    gradients = torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(s.gates, results, strict=True)])
    names = ("q", "k", "v", "x", "bias", "log_rate", "step", "memory")
    found = dict(zip(names, gradients, strict=False)) | {"o": results[0].detach(), "after": results[1].detach()}
    assert all(found[name].dtype is leaf.dtype for name, leaf in zip(names, leaves, strict=False))
    return found


attend_in_chunks = partial(kernel.kda_attention, tiles=TILES, chunk=L)


def ours(s: Sample, dtype: torch.dtype = torch.float32, tiles: kernel.Tiles = TILES) -> dict[str, Tensor]:
    return differentiate(partial(kernel.kda_attention, tiles=tiles, chunk=L), s, dtype)


GATE = ("x", "bias", "log_rate")
"""Operands whose gradients are what is left of sums of terms as large as those of k."""


def check(s: Sample, dtype: torch.dtype = torch.float32, *, tiles: kernel.Tiles = TILES) -> None:
    """The kernels err at most a few times as much as the pure form in the format, which computes in fp32."""
    exact = differentiate(pure.attend_gated, s, torch.float64)
    plain = differentiate(pure.attend_gated, s, dtype)
    for name, each in ours(s, dtype, tiles).items():
        size = max(exact[name].norm().item(), 2 * exact["k"].norm().item() * (name in GATE))
        error, allowed = ((x.double() - exact[name]).norm().item() for x in (each, plain[name]))
        assert error <= 4 * (allowed + torch.finfo(torch.float32).eps * size), (name, error, allowed, size)


LENGTHS = {"one token": 1, "one chunk": L, "one chunk and one": L + 1, "several": 2 * L + 5}


@pytest.mark.parametrize("positions", LENGTHS.values(), ids=LENGTHS)
def test_lengths(positions: int) -> None:
    check(sample(positions))


def test_a_row_that_begins_with_nothing() -> None:
    check(sample(L + 1, memory=False))


def test_heads_and_sequences_in_parts_of_their_channels() -> None:
    check(sample(L + 3, batch=2, heads=3), tiles=PARTS)


def test_wide_heads() -> None:
    check(sample(L + 1, channels=128))


@pytest.mark.parametrize("lengths", [[1] * 30, [L, L], [L - 1, 1, 1, 7], [3, L + 6, 2], []], ids=str)
def test_documents(lengths: list[int]) -> None:
    """Of one token, with bounds at the chunks' and beside them, longer than a chunk."""
    check(sample(2 * L + 4, batch=2, start=starts(2 * L + 4, lengths, [L + 1, 5])))


@pytest.mark.parametrize("strength", [0.0, 3.0, 30.0, 1e30])
def test_decays(strength: float) -> None:
    """From none to those that leave nothing, beside tokens that keep all."""
    s = sample(2 * L + 1, strength=strength)
    s.operands[3][:, ::3] = -100
    check(s)


@pytest.mark.parametrize("limit", [1e-3, 5.0])
def test_the_bounded_gate(limit: float) -> None:
    check(sample(L + 7, heads=2, strength=1.3, limit=limit))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_steps_of_nothing_and_all(value: float) -> None:
    s = sample(2 * L + 1)
    s.operands[6].fill_(value)
    check(s)


def test_a_key_that_repeats() -> None:
    """Where powers of the matrix of corrections would overflow: one key, no decay, whole steps, 64 tokens a chunk."""
    s = sample(70, strength=0.0, memory=False)
    s.operands[1][:] = s.operands[1][:, :1]
    s.operands[6].fill_(1.0)
    exact = differentiate(pure.attend_gated, s, torch.float64)
    found = differentiate(partial(kernel.kda_attention, tiles=TILES), s, torch.float32)
    for name, right in exact.items():
        assert (found[name].double() - right).norm() <= 1e-5 * right.norm(), name


def test_queries_and_keys_of_zero() -> None:
    s = sample(L + 2)
    s.operands[0][:, 3:6] = 0
    s.operands[1][:, 4:9] = 0
    check(s)


@pytest.mark.parametrize("strength", [0.02, 1.0])
def test_half_precision(strength: float) -> None:
    """Operands of products are rounded to eleven bits: a result errs at most four times as much as its own rounding."""
    check(sample(2 * L + 5, strength=strength), torch.float16)
    check(sample(L, channels=128, strength=strength, start=starts(L, [5, 7])), torch.float16)


def one_gradient(attend: Callable[..., Any], s: Sample, which: int) -> tuple[Tensor, ...]:
    """Gradients of one of the two results."""
    leaves = [x.clone().requires_grad_() for x in s.operands]
    result = attend(*leaves[:7], (), leaves[7], limit=None)[which]
    return torch.autograd.grad(result, leaves, s.gates[which], allow_unused=True, materialize_grads=True)


def test_either_result_alone() -> None:
    s = sample(L + 1)
    for which in (0, 1):
        found, right = (one_gradient(attend, s, which) for attend in (attend_in_chunks, pure.attend_gated))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_slices_are_read_where_they_lie() -> None:
    s = sample(L + 3, heads=2)
    product = torch.stack(s.operands[:3], 2)
    sliced = attrs.evolve(s, operands=(*product.unbind(2), *s.operands[3:]))
    views = [*product.unbind(2)]
    assert [x.data_ptr() for x in kernel.strided(*views)] == [x.data_ptr() for x in views]
    one, other = ours(s), ours(sliced)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_kept_is_what_the_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in bf16 on the device "meta", its kernels replaced by nothing: every byte, and none of [T, T]."""

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **named: None

    for name in KERNELS:
        monkeypatch.setattr(kda_kernels, name, Nothing())
    for module in (gated_norm, convolve):
        monkeypatch.setattr(module, "forward_kernel", Nothing())
    section, width = Kda(num_heads=3, head_dim=64), 48
    kind = KINDS[Kda]
    sizes = {"D": width, "L": 1, **kind.dims(section)}

    def empty(path: str, spec: Spec) -> Tensor:
        dtype = torch.bfloat16 if spec.role.name == "MATRIX" else torch.float32
        return torch.empty(spec.shape(sizes), dtype=dtype, device="meta", requires_grad=True)

    def kept(length: int) -> int:
        p = tree.map(empty, kind.specs(section))
        x = torch.empty(1, length, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        found = Kept([x, *(leaf for _, leaf in tree.leaves(p))])
        with found:
            kind.apply(p, x, (), rms_norm, ops, section, eps=1e-6)
        return found.nbytes()

    ops = attrs.evolve(OPS, attend=partial(kernel.kda_attention, tiles=TILES))
    slope = (kept(2048) - kept(1024)) / 1024
    assert slope == pytest.approx(kind.kernel_kept_bytes(section)[0], rel=0.01)  # pyright: ignore[reportOptionalCall]
    assert kept(4096) - kept(2048) == 2 * (kept(2048) - kept(1024))


def layer(c: Kda, dtype: torch.dtype) -> pure.Kda:
    """Parameters of one layer over 24 channels."""
    sizes = {"D": 24, "L": 1, **KINDS[Kda].dims(c)}

    def leaf(path: str, value: Tensor) -> Tensor:
        return (value.to(dtype) + 0.2 * truth.normal(*value.shape, dtype=dtype)).requires_grad_()

    return tree.map(leaf, init(Key(0), KINDS[Kda].specs(c), sizes))


@pytest.mark.parametrize("limit", [None, 5.0])
def test_a_layer_is_the_reference(limit: float | None) -> None:
    """With documents: gradients of all parameters, and a row that goes on token by token from what was before it."""
    c = Kda(num_heads=1, head_dim=C, decay_limit=limit)
    x, where = truth.normal(1, L + 3, 24), documents(starts(L + 3, [5, L - 3]))

    def run(ops: pure.KdaOps, dtype: torch.dtype) -> list[Tensor]:
        p = layer(c, dtype)
        y = pure.kda(p, x.to(dtype), (), rms_norm, ops, c, where, eps=1e-6)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf for _, leaf in tree.leaves(p)])]

    assert isinstance(where, Documents)
    right, plain = run(pure.REFERENCE, torch.float64), run(pure.REFERENCE, torch.float32)
    truth.check(run(OPS, torch.float32), plain, right, factor=4, steps=32)
    with torch.no_grad():
        p, cache, parts = layer(c, torch.float32), pure.empty_cache(c, 1, L + 3, x), list[Tensor]()
        for begin, end in ((0, L), (L, L + 1), (L + 1, L + 3)):
            here = Documents(where.start[:, begin:end], where.position[:, begin:end])
            new = attrs.evolve(new_tokens(torch.tensor(begin), here.start.shape, here.start[:, 0], end), documents=here)
            part, cache = pure.extend(p, x[:, begin:end], cache, new, (), rms_norm, OPS, c, eps=1e-6)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1).double(), right[0], rtol=1e-4, atol=1e-4)


def test_twice_the_same_bits() -> None:
    s = sample(2 * L + 3, heads=2, start=starts(2 * L + 3, [9, L]))
    first, again = ours(s, tiles=PARTS), ours(s, tiles=PARTS)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", ["q", "formats", "values"])
def test_what_the_kernels_do_not_take(shape: str) -> None:
    q, k, v, *others = sample(3, memory=False).operands
    given, told = {
        "q": ((q[..., :32], k[..., :32], v[..., :32]), "expected 64 or 128 channels a head, got 32"),
        "formats": ((q, k.half(), v), "all in bf16 or all in fp16, got torch.float32, torch.float16"),
        "values": ((q, k, v[..., :32]), "of one shape, got"),
    }[shape]
    with pytest.raises(InputError, match=told):
        kernel.kda_attention(*given, *others, limit=None, tiles=TILES)
