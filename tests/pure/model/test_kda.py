"""Kimi delta attention against its recurrence, `transformers`' Kimi Linear, and what it claims to cost."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.core.spec import POLICY, Spec
from nmoe.pure.model.attention import KINDS, kda
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.rope import documents
from tests.memory import Kept, Largest

KIND = KINDS[sections.Kda]
WIDTH = 12


def section(**changes: object) -> sections.Kda:
    """Three heads of eight channels, convolutions over four tokens."""
    return attrs.evolve(sections.Kda(num_heads=3, head_dim=8), **changes)


def random(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    """Normal values in fp64."""
    return torch.randn(shape, dtype=torch.float64, generator=Key(seed).fold(*shape).generator()).requires_grad_(grad)


def parameters(c: sections.Kda) -> kda.Kda:
    """Leaves in fp64 that require gradients; the head norm's gains are uneven."""
    values = init(Key(0), KIND.specs(c), {"D": WIDTH, "L": 1, **KIND.dims(c)})

    def leaf(path: str, value: Tensor) -> Tensor:
        return (value.double() + 0.3 * random(*value.shape) * (path == "norm")).requires_grad_()

    return tree.map(leaf, values)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    step: Tensor,
    start: Tensor | tuple[()] = (),
    memory: Tensor | tuple[()] = (),
) -> tuple[Tensor, Tensor]:
    """The delta rule as it is written, a token at a time."""
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    state = memory if isinstance(memory, Tensor) else q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    out: list[Tensor] = []
    for t in range(q.shape[1]):
        if isinstance(start, Tensor):
            state = state * ((start[:, t] < t) | (start[:, t] == 0))[:, None, None, None]
        state = state * decay[:, t, :, :, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", step[:, t], k[:, t], v[:, t] - read)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1), state


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four tokens, so that tiny rows have several, the last of them short."""
    monkeypatch.setattr(kda, "CHUNK", 4)


def operands(length: int, heads: int, *, batch: int = 2, width: int = 4, strength: float = 1.0) -> list[Tensor]:
    """Queries, keys, values, decays, step sizes, and a memory that the row goes on from."""
    q, k, v, decay = (random(batch, length, heads, width, seed=seed) for seed in range(4))
    given = (q, k, v, -strength * decay.abs(), random(batch, length, heads, seed=4).sigmoid())
    return [each.requires_grad_() for each in (*given, random(batch, heads, width, width, seed=5))]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("strength", "heads"), [(0.0, 1), (1.0, 3), (300.0, 1)])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_chunks_are_the_recurrence(length: int, heads: int, strength: float) -> None:
    """Rows of one token, of one chunk, of one chunk and one; documents of one token; no decay and all of it."""
    given, inner = operands(length, heads, strength=strength), torch.arange(length, dtype=torch.int32)
    out, left = random(2, length, heads, 4, seed=8), random(2, heads, 4, 4, seed=9)
    thirds = torch.stack((inner // 3 * 3, torch.where(inner >= 2, 2, 0)))
    for start in ((), inner.expand(2, -1), thirds.int()):
        for memory in ((), given[-1]):
            q, k, v, decay, step, _ = given
            both = [attend(q, k, v, decay, step, start, memory) for attend in (kda.attend_kda, recurrence)]
            torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
            inputs = given if isinstance(memory, Tensor) else given[:5]
            totals = [(o * out).sum() + (state * left).sum() for o, state in both]
            gradients = [
                torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True) for total in totals
            ]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [64, 65, 200])
def test_whole_chunks_are_the_recurrence(length: int) -> None:
    """Of 64 tokens, with decays that reset channels beside others that keep."""
    given = operands(length, 2, batch=1)
    with torch.no_grad():
        given[3] *= 1 + 2000 * (random(1, length, 2, 4, seed=7) > 1)
        q, k, v, decay, step, _ = given
        both = [attend(q, k, v, decay, step) for attend in (kda.attend_kda, recurrence)]
        torch.testing.assert_close(*both, rtol=1e-11, atol=1e-11)
        single = kda.attend_kda(*(each.float() for each in given[:5]))
        torch.testing.assert_close(single, both[1], rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_are_those_of_finite_differences() -> None:
    given = operands(6, 1, batch=1, width=2)
    start = torch.tensor([[0, 0, 0, 3, 3, 3]], dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, step: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return kda.attend_kda(q, k, v, decay, step, start, memory)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("limit", [None, 5.0])
def test_every_gradient_of_a_layer_is_that_of_finite_differences(limit: float | None) -> None:
    c = section(num_heads=2, head_dim=2, decay_limit=limit)
    p, x = parameters(c), random(1, 5, WIDTH, grad=True)
    paths, leaves = zip(*tree.leaves(p), strict=True)
    where = documents(torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32))

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(paths, values, strict=True))
        return KIND.apply(kda.Kda(**given), x, (), rms_norm, KIND.reference, c, where, eps=1e-6)

    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


def pieces(p: kda.Kda, x: Tensor, c: sections.Kda, sizes: list[int]) -> tuple[Tensor, kda.KdaState]:
    """A row in pieces, each of which goes on from the state of the one before."""
    state, parts = (), list[Tensor]()
    for piece in x.split(sizes, 1):
        y, state = kda.kda_after(p, piece, state, rms_norm, KIND.reference, c, eps=1e-6)
        parts.append(y)
    assert isinstance(state, kda.KdaState)
    return torch.cat(parts, 1), state


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_of_one_token_are_the_whole_row(size: int) -> None:
    """State in, state out: what generation needs of a layer."""
    c = section(conv_size=size)
    p, x = parameters(c), random(2, 11, WIDTH)
    whole, state = kda.kda_after(p, x, (), rms_norm, KIND.reference, c, eps=1e-6)
    for sizes in ([1] * 11, [3, 1, 7], [11]):
        found, left = pieces(p, x, c, sizes)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((left.inputs, left.memory), (state.inputs, state.memory), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(KIND.apply(p, x, (), rms_norm, KIND.reference, c, eps=1e-6), whole, rtol=0, atol=0)


@pytest.mark.usefixtures("small_chunks")
def test_a_document_that_goes_on_sees_the_state_and_the_next_does_not() -> None:
    c = section()
    p, x = parameters(c), random(1, 9, WIDTH)
    where = documents(torch.tensor([[0, 0, 2, 2, 4, 4]], dtype=torch.int32))
    _, state = kda.kda_after(p, x[:, :3], (), rms_norm, KIND.reference, c, eps=1e-6)
    found, left = kda.kda_after(p, x[:, 3:], state, rms_norm, KIND.reference, c, where, eps=1e-6)
    alone = [
        kda.kda_after(p, x[:, b:e], (), rms_norm, KIND.reference, c, eps=1e-6) for b, e in ((0, 5), (5, 7), (7, 9))
    ]
    torch.testing.assert_close(found, torch.cat([y for y, _ in alone], 1)[:, 3:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.memory, alone[-1][1].memory, rtol=1e-12, atol=1e-12)


def test_the_memory_is_fp32_whatever_the_format() -> None:
    """Of two thousand bf16 tokens, within bf16's own rounding of the inputs."""
    given = operands(2048, 1, batch=1, strength=1e-3)
    low = [each.detach().to(torch.bfloat16) for each in given[:3]]
    with torch.no_grad():
        o, state = kda.attend_kda(*low, *(each.float() for each in given[3:5]))
        exact, right = recurrence(*(each.double() for each in low), *(each.float().double() for each in given[3:5]))
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (state - right).norm() / right.norm() < 1e-5
    assert (o - exact).norm() / exact.norm() < 4e-3


def kept(c: sections.Kda, length: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Bytes that autograd keeps of one layer on the device "meta", and the largest tensor's elements in both passes."""
    shapes_of = tree.map(lambda _, spec: spec, KIND.specs(c))
    with torch.device("meta"):

        def empty(_: str, spec: Spec) -> Tensor:
            format = torch.float32 if POLICY[spec.role].storage == "fp32" else dtype
            return torch.empty(spec.shape({"D": WIDTH, **KIND.dims(c)}), dtype=format, requires_grad=True)

        p = tree.map(empty, shapes_of)
        x = torch.empty(1, length, WIDTH, dtype=dtype, requires_grad=True)
        found = Kept(leaf for _, leaf in tree.leaves(p))
        with Largest() as largest, found:
            result = KIND.apply(p, x, (), rms_norm, KIND.reference, c, eps=1e-6)
        with Largest() as backward:
            result.sum().backward()
    return found.nbytes(), max(largest.elements, backward.elements)


@pytest.mark.parametrize("length", [40, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 5.0])
def test_kept_bytes_are_what_autograd_keeps(limit: float | None, dtype: torch.dtype, length: int) -> None:
    c = section(head_dim=32, decay_limit=limit)
    total, _ = kept(c, length, dtype)
    planned = KIND.kept_bytes(c, hidden=WIDTH, sequence_length=length, element=dtype.itemsize, square=True)
    fill = 64 / 40 if length == 40 else 1  # a short row is filled up to its chunk, and so is what it keeps
    assert planned * length == pytest.approx(total, rel=0.02) or planned * length * fill > total > planned * length


def test_memory_grows_linearly_with_the_row() -> None:
    """From 1 k to 8 k tokens: bytes kept, and no tensor larger than the scores of all chunks, 2 L a token and head."""
    c = section()
    found = {length: kept(c, length) for length in (1024, 2048, 4096, 8192)}
    slopes = [(found[2 * length][0] - found[length][0]) / length for length in (1024, 2048, 4096)]
    assert slopes[0] == slopes[1] == slopes[2]
    planned = KIND.kept_bytes(c, hidden=WIDTH, sequence_length=8192, element=4, square=True)
    assert slopes[0] == pytest.approx(planned, rel=0.02)
    for length, (_, largest) in found.items():
        assert largest == length * c.num_heads * 2 * kda.CHUNK


@pytest.mark.parametrize("length", [1, 2, 64, 65, 300, 512])
def test_flops_are_what_torch_counts(length: int) -> None:
    c = section()
    with FlopCounterMode(display=False) as counter:
        head = torch.empty(1, length, c.num_heads, c.head_dim, device="meta")
        kda.attend_kda(head, head, head, head, head[..., 0])
    assert KIND.flops(c, sequence_length=length, causal=False) == counter.get_total_flops() // length
