"""Grouped-query attention in the interpreter: the pure form's numbers on what is awkward, and nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.sections import Gqa
from nmoe.effects.kernels.attention import gqa as kernel
from nmoe.effects.kernels.tables import AttentionTile
from nmoe.errors import InputError
from nmoe.pure.model.attention import gqa as pure
from nmoe.pure.model.rope import Rope, documents, table
from tests.kernels.attention.test_mla import starts

SMALL = AttentionTile(block_m=16, block_n=16, heads=2, num_warps=4, num_stages=1)
C = 64


class Same(dict[int | None, kernel.Tiles]):
    """The same tiles for every window."""

    def __init__(self, m: int = 16, n: int = 16, keys_m: int = 16, keys_n: int = 16) -> None:
        rows, keys = attrs.evolve(SMALL, block_m=m, block_n=n), attrs.evolve(SMALL, block_m=keys_m, block_n=keys_n)
        self.tiles = kernel.Tiles(forward=rows, dq=rows, dkv=keys)

    def __missing__(self, window: int | None) -> kernel.Tiles:
        return self.tiles


@attrs.frozen(kw_only=True)
class Sample:
    """Operands as slices of one product, a gate for each output, and what hides keys."""

    product: Tensor
    sinks: Tensor | tuple[()]
    gate: Tensor
    start: Tensor | tuple[()] = ()
    window: int | None = None
    scale: float = 0.2

    @property
    def heads(self) -> tuple[int, int]:
        queries = self.gate.shape[2]
        return queries, (self.product.shape[2] - queries) // 2


def sample(
    batch: int, positions: int, heads: int, groups: int, *, sinks: bool = True, channels: int = C, **told: Any
) -> Sample:
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(batch, positions, heads + 2 * groups, channels, generator=generator)
    gate = torch.randn(batch, positions, heads, channels, generator=generator)
    drawn = torch.randn(heads, generator=generator)
    return Sample(product=product, sinks=drawn if sinks else (), gate=gate, **told)


def differentiate(attend: Callable[..., Tensor], s: Sample, dtype: torch.dtype, **told: Any) -> dict[str, Tensor]:
    """Output and gradients, computed in a format; sinks stay in fp32 at least."""
    queries, groups = s.heads
    leaf = s.product.to(dtype, copy=True).requires_grad_()
    q, k, v = leaf.split((queries, groups, groups), dim=2)
    sinks: Any = s.sinks
    leaves = {"q": q, "k": k, "v": v}
    if isinstance(sinks, Tensor):
        sinks = sinks.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        leaves["sinks"] = sinks
    o = attend(q, k, v, sinks, s.start, scale=s.scale, window=s.window, **told)
    found = torch.autograd.grad(o, [*leaves.values()], s.gate.to(dtype))
    return {"o": o.detach(), **dict(zip(leaves, found, strict=True))}


def ours(s: Sample, tiles: Any = None) -> dict[str, Tensor]:
    """Output and gradients of the kernels in fp32."""
    return differentiate(kernel.gqa_attention, s, torch.float32, tiles=Same() if tiles is None else tiles)


def check(s: Sample, dtype: torch.dtype = torch.float32, condition: float = 1.0, **tiles: int) -> None:
    """The kernel errs at most a few times as much as the pure form in its format.

    condition  by how much a probability changes, as a share of itself, for such a change of its score
    """
    exact = differentiate(pure.attend_gqa, s, torch.float64)
    plain = differentiate(pure.attend_gqa, s, dtype)
    found = differentiate(kernel.gqa_attention, s, dtype, tiles=Same(**tiles))
    for name, right in exact.items():
        # of a few sinks the plain computation may be exact by luck; theirs is a sum over all queries, in fp32
        steps = 4 * torch.finfo(torch.float32).eps if name == "sinks" else torch.finfo(dtype).eps
        size = right.norm().item() * steps * condition
        error, allowed = ((each[name].double() - right).norm().item() for each in (found, plain))
        assert found[name].dtype is plain[name].dtype
        assert error <= 3 * allowed + size, (name, error, allowed, size)


LENGTHS = {"one position": 1, "one block": 16, "one block and one": 17, "several": 53}
WINDOWS = {"alone": 1, "a block": 16, "a block and one": 17, "beyond": 1000, "none": None}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("positions", LENGTHS.values(), ids=LENGTHS)
def test_lengths_and_windows(positions: int, window: int | None) -> None:
    check(sample(2, positions, 2, 1, window=window))


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize(
    ("heads", "groups"), [(1, 1), (8, 1), (4, 4), (3, 1), (12, 2), (16, 2), (24, 1)], ids=lambda x: str(x)
)
def test_groups(heads: int, groups: int, window: int | None) -> None:
    """One head, groups of 1, 8, 3, 6 and 24: those that are no power of two are packed by what divides them."""
    check(sample(1, 21, heads, groups, window=window))


@pytest.mark.parametrize("short", [0, 100])
@pytest.mark.parametrize(("m", "n", "keys_m", "keys_n"), [(32, 16, 16, 32), (16, 32, 32, 16)])
@pytest.mark.parametrize("window", [3, 20, 33])
def test_one_loop_or_three(
    monkeypatch: pytest.MonkeyPatch, short: int, window: int | None, m: int, n: int, keys_m: int, keys_n: int
) -> None:
    """A window's blocks all masked, or those in the middle not; blocks of every shape."""
    monkeypatch.setattr(kernel, "SHORT", short)
    check(sample(1, 75, 4, 2, window=window), m=m, n=n, keys_m=keys_m, keys_n=keys_n)


