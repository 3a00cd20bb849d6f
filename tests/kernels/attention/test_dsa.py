"""Sparse latent attention in the interpreter: the pure form's keys and numbers on what is awkward, in linear memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.config.attention import DSA_MOST
from nmoe.config.sections import Dsa
from nmoe.effects.kernels.attention import dsa as kernel
from nmoe.effects.kernels.attention import dsa_index_kernels, dsa_kernels, lists
from nmoe.effects.kernels.tables import SparseTile
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.model.attention import dsa as pure
from nmoe.pure.model.rope import Rope
from tests.kernels.attention.test_mla import starts
from tests.memory import Kept, Peak

select: Any = kernel.select
attend_sparse: Any = kernel.dsa_attention
plainly: Any = pure.attend_dsa

NAMES = [field.name for field in attrs.fields(kernel.Tiles)]


def tiles(**changes: int) -> kernel.Tiles:
    """Small blocks, so that tiny sizes have several."""
    tile = attrs.evolve(SparseTile(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=1), **changes)
    made = dict.fromkeys(NAMES, tile)
    # the fewest queries whose scores are computed together
    return kernel.Tiles(**made | {"score": attrs.evolve(tile, block_m=8), "select": attrs.evolve(tile, block_n=32)})


@attrs.frozen(kw_only=True)
class Sample:
    """Operands, a gate for each output, how many keys are chosen, and what hides keys."""

    q: Tensor
    kv: Tensor
    index: tuple[Tensor, Tensor, Tensor]
    gate: Tensor
    count: int
    start: Tensor | tuple[()] = ()


def sample(
    positions: int, count: int, *, batch: int = 1, heads: int = 3, rank: int = 24, start: Tensor | tuple[()] = ()
) -> Sample:
    """Small whole numbers in the indexer: its scores are exact in every format, and many are equal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    return Sample(
        q=normal(batch, positions, heads, rank + 8),
        kv=normal(batch, positions, rank + 8),
        index=(whole(batch, positions, 2, 8), whole(batch, positions, 8), whole(batch, positions, 2) / 8),
        gate=normal(batch, positions, heads, rank),
        count=count,
        start=start,
    )


def chosen(s: Sample, **changes: int) -> Tensor:
    """The kernel's choice, which must be the reference's."""
    found = select(*s.index, s.start, count=s.count, tiles=tiles(**changes))
    q, k, w = (tensor.double() for tensor in s.index)
    right = pure.select(q, k, w, s.start, count=s.count)
    assert torch.equal(found, right), (found, right)
    return found


