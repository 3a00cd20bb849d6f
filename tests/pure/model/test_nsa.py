"""Native sparse attention against dense masks over each document, and what it claims to cost."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, gqa, nsa
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.model.rope import Rope, documents
from tests import shapes
from tests.memory import kept_by_blocks
from tests.pure.model.test_gqa import random

KIND = KINDS[sections.Nsa]
WIDTH = 12


def section(**changes: Any) -> sections.Nsa:
    """Four query heads in two groups; compressed blocks of four overlap by half, selected ones hold eight tokens."""
    c = sections.Nsa(
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        v_head_dim=5,
        compressed_block=4,
        compressed_stride=2,
        selected_block=8,
        num_selected=4,
        window=5,
        rope_theta=100.0,
    )
    return attrs.evolve(c, **changes)


def parameters(c: sections.Nsa, dtype: torch.dtype = torch.float64) -> nsa.Nsa:
    """Leaves that require gradients; embeddings of places are uneven."""
    values = init(Key(0), KIND.specs(c), {"D": WIDTH, "L": 1, **KIND.dims(c)})

    def leaf(path: str, value: Tensor) -> Tensor:
        return (value.double() + random(*value.shape) * path.endswith("position")).to(dtype).requires_grad_()

    return tree.map(leaf, values)


def frequencies(c: sections.Nsa) -> Tensor:
    """Radians a position of each pair of channels."""
    return c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)


def table(c: sections.Nsa, positions: int) -> Rope:
    """The rotation table in fp64."""
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies(c))
    return Rope(angle.cos(), angle.sin())


def run(p: nsa.Nsa, x: Tensor, c: sections.Nsa, start: Tensor | tuple[()] = ()) -> Tensor:
    """The attention in fp64."""
    return KIND.apply(p, x, table(c, x.shape[1]), rms_norm, KIND.reference, c, documents(start), eps=1e-6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of four queries, so that tiny rows have several, the last of them short."""
    monkeypatch.setattr(nsa, "QUERIES", 4)
    return 4


