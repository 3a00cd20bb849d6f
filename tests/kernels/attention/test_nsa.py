"""Native sparse attention in the interpreter: the pure form's blocks and numbers on what is awkward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.config.sections import Nsa
from nmoe.effects.kernels.attention import gqa, nsa_kernels
from nmoe.effects.kernels.attention import nsa as kernel
from nmoe.effects.kernels.tables import SparseTile
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.model.attention import nsa as pure
from nmoe.pure.model.attention import nsa_cost
from nmoe.pure.model.attention.gqa import attend_gqa
from nmoe.pure.model.rope import Rope
from tests.kernels.attention.test_dsa import Silent
from tests.kernels.attention.test_mla import starts
from tests.memory import Kept, Peak

NAMES = [field.name for field in attrs.fields(kernel.Tiles)]


def tiles(block_m: int = 16, block_n: int = 16, block_k: int = 32) -> kernel.Tiles:
    """Small blocks, so that tiny sizes have several."""
    tile = SparseTile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=1)
    return kernel.Tiles(**dict.fromkeys(NAMES, tile))


@attrs.frozen(kw_only=True)
class Sample:
    """Operands of a branch, a gate of its output, and what a query sees."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor | tuple[()] = ()
    block: int = 4
    stride: int = 2
    span: int = 4
    count: int = 3
    window: int = 5


def sample(positions: int, *, batch: int = 1, heads: int = 4, groups: int = 2, **told: Any) -> Sample:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (batch, positions)
    return Sample(q=normal(*shape, heads, 24), k=normal(*shape, groups, 24), v=normal(*shape, groups, 16), **told)


def differentiate(attend: Callable[..., Any], operands: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """What it selects, if it does, and output and gradients."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in operands]
    result = attend(*leaves)
    o, chosen = result if isinstance(result, tuple) else (result, None)
    gate = torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return chosen, [o.detach(), *torch.autograd.grad((o * gate).sum(), leaves)]


def near(ours: Callable[..., Any], plain: Callable[..., Any], operands: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    """The pure form's selection, and errors at most a few times its errors in a format."""
    right_choice, exact = differentiate(plain, operands, torch.float64)
    _, allowed = differentiate(plain, operands, dtype)
    choice, found = differentiate(ours, operands, dtype)
    for place, right in enumerate(exact):
        # where a query sees one key, the gradients of scores are differences that end in zero
        size = torch.finfo(dtype).eps * max(right.norm().item(), exact[0].norm().item())
        error, limit = ((each[place].double() - right).norm().item() for each in (found, allowed))
        assert found[place].dtype is allowed[place].dtype
        assert error <= 3 * limit + 2 * size, (place, error, limit, size)
    assert (choice is None) == (right_choice is None)
    if dtype is torch.float32 and isinstance(choice, Tensor):
        assert torch.equal(choice, right_choice), (choice, right_choice)
    return choice


def check(s: Sample, dtype: torch.dtype = torch.float32, branches: str = "csw", **cut: int) -> Any:
    """Compressed branch and its selection, selected branch, window."""
    own, operands = tiles(**cut), (s.q, s.k, s.v)
    first = pure.first_tokens(s.q.shape[1], s.start, block=s.block, stride=s.stride, device=s.q.device)
    at = first.expand(s.q.shape[0], -1).clamp(max=s.q.shape[1] - 1)[..., None, None]
    pooled = tuple(x.gather(1, at.expand(-1, -1, *x.shape[2:])) for x in (s.k, s.v))
    told: dict[str, Any] = {"scale": 0.2, "block": s.block, "stride": s.stride}
    told |= {"selected_block": s.span, "num_selected": s.count}
    chosen = near(
        lambda q, k, v: kernel.compressed(q, k, v, first, s.start, tiles=own, **told),
        lambda q, k, v: pure.attend_compressed(q, k, v, first, s.start, **told),
        (s.q, *pooled),
        dtype,
    )
    if "s" in branches:
        near(
            lambda q, k, v: kernel.selected(q, k, v, chosen, s.start, scale=0.2, block=s.span, tiles=own),
            lambda q, k, v: pure.attend_selected(q, k, v, chosen, s.start, scale=0.2, block=s.span),
            operands,
            dtype,
        )
    if "w" in branches:
        near(
            lambda q, k, v: kernel.window(q, k, v, (), s.start, scale=0.2, window=s.window, tiles=own),
            lambda q, k, v: attend_gqa(q, k, v, (), s.start, scale=0.2, window=s.window),
            operands,
            dtype,
        )
    return chosen


@pytest.mark.parametrize(("positions", "window"), [(1, 1), (4, 1000), (5, 1), (17, 5)])
def test_lengths_and_windows(positions: int, window: int) -> None:
    """One position, a block, and one more, beyond a tile; a window of itself and beyond the row."""
    check(sample(positions, window=window))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (4, 4)])