@pytest.mark.parametrize(("window", "short"), [(1, 100), (7, 0), (20, 0), (20, 100), (None, 0)])
@pytest.mark.parametrize("lengths", [[1] * 48, [16, 16], [3, 20, 1, 1, 7], []], ids=str)
def test_documents(monkeypatch: pytest.MonkeyPatch, lengths: list[int], window: int | None, short: int) -> None:
    monkeypatch.setattr(kernel, "SHORT", short)
    check(sample(2, 51, 2, 1, window=window, start=starts(51, lengths, [33, 5])), keys_n=32)


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("sinks", [True, False])
def test_half_precision_and_wide_heads(sinks: bool, window: int | None) -> None:
    check(sample(1, 35, 4, 2, sinks=sinks, channels=128, window=window), torch.float16)
    check(sample(1, 35, 4, 2, sinks=sinks, window=window), torch.float16)


@pytest.mark.parametrize("value", [1e30, 1e4, -1e4, -1e30, -torch.inf])
@pytest.mark.parametrize("window", [4, None])
def test_sinks_that_take_all_or_nothing(value: float, window: int | None) -> None:
    """With a large one every output and gradient is zero, with a small one they are those without."""
    s = sample(1, 37, 2, 1, window=window)
    found = differentiate(
        kernel.gqa_attention, attrs.evolve(s, sinks=torch.tensor([value, value])), torch.float32, tiles=Same()
    )
    without = differentiate(kernel.gqa_attention, attrs.evolve(s, sinks=()), torch.float32, tiles=Same())
    assert torch.equal(found.pop("sinks"), torch.zeros(2))
    for name, each in found.items():
        torch.testing.assert_close(each, torch.zeros_like(each) if value > 0 else without[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [9, None])
def test_all_scores_equal(window: int | None) -> None:
    """Queries of zero: probabilities are one over the keys a query sees and the sink."""
    s = sample(1, 40, 4, 2, window=window)
    s.product[:, :, :4] = 0
    s = attrs.evolve(s, sinks=torch.zeros(4))
    check(s)
    v = s.product[:, :, 6:].repeat_interleave(2, 2)
    seen = torch.ones(40, 40).tril().triu(-39 if window is None else 1 - window)
    mean = torch.einsum("ts,bshc->bthc", seen / (seen.sum(-1, keepdim=True) + 1), v)
    torch.testing.assert_close(ours(s)["o"], mean, rtol=1e-5, atol=1e-6)


def test_large_scores_and_hidden_ones_larger() -> None:
    s = sample(1, 40, 2, 1, window=11, start=starts(40, [9, 20]), scale=1.7)
    s.product[:, :, 2] += torch.arange(40)[:, None] * 0.1
    # exp(score - log-sum) of rounded numbers is off by that many roundings; the pure form on some processors by fewer
    scores = torch.einsum("bthc,bsc->bhts", s.product[:, :, :2], s.product[:, :, 2]) * 1.7
    check(s, condition=scores[..., torch.ones(40, 40).tril().triu(-10).bool()].abs().max().item())


def test_slices_are_read_where_they_lie_and_an_expanded_gradient_is_not() -> None:
    s = sample(2, 21, 4, 2, window=6)
    whole = differentiate(
        kernel.gqa_attention, attrs.evolve(s, gate=torch.ones_like(s.gate)), torch.float32, tiles=Same()
    )
    q, k, v = leaves = [x.contiguous().requires_grad_() for x in s.product.split((4, 2, 2), dim=2)]
    o = kernel.gqa_attention(q, k, v, s.sinks, scale=s.scale, window=6, tiles=Same())
    found = torch.autograd.grad(o.sum(), leaves)
    assert torch.equal(o, whole["o"])
    assert all(torch.equal(each, whole[name]) for each, name in zip(found, "qkv", strict=True))


def test_keys_are_not_copied() -> None:
    """Kept for backward are the one product, the output and a number a row: what `nmoe plan` counts."""
    section = Gqa(num_heads=8, num_kv_heads=2, head_dim=C, window=6)
    x, qkv = torch.randn(1, 20, 16).requires_grad_(), torch.randn(16, 12, C).requires_grad_()
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    rope = table(20, C, theta=100.0, yarn=None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        q, k, v = kernel.project(x, qkv, rope, num_heads=8)
        o = kernel.gqa_attention(q, k, v, scale=0.2, window=6, tiles=Same())
    given = {each.untyped_storage().data_ptr() for each in (x, qkv, rope.cos, rope.sin)}
    own = [each.untyped_storage().nbytes() for place, each in kept.items() if place not in given]
    rows = 20 * 8 * 4
    assert sorted(own) == [rows, o.numel() * 4, 20 * 12 * C * 4]
    # the interpreter's fp32 is bf16 on a GPU
    assert 20 * pure.kernel_kept_bytes(section)[0] == rows + (sum(own) - rows) // 2


@pytest.mark.parametrize("window", [5, None])
def test_twice_the_same_bits_at_every_order_of_programs(window: int | None) -> None:
    s = sample(2, 40, 4, 2, window=window)
    tile = Same().tiles.forward
    orders = [attrs.evolve(tile, heads=heads) for heads in (1, 3, 16, 1)]
    found = [ours(s, {window: kernel.Tiles(forward=each, dq=each, dkv=each)}) for each in orders]
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in each)


@pytest.mark.parametrize("stretch", [1.0, 1.5])
@pytest.mark.parametrize("lengths", [None, [3, 9]], ids=str)
def test_projection_is_the_reference(stretch: float, lengths: list[int] | None) -> None:
    """Rotated in its own memory; with YaRN's magnitude the gradient is the transpose, not the inverse."""
    generator = torch.Generator().manual_seed(0)
    x, qkv = torch.randn(2, 19, 12, generator=generator), torch.randn(12, 8, C, generator=generator)
    bias = torch.randn(8, C, generator=generator)
    rope = table(25, C, theta=100.0, yarn=None)
    rope = Rope(stretch * rope.cos, stretch * rope.sin)
    made = documents(() if lengths is None else starts(19, lengths, [5]))
    placed = () if lengths is None else made.position  # pyright: ignore[reportAttributeAccessIssue]

    def run(project: Callable[..., Any]) -> tuple[Any, list[Tensor]]:
        leaves = [each.clone().requires_grad_() for each in (x, qkv, bias)]
        results = project(*leaves[:2], rope, placed, num_heads=4, bias=leaves[2] if stretch > 1 else ())
        leaves = leaves[: 3 if stretch > 1 else 2]
        gates = [torch.randn(each.shape, generator=torch.Generator().manual_seed(2)) for each in results]
        return results, [*(each.detach() for each in results), *torch.autograd.grad(results, leaves, gates)]

    views, found = run(kernel.project)
    for one, other in zip(found, run(pure.project)[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert len({each.untyped_storage().data_ptr() for each in views}) == 1


@pytest.mark.parametrize("shape", ["q", "formats", "groups"])
def test_what_the_kernels_do_not_take(shape: str) -> None:
    q, k, v = torch.randn(1, 3, 4, C), torch.randn(1, 3, 2, C), torch.randn(1, 3, 2, C)
    given, told = {
        "q": ((q[..., :32], k[..., :32], v[..., :32]), "expected 64 or 128 channels a head, got 32"),
        "formats": ((q, k.half(), v), "all in bf16 or all in fp16, got torch.float32, torch.float16"),
        "groups": ((q[:, :, :3], k, v), "heads divide the 3 query heads"),
    }[shape]
    with pytest.raises(InputError, match=told):
        kernel.gqa_attention(*given, scale=0.3, tiles=Same())


@pytest.mark.parametrize(("option", "told"), [({"scale": 0.0}, "scale > 0"), ({"window": 0}, "window >= 1, got 0")])
def test_options_the_kernels_do_not_take(option: dict[str, Any], told: str) -> None:
    x = torch.randn(1, 3, 2, C)
    with pytest.raises(InputError, match=told):
        options: dict[str, Any] = {"scale": 0.3, "tiles": Same(), **option}
        kernel.gqa_attention(x, x.clone(), x.clone(), **options)