def turned(x: Tensor, positions: Tensor, c: sections.Nsa) -> Tensor:
    """[T ... C] rotated, as complex numbers."""
    angle = torch.polar(torch.ones(()).double(), positions[:, None].double() * frequencies(c))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle.view(len(positions), *(1,) * (x.ndim - 2), c.head_dim // 2)).flatten(-2)


def overlap(c: sections.Nsa, blocks: int, chosen_from: int) -> Tensor:
    """Tokens that each compressed block shares with each selected one, in strides."""
    tokens = [range(i * c.compressed_stride, i * c.compressed_stride + c.compressed_block) for i in range(blocks)]
    shared = [[sum(t // c.selected_block == j for t in own) for j in range(chosen_from)] for own in tokens]
    return torch.tensor(shared, dtype=torch.float64).view(blocks, chosen_from) / c.compressed_stride


def picked(weights: list[float], own: int, count: int) -> set[int]:
    """The first block, the query's own, the one before, then the heaviest; of equal ones the lower."""
    forced = [j for j in dict.fromkeys((0, own, own - 1)) if j >= 0]
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-round(weights[j], 12), j))
    return set((forced + rest)[:count])


def softmax(score: Tensor, seen: Tensor) -> Tensor:
    """[... T S] over what is seen; zeros where nothing is."""
    return torch.nan_to_num(score.masked_fill(~seen, -torch.inf).softmax(-1))


def dense(p: nsa.Nsa, x: Tensor, c: sections.Nsa) -> tuple[Tensor, list[list[set[int]]]]:
    """One document [T D] with a mask [H T S] a branch and repeated keys; also the selection of each query and group."""
    length, group = x.shape[0], c.num_heads // c.num_kv_heads
    t = torch.arange(length)
    q = turned(torch.einsum("td,dhc->thc", x, p.q), t, c) * c.head_dim**-0.5
    keys, values = torch.einsum("td,dbkc->btkc", x, p.k), torch.einsum("td,dbku->btku", x, p.v)

    def attend(k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (heads.repeat_interleave(group, 1) for heads in (k, v))
        probability = softmax(torch.einsum("thc,shc->hts", q, k), seen)
        return torch.einsum("hts,shu->thu", probability, v), probability

    begins = list(range(0, length - c.compressed_block + 1, c.compressed_stride))

    def pool(own: Any, rows: Tensor) -> Tensor:
        blocks = [rows[i : i + c.compressed_block].transpose(0, 1) + own.position for i in begins]
        stacked = torch.stack(blocks) if blocks else rows.new_zeros(0, *rows.shape[1:2], *own.position.shape)
        inner = torch.einsum("mknc,nce->mke", stacked, own.up)
        return (inner * inner.sigmoid()) @ own.down

    firsts = torch.tensor(begins, dtype=torch.int64)
    seen = firsts + c.compressed_block - 1 <= t[:, None]
    small = turned(pool(p.key_pool, keys[0]), firsts, c)
    compressed, probability = attend(small, pool(p.value_pool, values[0]), seen)

    count = -(-length // c.selected_block)
    weight = probability.unflatten(0, (c.num_kv_heads, group)).sum(1) @ overlap(c, len(begins), count)
    rows = weight.detach().tolist()
    selection = [
        [picked(rows[head][i], i // c.selected_block, c.num_selected) for i in range(length)]
        for head in range(c.num_kv_heads)
    ]
    chosen = torch.tensor([[[s // c.selected_block in here for s in range(length)] for here in of] for of in selection])
    causal = t <= t[:, None]
    selected, _ = attend(turned(keys[1], t, c), values[1], (causal & chosen).repeat_interleave(group, 0))
    window, _ = attend(turned(keys[2], t, c), values[2], causal & (t > t[:, None] - c.window))
    gate = torch.einsum("td,dbh->bth", x, p.gate).sigmoid()[..., None]
    o = gate[0] * compressed + gate[1] * selected + gate[2] * window
    return torch.einsum("thu,hud->td", o, p.out), selection


def expected(p: nsa.Nsa, x: Tensor, c: sections.Nsa, begins: tuple[int, ...] = (0,)) -> Tensor:
    """`dense` of every document of every row."""
    ends = (*begins[1:], x.shape[1])
    rows = [torch.cat([dense(p, row[a:b], c)[0] for a, b in zip(begins, ends, strict=True)]) for row in x]
    return torch.stack(rows)


def starts(begins: tuple[int, ...], length: int) -> Tensor:
    """[2 T] of documents that begin there."""
    start = torch.zeros(2, length, dtype=torch.int32)
    for begin in begins:
        start[:, begin:] = begin
    return start


SECTIONS = {
    "plain": section(),
    "one head": section(num_heads=1, num_kv_heads=1),
    "one group": section(num_kv_heads=1),
    "a key head a query head": section(num_kv_heads=4),
    "window of the query alone": section(window=1),
    "window beyond the row": section(window=100),
    "fewest selected": section(num_selected=3),
    "more selected than blocks": section(num_selected=50),
    "compressed blocks side by side": section(compressed_stride=4),
    "compressed longer than selected": section(compressed_block=8, selected_block=4),
    "strides of one token": section(compressed_block=3, compressed_stride=1, selected_block=2),
}


def compare(c: sections.Nsa, length: int, begins: tuple[int, ...] = ()) -> None:
    """Outputs and the gradients of input and every parameter, to 1e-9."""
    p, x = parameters(c), random(2, length, WIDTH, grad=True)
    results = [
        run(p, x, c, starts(begins, length) if begins else ()),
        expected(p, x, c, begins or (0,)),
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    weigh, named = random(2, length, WIDTH, seed=3), dict(tree.leaves(p))
    ours, right = (
        torch.autograd.grad((result * weigh).sum(), [x, *named.values()], materialize_grads=True) for result in results
    )
    for path, mine, theirs in zip(("x", *named), ours, right, strict=True):
        assert length < 8 or begins or mine.abs().max() > 1e-6, path
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", SECTIONS)
def test_outputs_and_every_gradient_are_the_dense_formula(name: str) -> None:
    compare(SECTIONS[name], 45)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_rows_of_one_token_of_one_block_and_of_one_more(length: int) -> None:
    compare(section(), length)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("begins", [(0, 1, 2, 3, 7, 8, 21), (0, 5, 18, 40), tuple(range(41))], ids=str)
@pytest.mark.parametrize("name", ["plain", "strides of one token", "compressed longer than selected"])
def test_a_packed_document_reads_as_if_alone(name: str, begins: tuple[int, ...]) -> None:
    """Documents of one token among them; none begins where a block of the row does."""
    compare(SECTIONS[name], 41, begins)


def test_blocks_beyond_256_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """350 blocks; the predecessor gave all beyond 256 to nobody, and said nothing."""
    monkeypatch.setattr(nsa, "QUERIES", 64)
    c = section(compressed_block=2, compressed_stride=1, selected_block=2, num_heads=2)
    p, x = parameters(c), random(1, 700, WIDTH)
    chosen: list[Tensor] = []

    def keeping(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        o, selection = nsa.attend_compressed(*arguments, **keywords)
        chosen.append(selection)
        return o, selection

    ops = attrs.evolve(KIND.reference, compressed=keeping)
    found = KIND.apply(p, x, table(c, 700), rms_norm, ops, c, eps=1e-6)
    right, selection = dense(p, x[0], c)
    torch.testing.assert_close(found[0], right, rtol=1e-9, atol=1e-9)
    assert chosen[0].dtype is torch.int32
    free = 0
    for head, of_head in enumerate(selection):
        for t, blocks in enumerate(of_head):
            assert sorted(blocks) == [block for block in chosen[0][0, t, head].tolist() if block >= 0]
            free += any(256 <= block < t // 2 - 1 for block in blocks)
    assert free > 20


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_blocks_the_lower_is_taken() -> None:
    """All scores are equal: every compressed block has the same probability, whole blocks the same weight."""
    c = section(num_heads=2, num_kv_heads=1)
    q = torch.zeros(1, 80, 2, 6, dtype=torch.float64)
    first = nsa.first_tokens(80, (), block=4, stride=2, device=q.device)
    blocks = first.shape[1]
    _, chosen = nsa.attend_compressed(
        q,
        random(1, blocks, 1, 6),
        random(1, blocks, 1, 5),
        first,
        scale=1.0,
        block=4,
        stride=2,
        selected_block=8,
        num_selected=5,
    )
    # the first block shares no compressed one with a block before it, so it weighs less, and is forced
    assert chosen[0, 79, 0].tolist() == [0, 1, 2, 8, 9]
    assert chosen[0, 31, 0].tolist() == [0, 1, 2, 3, -1]
    assert chosen[0, 7, 0].tolist() == [0, -1, -1, -1, -1]
    assert c.num_selected < 5


def test_the_weight_of_a_block_is_what_it_shares() -> None:
    """The paper's own sizes: block j takes 1, 2, 2, 2, 1 of the compressed blocks 4 j - 1 .. 4 j + 3."""
    for place, first, second in [(3, 0, 1), (4, 1, None), (6, 1, None), (7, 1, 2), (8, 2, None)]:
        weight = torch.zeros(1, 1, 1, 20, dtype=torch.float64)
        weight[..., place] = 1.0

        def best(count: int, weight: Tensor = weight) -> list[int]:
            position = torch.full((1, 1, 1), 9 * 64)
            numbers = {"block": 32, "stride": 16, "selected_block": 64, "num_blocks": 10}
            return nsa.select(weight, position, count=count, **numbers)[0, 0, 0].tolist()

        free = [block for block in (first, second) if block]
        assert best(3 + len(free)) == sorted({0, 8, 9, *free})
        if place == 7:  # half in block 1, which a whole one of more than half its weight outweighs
            for other, wins in ((0.4, 1), (0.5, 1), (0.6, 4)):
                mixed = weight.clone()
                mixed[..., 17] = other  # whole in block 4
                assert best(4, mixed) == [0, wins, 8, 9]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("begins", [(), (0, 3)], ids=str)
def test_gradients_are_those_of_finite_differences(begins: tuple[int, ...]) -> None:
    c = section(num_heads=2, num_kv_heads=1, head_dim=2, v_head_dim=2, compressed_block=2, compressed_stride=1)
    c = attrs.evolve(c, selected_block=2, num_selected=3, window=2)
    start = starts(begins, 9)[:1] if begins else ()
    first = nsa.first_tokens(9, start, block=2, stride=1, device=torch.device("cpu"))
    chosen = torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, 9, 1, -1)

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        numbers = {"block": 2, "stride": 1, "selected_block": 2, "num_selected": 3}
        return nsa.attend_compressed(q, k, v, first, start, scale=0.7, **numbers)[0]

    def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nsa.attend_selected(q, k, v, chosen, start, scale=0.7, block=2)

    for function, length in ((compressed, first.shape[1]), (selected, 9)):
        q, k, v = (random(1, many, each, 2, seed=each, grad=True) for many, each in ((9, 2), (length, 1), (length, 1)))
        assert torch.autograd.gradcheck(function, (q, k, v))


def kept(
    c: sections.Nsa, length: int, patch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """Bytes that autograd keeps of one layer on the device "meta", and the largest tensor's elements.

    What a recomputed block keeps are its arguments.
    """
    sizes = {"D": WIDTH, **KIND.dims(c)}
    with torch.device("meta"):
        p = tree.map(lambda _, spec: torch.empty(spec.shape(sizes), dtype=dtype, requires_grad=True), KIND.specs(c))
        x = torch.empty(1, length, WIDTH, dtype=dtype, requires_grad=True)
        rope = Rope(*(torch.empty(length, c.head_dim // 2) for _ in range(2)))

        def loss() -> Tensor:
            return KIND.apply(p, x, rope, rms_norm, KIND.reference, c, eps=1e-6).sum()

        leaves = [rope.cos, rope.sin, *(leaf for _, leaf in tree.leaves(p))]
        return kept_by_blocks(patch, nsa, leaves, loss)


LONG = section(compressed_block=32, compressed_stride=16, selected_block=64, num_selected=16, window=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_what_autograd_keeps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    total, _ = kept(LONG, 2048, monkeypatch, dtype)
    planned = KIND.kept_bytes(LONG, hidden=WIDTH, sequence_length=2048, element=dtype.itemsize, square=True)
    assert planned * 2048 == pytest.approx(total, rel=0.02)


def test_memory_grows_linearly_with_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2 k to 16 k tokens: bytes kept, and no tensor larger than what one block of queries reads.

    So there is no [B T T], no [B M N], and no copy of keys for each query.
    """
    for module in (nsa, gqa):  # fewer blocks, which take the time here
        monkeypatch.setattr(module, "QUERIES", 1024)
    found = {length: kept(LONG, length, monkeypatch) for length in (2048, 4096, 8192, 16384)}
    slopes = [(found[2 * length][0] - found[length][0]) / length for length in (2048, 4096, 8192)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-3)
    planned = [
        length * KIND.kept_bytes(LONG, hidden=WIDTH, sequence_length=length, element=4, square=True)
        for length in (8192, 16384)
    ]
    assert slopes[0] == pytest.approx((planned[1] - planned[0]) / 8192, rel=0.02)
    heads = LONG.num_kv_heads
    for length, (_, largest) in found.items():
        compressed = nsa.QUERIES * LONG.num_heads * length // LONG.compressed_stride
        selected = nsa.QUERIES * heads * 16 * 64 * LONG.head_dim
        made = 3 * length * heads * LONG.head_dim  # keys of the three branches
        tokens = length // LONG.compressed_stride * LONG.compressed_block * heads * LONG.head_dim
        assert largest <= max(compressed, selected, made, tokens), length


@pytest.mark.parametrize("name", ["plain", "compressed longer than selected", "fewest selected"])
@pytest.mark.parametrize("length", [1, 3, 4, 31, 128, 300])
def test_flops_count_attended_pairs_and_what_torch_counts(length: int, name: str) -> None:
    c = SECTIONS[name]
    t = torch.arange(length)
    begins = torch.arange(0, max(0, length - c.compressed_block + 1), c.compressed_stride)
    compressed = int((begins + c.compressed_block - 1 <= t[:, None]).sum())
    own = t // c.selected_block
    selected = int(
        ((own + 1).clamp(max=c.num_selected) * c.selected_block - (c.selected_block - 1 - t % c.selected_block)).sum()
    )
    pairs = compressed + selected + int((t + 1).clamp(max=c.window).sum())
    pools = 2 * len(begins) * c.num_kv_heads * (c.compressed_block + 1) * (c.head_dim**2 + c.v_head_dim**2)
    found = KIND.flops(c, sequence_length=length, causal=True)
    assert found == (2 * c.num_heads * (c.head_dim + c.v_head_dim) * pairs + pools) // length
    p = tree.map(lambda _, leaf: leaf.to("meta"), parameters(c, torch.float32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rope = Rope(*(torch.empty(length, c.head_dim // 2, device="meta") for _ in range(2)))
        KIND.apply(p, torch.empty(1, length, WIDTH, device="meta"), rope, rms_norm, KIND.reference, c, eps=1e-6)
    executed = KIND.flops(c, sequence_length=length, causal=False)
    products = 2 * sum(each.numel() for each in (p.q, p.k, p.v, p.gate, p.out))
    assert executed == counter.get_total_flops() // length - products
    assert found <= executed


def composed(**changes: Any) -> sections.Model:
    """A model whose every layer is sparse."""
    return shapes.config(attention=section(**changes))


def test_a_packed_document_of_a_model_reads_as_if_alone() -> None:
    c = composed()
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=30).tokens
    env = environment(c, 30)
    env = Env(env.ops, table(c.attention, 30), env.kind)  # pyright: ignore[reportArgumentType]

    def hidden(tokens: Tensor, start: Tensor | tuple[()] = ()) -> Tensor:
        return model.forward(p, tokens, shapes.router_bias(c), env, c, start)[0]

    begins = (0, 1, 5, 18)
    found = hidden(tokens, starts(begins, 30)[:1])
    for begin, end in zip(begins, (*begins[1:], 30), strict=True):
        torch.testing.assert_close(found[:, begin:end], hidden(tokens[:, begin:end]), rtol=0, atol=1e-12)


def test_the_composed_model_learns() -> None:
    c = composed()
    p, batch, env = shapes.parameters(c, dtype=torch.float32), shapes.batch(c, positions=24), environment(c, 24)
    optimizer = torch.optim.AdamW([leaf for _, leaf in tree.leaves(p)], lr=1e-2)
    bias, losses = shapes.router_bias(c, dtype=torch.float32), list[float]()
    for _ in range(12):
        loss, _, _ = model.objective(
            p, batch, bias, env, c, num_targets=(batch.targets >= 0).sum(), num_sequences=2, chunk=16
        )
        loss.backward()
        gradients = [leaf.grad for _, leaf in tree.leaves(p.blocks[0].attention)]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