def test_groups(heads: int, groups: int) -> None:
    """One head, a group of no power of two, and groups of one."""
    check(sample(6, heads=heads, groups=groups))


@pytest.mark.parametrize("lengths", [[1] * 12, [3, 9]], ids=str)
def test_documents(lengths: list[int]) -> None:
    """Of one token each, where a block begins at every one; and blocks that lie across the row's own."""
    check(sample(12, batch=2, heads=2, groups=1, start=starts(12, lengths, [5])))


def test_other_blocks() -> None:
    """Overlapping by three quarters, a selected block longer than a tile, and more of them than there are."""
    check(sample(21, heads=2, groups=1, block=8, stride=2, span=20, count=9), branches="cs")


@pytest.mark.parametrize("lengths", [[], [1, 9, 11]], ids=str)
def test_readers_that_several_programs_share(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """A block that two queries read or more, and keys compressed whose queries are cut in three."""
    monkeypatch.setattr(kernel, "SHARE", 2)
    monkeypatch.setattr(gqa, "SHARERS", 3)
    start = starts(21, lengths, [8, 13]) if lengths else ()
    check(sample(21, batch=2, heads=2, groups=1, start=start), branches="cs")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 3))
def test_every_reader_is_in_one_share(readers: list[int], chunk: int, spare: int) -> None:
    """The programs of an owner have its readers, `chunk` each, and places for their sums that no other has."""
    needed = sum(max(0, number - 1) // chunk for number in readers)
    shares = kernel.Shares.of(torch.tensor(readers), chunk, needed + spare)
    beside = list(zip(shares.owner_of.tolist(), shares.chunk_of.tolist(), strict=True))
    wanted = [(o, c) for o, number in enumerate(readers) for c in range(1, -(-number // chunk))]
    assert [each for each in beside if each[1] >= 0] == wanted and len(beside) == needed + spare
    more, base = shares.more.tolist(), shares.base.tolist()
    assert more == [max(0, -(-number // chunk) - 1) for number in readers]
    places = [base[o] + c for o, number in enumerate(more) if number for c in range(number + 1)]
    assert len(set(places)) == len(places) and all(place < 2 * needed for place in places)


def test_half_precision() -> None:
    check(sample(6), torch.float16)


def test_all_weights_equal() -> None:
    """Keys of zero: of equal blocks the lower is taken."""
    s = sample(17, heads=2, groups=1, count=4)
    s.k.zero_()
    chosen = check(s, branches="c")
    assert chosen[0, 16, 0].tolist() == [0, 1, 3, 4], "the second block and the third weigh the same"


@pytest.mark.parametrize("count", [3, 5])
def test_more_than_256_blocks(count: int) -> None:
    """The heaviest are far behind those that 8 bits could name, and the forced ones are always read."""
    number, heavy = 700, {299: 2.0, 650: 3.0, 651: 1.0}
    total = torch.zeros(1, number)
    for block, weight in heavy.items():
        total[0, block] = weight
    total[0, [0, number - 2, number - 1]] = torch.inf
    chosen = torch.empty(1, number, 1, count, dtype=torch.int32)
    sizes: dict[str, Any] = {"span": 1, "block_n": 256, "documents": False}
    nsa_kernels.select_kernel[(1,)](total, None, chosen, number - 1, number, 1, number, count, count, **sizes)
    others = sorted(sorted(heavy, key=lambda block: -heavy[block])[: count - 3])
    assert chosen[0, -1, 0].tolist() == [0, *others, number - 2, number - 1]


def test_blocks_beyond_256_are_read_and_have_gradients() -> None:
    """Of a row of 300 blocks the last query reads the first, the 297th and its own."""
    length, span = 1200, 4
    q, k, v = torch.ones(1, length, 1, 8), torch.zeros(1, length, 1, 8), torch.zeros(1, length, 1, 8)
    v[0, 296 * span : 297 * span] = 3
    chosen = torch.full((1, length, 1, 3), -1, dtype=torch.int32)
    chosen[0, -1, 0] = torch.tensor([0, 296, 299])
    given = kernel.Lists(chosen=chosen, start=(), span=span)
    readers, bounds, owners, step = kernel.inverted(given, length)
    assert (owners, step) == (300, span)
    lists = {block: readers[bounds[block] : bounds[block + 1]] for block in range(300)}
    assert {block: queries.tolist() for block, queries in lists.items() if len(queries)} == {
        0: [length - 1],
        296: [length - 1],
        299: [length - 1],
    }
    o, lse = torch.empty(1, length, 1, 8), torch.empty(1, length, 1)
    # the programs begin with the last query
    launch: Any = nsa_kernels.forward_kernel[(1,)]
    told = {"chosen": chosen, "slots": 3, "slots_box": 4}
    launch(q=q, o=o, lse=lse, **told, **kernel.common(q, k, v, given, 0.2, tiles().list_forward))
    assert torch.equal(o[0, -1], torch.ones(1, 8)), "a third of the keys has the value 3"


def test_twice_the_same_bits_in_chunks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sample(9)
    first = pure.first_tokens(9, (), block=4, stride=2, device=s.q.device)
    pooled = [x[:, first[0]] for x in (s.k, s.v)]
    told: dict[str, Any] = {"scale": 0.2, "block": 4, "stride": 2, "selected_block": 4, "num_selected": 3}

    def run() -> list[Tensor]:
        o, chosen = kernel.compressed(s.q, pooled[0], pooled[1], first, tiles=tiles(), **told)
        _, rest = differentiate(
            lambda q, k, v: kernel.selected(q, k, v, chosen, scale=0.2, block=4, tiles=tiles()),
            (s.q, s.k, s.v),
            torch.float16,
        )
        return [o, chosen, *rest]

    whole = run()
    monkeypatch.setattr(kernel, "WORKSPACE", 1)
    assert all(map(torch.equal, whole, run()))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing, for tensors without values."""
    for room in (nsa_kernels, gqa):
        for name in list(vars(room)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(room, name, Silent())


PAPER = Nsa(num_heads=16, num_kv_heads=2, head_dim=192, v_head_dim=128)


@pytest.mark.usefixtures("silent")
def test_memory_is_linear_keys_are_not_copied_and_the_plan_counts_it() -> None:
    """What a layer keeps at two lengths, of tensors without values, and the largest of them."""
    planned = sum(nsa_cost.kernel_kept_bytes(PAPER))
    for length in (4096, 16_384):
        sizes = {"D": 64, **pure.dims(PAPER)}

        def parameter(_: str, spec: Any, sizes: dict[str, int] = sizes) -> Tensor:
            return torch.empty(spec.shape(sizes), dtype=torch.bfloat16, device="meta").requires_grad_()

        p = tree.map(parameter, pure.specs(PAPER))
        x = torch.empty(1, length, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        rope = Rope(*(torch.empty(length, 96, device="meta") for _ in range(2)))
        own = tiles()
        ops = pure.NsaOps(
            compressed=lambda *given, own=own, **told: kernel.compressed(*given, **told, tiles=own),
            selected=lambda *given, own=own, **told: kernel.selected(*given, **told, tiles=own),
            window=lambda *given, own=own, **told: kernel.window(*given, **told, tiles=own),
        )
        held = Kept([x, rope.cos, rope.sin, *(leaf for _, leaf in tree.leaves(p))])
        with held:
            o = pure.nsa(p, x, rope, lambda x, gain, eps: x, ops, PAPER, eps=1e-6)
        assert held.nbytes() == pytest.approx(planned * length, rel=0.01)
        with Peak() as backward:
            torch.autograd.grad(o.sum(), x)
        assert (
            backward.bytes < 1.5 * nsa_cost.kernel_passing_bytes(PAPER, tokens=length, sequence_length=length) + 2**27
        )


def test_what_the_kernels_do_not_take() -> None:
    q, k, v = torch.ones(1, 3, 4, 24), torch.ones(1, 3, 2, 24), torch.ones(1, 3, 2, 16)
    wide = torch.ones(1, 3, 2, 136)
    cases: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {
        "v_head_dim: expected at most 128": (q, k, wide, 0.2),
        "heads divide the 3 query heads": (q[:, :, :3], k, v, 0.2),
        "all in bf16 or all in fp16, got torch.float32, torch.float16": (q, k.half(), v, 0.2),
        "scale > 0, got 0.0": (q, k, v, 0.0),
    }
    for told, (queries, keys, values, scale) in cases.items():
        with pytest.raises(InputError, match=told):
            kernel.window(queries, keys, values, scale=scale, window=2, tiles=tiles())