def differentiate(attend: Callable[..., Any], s: Sample, keys: Tensor, dtype: torch.dtype, **told: Any) -> list[Tensor]:
    """Output, loss and the gradients of all five operands, in a format."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (s.q, s.kv, *s.index)]
    o, loss = attend(*leaves, keys, s.start, scale=0.3, rank=s.gate.shape[-1], **told)
    found = torch.autograd.grad((o * s.gate.to(dtype)).sum() + 1.7 * loss, leaves)
    return [o.detach(), loss.detach(), *found]


def check(s: Sample, dtype: torch.dtype = torch.float32, **changes: int) -> None:
    """The same keys, and errors at most a few times those of the pure form in its format."""
    keys = chosen(s, **changes)
    exact = differentiate(pure.attend_dsa, s, keys, torch.float64)
    plain = differentiate(pure.attend_dsa, s, keys, dtype)
    found = differentiate(kernel.dsa_attention, s, keys, dtype, tiles=tiles(**changes))
    for place, right in enumerate(exact):
        # where a query reads one key, the loss and the gradients of scores are differences that end in zero
        size = torch.finfo(dtype).eps * max(right.norm().item(), exact[0].norm().item())
        error, allowed = ((each[place].double() - right).norm().item() for each in (found, plain))
        assert found[place].dtype is plain[place].dtype
        assert error <= 3 * allowed + 2 * size, (place, error, allowed, size)


@pytest.mark.parametrize(("positions", "count"), [(1, 100), (16, 5), (17, 1), (18, 17)])
def test_lengths_and_counts(positions: int, count: int) -> None:
    """One position, a block, and one more; one key a query, a block and two, and more than there are."""
    check(sample(positions, count))


@pytest.mark.parametrize(("heads", "rank"), [(1, 24), (17, 16), (16, 33)])
def test_heads_and_ranks(heads: int, rank: int) -> None:
    """One head, a block and one, and a latent of no whole block."""
    check(sample(6, 4, heads=heads, rank=rank))


@pytest.mark.parametrize("lengths", [[1] * 12, [3, 9]], ids=str)
def test_documents(lengths: list[int]) -> None:
    check(sample(12, 4, batch=2, start=starts(12, lengths, [5])))


@pytest.mark.parametrize("lengths", [[40], [1, 39]], ids=str)
def test_blocks_of_several_steps_whose_scores_lie_far_apart(lengths: list[int]) -> None:
    """Two blocks of two steps, one of which adds nothing: every other block's scores are 40 higher."""
    s = sample(40, 40, start=starts(40, lengths) if len(lengths) > 1 else ())
    s.q[..., 0] = 1
    s.kv[..., 0] = (torch.arange(40) // 16 % 2 * 40 / 0.3).expand(1, 40)
    keys, own = chosen(s), attrs.evolve(tiles(), weights=attrs.evolve(tiles().weights, block_n=32))
    told: dict[str, Any] = {"scale": 0.3, "rank": 24}
    exact = plainly(*(each.double() for each in (s.q, s.kv, *s.index)), keys, **told)
    found = attend_sparse(s.q, s.kv, *s.index, keys, tiles=own, **told)
    for right, ours in zip(exact, found, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


def test_half_precision() -> None:
    check(sample(10, 4), torch.float16)


def test_a_query_of_one_key_has_its_value_and_no_gradient() -> None:
    """Also in half precision, where weights are rounded: their sum is of the rounded ones."""
    s = sample(12, 4, start=starts(12, [1] * 12))
    found = differentiate(attend_sparse, s, chosen(s), torch.float16, tiles=tiles())
    assert torch.equal(found[0], s.kv.half()[:, :, None, :24].expand_as(found[0]))
    assert found[1].abs() < 1e-5
    assert found[2].abs().max() < 1e-5


def test_all_scores_equal() -> None:
    """Keys of zero: every query reads the first ones, and the indexer cannot tell them apart."""
    s = sample(10, 4)
    s.index[1].zero_()
    check(s)
    assert chosen(s)[0, 9].tolist() == [0, 1, 2, 3]


def test_both_zeros_are_equal_and_infinite_scores_are_the_highest() -> None:
    """Where no key matches, a negative weight makes -0 of 0."""
    scores = torch.tensor([[0.0, -0.0, 3.0, -1.0, -0.0, torch.inf, 0.0, -torch.finfo().max]])
    assert selected(scores, 4) == [0, 1, 2, 5] and selected(scores, 7) == [0, 1, 2, 3, 4, 5, 6]


def selected(scores: Tensor, count: int, block: int = 32) -> list[int]:
    """What the last query of a row chooses."""
    length = scores.shape[1]
    keys = torch.empty(1, length, count, dtype=torch.int32)
    sizes: dict[str, Any] = {"block_m": 1, "block_n": block, "documents": False}
    dsa_index_kernels.select_kernel[(1,)](scores, None, keys, length - 1, length, length, count, count, **sizes)
    return keys[0, -1].tolist()


def test_indices_beyond_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen, read, and their gradients found, where an index of 16 bits would be another key."""
    length, far = 70_000, [65_535, 65_536, 65_541, 69_998]
    scores = torch.zeros(1, length)
    scores[0, far] = torch.tensor([2.0, 9.0, 1.0, 4.0])
    assert selected(scores, 4, block=16_384) == far
    assert selected(scores, 6, block=16_384) == [0, 1, *far]

    kv, q, do = torch.zeros(1, length, 24), torch.ones(1, 1, 1, 24), torch.ones(1, 1, 1, 16)
    kv[0, 69_998] = 1
    keys, o, lse = torch.tensor([[[69_998]]], dtype=torch.int32), torch.empty(1, 1, 1, 16), torch.empty(1, 1, 1)
    sizes: dict[str, Any] = {"positions": length, "heads": 1, "slots": 1, "rank": 16, "rope": 8}
    blocks: dict[str, Any] = {"block_m": 16, "block_n": 16}
    given: dict[str, Any] = {"first_query": 0, "block_k": 32, **blocks, **sizes}
    p, ds, top, size = torch.empty(4, 1, 1, 1)
    share: dict[str, Any] = {"kv": kv, "chosen": keys, "p": p, "top": top, "size": size, **given}
    dsa_kernels.weights_kernel[(1, 1, 1)](q=q, scale=1.0, **share)
    block: Any = 16
    dsa_kernels.output_kernel[(1, 1, 1)](o=o, lse=lse, blocks=1, block=block, **share)
    assert torch.equal(o, torch.ones_like(o))
    monkeypatch.setattr(lists, "MOST", 1)
    sums = lists.Sums.of(kv, keys, borrowed=torch.zeros(1, length, 1), tile=tiles().gather)
    sums.total.zero_()
    parts = next(sums.chunks(0, beside=0))[2]
    dsa_kernels.pairs_kernel[(1, 1, 1)](
        q=q, kv=kv, do=do, chosen=keys, lse=lse, delta=lse * 0, p=p, ds=ds, scale=1.0, **given
    )
    dsa_kernels.parts_kernel[(1, 1)](q=q, do=do, chosen=keys, p=p, ds=ds, **parts.places(0), **given)
    sums.add_(parts)
    assert sums.total.any(1).nonzero().flatten().tolist() == [69_998]


@pytest.mark.parametrize("workspace", [1, 3000])
def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, workspace: int) -> None:
    """One query at a time, and two or three: keys are the same, gradients to rounding."""
    s = sample(7, 3, batch=2)
    keys = chosen(s)
    whole = differentiate(kernel.dsa_attention, s, keys, torch.float32, tiles=tiles())
    monkeypatch.setattr(kernel, "PAIRS", workspace)
    monkeypatch.setattr(lists, "PAIRS", workspace)
    assert torch.equal(chosen(s), keys)
    for one, other in zip(
        differentiate(kernel.dsa_attention, s, keys, torch.float32, tiles=tiles()), whole, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_twice_the_same_bits() -> None:
    s = sample(9, 4)
    keys = chosen(s)
    first, second = (differentiate(kernel.dsa_attention, s, keys, torch.float16, tiles=tiles()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["q", "kv", "gate", "index_q", "index_w"])
def test_what_is_not_finite_does_not_end_as_a_number(which: str, value: float) -> None:
    """Nor does it in the gradient of the one key that the first query reads."""
    s = sample(6, 3)
    keys = chosen(s)
    index = {"index_q": 0, "index_w": 2}
    changed = (s.index[index[which]] if which in index else getattr(s, which)).clone()
    changed.view(-1)[0] = value  # of the first query, and what it reads
    if which in index:
        s = attrs.evolve(s, index=tuple(changed if place == index[which] else x for place, x in enumerate(s.index)))
    else:
        s = attrs.evolve(s, **{which: changed})
    found = differentiate(kernel.dsa_attention, s, keys, torch.float32, tiles=tiles())
    assert not found[5 if which in index else 3][0, 0, 0].isfinite()


class Silent:
    """A kernel that does nothing, for tensors without values."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return lambda *given, **told: None


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing."""
    for module in (dsa_kernels, dsa_index_kernels, lists):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Silent())


def published(length: int) -> tuple[list[Tensor], Dsa]:
    """Operands of a layer of DeepSeek-V3.2 without values, and its section."""
    c = Dsa(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_num_heads=64,
        index_head_dim=128,
    )
    shapes = ((length, 128, 576), (length, 576), (length, 64, 128), (length, 128), (length, 64))
    made = [torch.empty(1, *shape, dtype=torch.bfloat16, device="meta").requires_grad_() for shape in shapes]
    return made, c


@pytest.mark.usefixtures("silent")
def test_workspace_at_the_published_sizes() -> None:
    """Under 64 MiB at 32,768 tokens beside outputs, what is kept, and gradients; no tensor of all pairs."""
    (q, kv, *index), c = published(32_768)
    own = kernel.Tiles(
        **dict.fromkeys(NAMES, SparseTile(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=1))
    )
    with Peak() as choosing:
        keys = select(*index, count=c.index_top_k, tiles=own)
    assert choosing.bytes <= keys.nbytes + 64 * 2**20
    with Peak() as forward:
        o, loss = attend_sparse(q, kv, *index, keys, scale=0.1, rank=512, tiles=own)
    target, row = keys.nbytes, 128 * 32_768 * 4
    assert o.nbytes + target + row < forward.bytes <= o.nbytes + target + row + 64 * 2**20
    gate = torch.empty_like(o)
    with Peak() as backward:
        found = torch.autograd.grad(o, (q, kv), gate)
    gradients = sum(each.nbytes for each in found)
    assert gradients + row < backward.bytes <= gradients + row + 64 * 2**20
    with Peak() as indexer:
        found = torch.autograd.grad(loss, index)
    assert indexer.bytes <= sum(each.nbytes for each in found) + 64 * 2**20


@pytest.mark.usefixtures("silent")
def test_memory_is_linear_and_what_the_plan_counts() -> None:
    """At two lengths beyond `index_top_k`."""
    c = attrs.evolve(published(1)[1], q_lora_rank=96, num_heads=16)
    # a gain and a shift in fp32 beside it
    kept = [kept_bytes(c, length) // length for length in (4096, 8192)]
    assert kept == [sum(pure.kernel_kept_bytes(c))] * 2


def kept_bytes(c: Dsa, length: int) -> int:
    """What autograd keeps of a layer on the kernels, of tensors without values; norms keep their input alone."""
    own, sizes = kernel.Tiles(**dict.fromkeys(NAMES, SparseTile(num_warps=8, num_stages=1))), {"D": 64, **pure.dims(c)}

    def parameter(_: str, spec: Any) -> Tensor:
        return torch.empty(spec.shape(sizes), dtype=torch.bfloat16, device="meta").requires_grad_()

    p = tree.map(parameter, pure.specs(c))
    x = torch.empty(1, length, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
    rope = Rope(*(torch.empty(length, 32, device="meta") for _ in range(2)))
    ops = pure.DsaOps(
        query=lambda x, up, key, rope, position: project_without_kernels(x, up, key),
        select=lambda *given, **told: select(*given, **told, tiles=own),
        attend=lambda *given, **told: attend_sparse(*given, **told, tiles=own),
        dense=pure.attend_dense,
    )
    held = Kept([x, rope.cos, rope.sin, *(leaf for _, leaf in tree.leaves(p))])
    with held:
        o, loss = pure.dsa(p, x, rope, lambda x, gain, eps: x * gain, ops, c, eps=1e-6)
        (o.sum() + loss).sum()
    return held.nbytes()


def project_without_kernels(x: Tensor, up: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`project.query` but for the rotation, which is in place and keeps its table alone."""
    return (x @ up.flatten(1)).unflatten(-1, up.shape[1:]), key.clone()


def test_what_the_kernels_do_not_take() -> None:
    q, kv = torch.randn(1, 3, 2, 40), torch.randn(1, 3, 40)
    index, keys = (torch.ones(1, 3, 1, 8), torch.ones(1, 3, 8), torch.ones(1, 3, 1)), torch.zeros(1, 3, 1).int()
    wide = [torch.ones(*each.shape[:-1], 600) for each in (q, kv)]
    cases: dict[str, tuple[Tensor, Tensor, float, int]] = {
        "expected queries and keys of one width": (q, kv[..., :32], 0.3, 32),
        "up to 512 channels are the latent's, got 600, 600 and 592": (wide[0], wide[1], 0.3, 592),
        "both in bf16 or both in fp16, got torch.float32 and torch.float16": (q, kv.half(), 0.3, 32),
        "scale > 0, got 0.0": (q, kv, 0.0, 32),
    }
    for told, (queries, rows, scale, rank) in cases.items():
        with pytest.raises(InputError, match=told):
            attend_sparse(queries, rows, *index, keys, scale=scale, rank=rank, tiles=tiles())
    assert DSA_MOST["kv_lora_rank"] == 512
